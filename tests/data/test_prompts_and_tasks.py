import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_core.data import prompts, records, tasks, teacher
from speed_core.data.topics import load_topics
from speed_core.files import UserError
from speed_core.preference import judge
from speed_core.study.generation_stages import RECORDED_PLANS

TABLE = {(r["kind"], r["topic"]): json.loads(r["answer"]) for r in teacher.recorded_rows("tasks")}
TOPICS = [prompts.truncate_topic(t) for t in load_topics().paths]
RECORDED = (*load_topics().paths[:60], *load_topics().paths[-12:])  # the topics of the recorded runs


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=9), st.integers(1, 6))
def test_truncation_keeps_both_ends_and_the_depth_limit(levels, depth):
    short = prompts.truncate_topic("/".join(levels), depth).split("/")
    assert len(short) == min(len(levels), depth) and short[0] == levels[0]
    if len(levels) > depth > 1:
        assert short[-1] == levels[-1]


def test_prompts_do_not_depend_on_global_randomness_or_order():
    plan = tasks.plan_synthesis("t", 60, TOPICS, TABLE, attributes="paper")
    random.seed(7)
    random.random()
    again = tasks.plan_synthesis("t", 60, TOPICS, TABLE, attributes="paper")
    assert [p.text for p in plan] == [p.text for p in again]
    assert len({p.id for p in plan}) == 60


def test_prompts_are_byte_equal_in_another_process():
    code = "from speed_core.data import prompts as p; print(p.synthesis('retrieval', 'A/B', 'Find it.', index=3).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == prompts.synthesis("retrieval", "A/B", "Find it.", index=3).digest


@given(st.integers(0, 500))
def test_the_parts_add_up_and_follow_the_ratio(count):
    parts = tasks.split_count(count)
    assert sum(parts.values()) == count and abs(parts["sts"] - count * 7 / 23) <= 1


def test_more_tasks_a_topic_mean_fewer_topics_at_the_same_size(monkeypatch):
    monkeypatch.setattr(tasks, "RATIO", dict.fromkeys(records.KINDS, 0.0) | {"retrieval": 1.0})
    plans = {k: tasks.plan_synthesis("t", 60, TOPICS, TABLE, tasks_per_topic=k) for k in (1, 3)}
    assert {len(p) for p in plans.values()} == {60}
    assert len({q.topic for q in plans[1]}) == 60 and len({q.topic for q in plans[3]}) == 20
    assert len({(q.topic, q.task) for q in plans[3]}) > 40


def test_weights_of_the_attributes_are_the_papers():
    many = [prompts.synthesis("retrieval", "A", "t", index=i).attributes["query_type"] for i in range(2000)]
    shares = [many.count(v) / len(many) for v in ("extremely long-tail", "long-tail", "common")]
    assert all(abs(a - b) < 0.04 for a, b in zip(shares, (0.4, 0.5, 0.1), strict=True))


def test_a_changed_attribute_table_changes_the_id():
    ids = {prompts.synthesis("sts", "A", "", table=t).id for t in ("paper", "short")}
    assert len(ids) == 2


def test_the_recorded_teacher_is_as_large_as_it_says():
    seeds, revisions = teacher.recorded_rows("seeds"), teacher.recorded_rows("revisions")
    assert len(seeds) >= 2000 and {r["kind"] for r in seeds} == set(records.KINDS)
    assert len({r["topic"] for r in seeds}) == 240
    assert len(teacher.recorded_rows("tasks")) >= 640 and len(revisions) >= 400
    assert all(records.parse(r["answer"], r["kind"]).status == "ok" for r in (*seeds, *revisions))
    assert len({r["answer"] for r in seeds}) == len(seeds)


def test_every_recorded_seed_answers_a_prompt_that_is_really_built():
    built = {
        q.digest
        for topics, count in RECORDED_PLANS
        for q in tasks.plan_synthesis("seed", count, TOPICS[:topics], TABLE, attributes="short")
    }
    assert built == {r["prompt_digest"] for r in teacher.recorded_rows("seeds")}
    brainstormed = {q.digest for q in tasks.plan_brainstorm(load_topics().paths)}
    brainstormed |= {q.digest for q in tasks.plan_brainstorm(RECORDED, truncate=False)}
    assert brainstormed == {r["prompt_digest"] for r in teacher.recorded_rows("tasks")}
    for r in teacher.recorded_rows("revisions"):
        assert prompts.text_digest(prompts.revise(r["prompt"], r["weak"])) == r["prompt_digest"]


def test_who_uses_more_than_three_tasks_of_a_topic_asks_for_as_many():
    three, five = (tasks.plan_brainstorm(RECORDED, tasks_per_topic=n) for n in (3, 5))
    assert three == tasks.plan_brainstorm(RECORDED) and "about 5" in five[0].text and "about 3" in three[0].text
    answers = {r["prompt_digest"]: json.loads(r["answer"]) for r in teacher.recorded_rows("tasks_five")}
    assert {q.digest for q in five} == set(answers)
    for short, long in zip(three, five, strict=True):
        told = answers[long.digest]
        assert told[:3] == TABLE[short.kind, short.topic] and len(set(told)) == 5
    added = [t for told in answers.values() for t in told[3:]]
    assert len(set(added)) == len(added) and not set(added) & {t for told in TABLE.values() for t in told}


@given(st.sampled_from(records.KINDS), st.sampled_from(("short", "paper")), st.integers(0, 200))
def test_a_prompt_read_back_from_its_text_asks_the_judge_for_the_same(kind, table, index):
    built = prompts.synthesis(kind, "Health/Sleep", "" if kind == "sts" else "Find it.", index=index, table=table)
    again = prompts.parse_prompt_attributes(kind, built.task, built.text)
    assert judge._wanted_words(again) == judge._wanted_words(built) and again.text == built.text
    assert again.topic == ("Health/Sleep" if kind == "sts" else "")


def test_the_faithful_style_without_a_clone_says_what_to_do():
    with pytest.raises(UserError, match="prompts.clone"):
        prompts.synthesis("sts", "A", "", style="faithful")


def test_the_faithful_style_reads_a_clone_and_leaves_global_randomness_alone(tmp_path):
    body = "import random\ndef get_sts_prompt_with_topic(topic):\n    return [{'content': f'{topic} {random.random()}'}]\n"
    (tmp_path / "prompts_synthesis.py").write_text(body)
    random.seed(3)
    first = prompts.synthesis("sts", "A", "", style="faithful", clone=str(tmp_path))
    after = random.random()
    random.seed(3)
    assert after == random.random()
    assert prompts.synthesis("sts", "A", "", style="faithful", clone=str(tmp_path)).text == first.text

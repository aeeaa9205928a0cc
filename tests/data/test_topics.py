"""Topics of one's own: every form of file, what is counted, and what is refused in one line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_core.data import prompts, records, tasks, teacher, topics
from speed_core.files import UserError
from speed_core.runner import preflight
from speed_core.study import generation_stages
from speed_core.study.runs import open_run

LEVEL = st.text(st.characters(codec="utf-8", exclude_characters="/#_", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
PATHS = st.lists(st.lists(LEVEL, min_size=1, max_size=5).map("/".join), min_size=2, max_size=12)
RDF = """<?xml version="1.0" encoding="UTF-8"?>
<RDF xmlns:r="http://www.w3.org/TR/RDF/" xmlns:d="http://purl.org/dc/elements/1.0/" xmlns="http://dmoz.org/rdf/">
  <Topic r:id=""><catid>1</catid></Topic>
  <Topic r:id="Top"><catid>1</catid></Topic>
  <Topic r:id="Top/Arts"><catid>2</catid><d:Title>Arts</d:Title><narrow r:resource="Top/Arts/Movies"/></Topic>
  <Topic r:id="Top/Arts/Movies/Film_Noir"><catid>3</catid></Topic>
  <Topic r:id="Top/World/Deutsch/Kultur"><catid>4</catid></Topic>
  <Alias r:id="Top/Arts:Kino"/>
  <Topic r:id="Top/Science"><catid>5</catid></Topic>
</RDF>
"""


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@given(PATHS, st.sampled_from(["txt", "csv", "jsonl"]))
def test_every_form_gives_the_same_distinct_paths_in_order(tmp_path_factory, paths, form):
    text = {
        "txt": "\n".join(["# a comment", *paths]),
        "csv": "\n".join(["id,topic", *(f'{i},"{p.replace(chr(34), chr(34) * 2)}"' for i, p in enumerate(paths))]),
        "jsonl": "\n".join(json.dumps({"topic": p}) for p in paths),
    }[form]
    file = write(tmp_path_factory.mktemp("topics"), f"mine.{form}", text)
    wanted = list(dict.fromkeys(paths))
    if len(wanted) < 2:
        with pytest.raises(UserError, match="give at least two"):
            topics.load_topics(file)
        return
    found = topics.load_topics(file)
    assert list(found.paths) == wanted and found.duplicates == len(paths) - len(wanted)


def test_the_list_of_this_repository_is_read_as_it_stands():
    lines = topics.BUILTIN.read_text(encoding="utf-8").splitlines()
    assert list(topics.load_topics().paths) == [line for line in lines if not line.startswith("#")]


def test_counts_duplicates_and_depths_are_told(tmp_path):
    found = topics.load_topics(write(tmp_path, "a.txt", "A/B\n A / B \nC\nD//E\n"))
    assert found.paths == ("A/B", "C", "D/E")
    assert str(found) == "3 topics (1 of depth 1, 2 of depth 2); 1 duplicates left out"


@pytest.mark.parametrize("packed", (False, True))
def test_the_dump_of_a_web_directory_is_read_without_its_root_and_other_languages(packed, tmp_path):
    path = tmp_path / ("structure.rdf.u8.gz" if packed else "structure.rdf.u8")
    path.write_bytes(gzip.compress(RDF.encode()) if packed else RDF.encode())
    assert topics.load_topics(str(path)).paths == ("Arts", "Arts/Movies/Film Noir", "Science")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.rdf", RDF[:400], "a.rdf: the dump ends or breaks before its last element .*; fetch it again"),
        ("a.rdf.gz", RDF, "a.rdf.gz: the dump ends or breaks"),
        ("a.csv", "id,path\n1,A", r"no column 'topic' among \['id', 'path'\]"),
        ("a.jsonl", '{"topic": "A"}\n{"path": "B"}', "line 2 is no object with a text under"),
        ("a.jsonl", '{"topic": "A"}\n["B"]', "line 2 is no object"),
        ("a.jsonl", '{"topic": "A"}\n{"topic": "B \\ud83d"}', "line 2 is no object"),
        ("a.txt", "A\nA\n", "1 topics; give at least two"),
        ("a.txt", "", "0 topics"),
    ],
)
def test_a_file_that_will_not_do_is_refused_in_one_line(name, text, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as error:
        topics.load_topics(write(tmp_path, name, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match="topics.file 'mine.txt': no such file"):
        topics.load_topics("mine.txt")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A smoke run over twenty topics of one's own, two of which are truncated to the same name."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    paths = [f"Bees/Keeping/{i}" for i in range(18)] + ["A/B/x/C/D", "A/B/y/C/D", "Honey", "Wax"]
    values = {"topics.file": write(tmp_path, "bees.txt", "\n".join(paths)), "topics.count": 0, "topics.held_out": 2}
    return open_run("smoke", values)


def test_the_last_topics_are_held_out_and_names_are_distinct(run):
    data, held_out = generation_stages.topics(run)
    assert len(data) == 19 and held_out == ["Honey", "Wax"] and "A/B/y/C/D" not in data


def test_without_an_endpoint_a_topic_of_ones_own_gets_tasks_from_a_template(run):
    made = generation_stages.brainstorm(run)
    assert made.manifest["outcomes"]["ok"] == len(generation_stages.brainstorm_prompts(run))
    table = generation_stages.task_table(made)
    assert all("Honey" in task for task in table["retrieval", "Honey"]) and len(table["retrieval", "Honey"]) == 3
    planned = generation_stages.plan(run, "raw", 40)
    assert {p.topic for p in planned} <= set(generation_stages.names(run, generation_stages.topics(run)[0]))
    seeds = generation_stages.seed_plan(run)
    assert {p.topic for p in seeds} <= {prompts.truncate_topic(t) for t in topics.load_topics().paths}, (
        "recorded answers are of these"
    )


def test_a_recorded_prompt_keeps_its_recorded_answer_and_another_one_is_still_an_error():
    t = teacher.RecordedTeacher()
    (first, *_) = tasks.plan_brainstorm(topics.load_topics().paths)
    assert json.loads(t.submit(first, "brainstorm").result().text)[0] != topics.template_tasks(first.kind, first.topic)[0]
    (strange, *_) = tasks.plan_brainstorm(topics.load_topics().paths[:1], tasks_per_topic=9)
    with pytest.raises(teacher.Unrecorded):
        t.submit(strange, "brainstorm").result()


def test_a_larger_profile_gets_recorded_seed_examples_on_four_times_as_many_topics(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    small, large = (generation_stages.seed_plan(open_run("smoke", {"seeds": n})) for n in (322, 2000))
    known = {r["prompt_digest"] for r in teacher.recorded_rows("seeds")}
    assert {q.digest for q in (*small, *large)} <= known and len(large) == 2000
    assert len({q.topic for q in small}) == 60 and len({q.topic for q in large}) == 240
    with pytest.raises(UserError, match="seeds 3000: the recorded teacher has 2060"):
        generation_stages.seed_plan(open_run("smoke", {"seeds": 3000}))


def test_too_many_records_for_the_topics_are_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    with pytest.raises(UserError, match=r"topics: 60 to write 1,150,000 records about.* at least 1,150 in topics.file"):
        generation_stages.brainstorm(open_run("smoke", {"topics.count": 72, "topics.held_out": 12, "synthesis.count": 1150000}))


def test_one_topic_is_too_few_for_every_kind_of_record(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    values = {"topics.file": write(tmp_path, "two.txt", "A\nB\n"), "topics.count": 0, "topics.held_out": 1}
    with pytest.raises(UserError, match="topics: 1 to write about, too few for every kind of record"):
        generation_stages.brainstorm(open_run("smoke", values))
    three = values | {"topics.file": write(tmp_path, "three.txt", "A\nB\nC\n")}
    run = open_run("smoke", three)
    generation_stages.brainstorm(run)
    assert {p.kind for p in generation_stages.plan(run, "raw", 40)} == set(records.KINDS)


def test_the_plan_of_the_papers_size_says_that_it_needs_topics_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    assert "topics: 60 to write 1,150,000 records about" in preflight.plan_text("paper")
    assert "would repeat one another" not in preflight.plan_text("smoke")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"topics.count": 253}, "topics.count 253: the list has 252"),
        ({"topics.count": 4, "topics.held_out": 4}, "topics.held_out 4: leaves none of 4 topics"),
    ],
)
def test_counts_that_the_list_cannot_give_are_refused(values, complaint, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    with pytest.raises(UserError, match=complaint):
        generation_stages.topics(open_run("smoke", values))


def test_a_profile_finds_the_topics_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    write(tmp_path, "bees.txt", "A\nB\nC\n")
    values = {"extends": "own-domain", "name": "bees", "topics": {"file": "bees.txt", "held_out": 1}}
    run = open_run(write(tmp_path, "mine.json", json.dumps(values)))
    assert generation_stages.topics(run) == (["A", "B"], ["C"])

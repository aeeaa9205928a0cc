"""Notebooks 01 to 05: the teacher's data and the three generators.

Each stage is declared once (`stage.stage`) with everything that decides its result; the store makes it again only when one of
these things changed, and says which.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from speed_core import console
from speed_core.data import asking, curate, prompts, records, tasks, teacher
from speed_core.data.prompts import Prompt
from speed_core.data.topics import RECORDS_PER_TOPIC, load_topics
from speed_core.files import Lazy, UserError, write_json, write_jsonl
from speed_core.generation import generate, sft
from speed_core.models import compute_type, launch, loading
from speed_core.preference import judge
from speed_core.preference import pairs as preference_pairs
from speed_core.profile import Profile, Training
from speed_core.store.artifacts import Artifact, Draft, OtherPrompts
from speed_core.store.run_context import Run
from speed_core.study.generator_answers import Ask, generated
from speed_core.study.stage import Instances, Kind, each, stage

RECORDED_PLANS = ((60, 322), (240, 2060))  # (topics, seed prompts) that recorded answers were written for
RUBRIC_GUIDE = "package:all-MiniLM-L6-v2"  # of the recorded runs; with another one the pairs are others


def topics(run: Run) -> tuple[list[str], list[str]]:
    """(topics for data, held-out topics), as paths; the last `held_out` of the list never give data."""
    t = run.profile.topics
    paths = _paths(run)
    count = t.count or len(paths)
    if count > len(paths):
        raise UserError(f"topics.count {count}: the list has {len(paths)}; lower it or add topics")
    if t.held_out >= count:
        raise UserError(f"topics.held_out {t.held_out}: leaves none of {count} topics to write about; lower it or add topics")
    return paths[: count - t.held_out], paths[-t.held_out :]


def _paths(run: Run) -> list[str]:
    """The paths of the list; of several that are truncated to the same name, the first."""
    paths, first = load_topics(run.profile.topics.file).paths, dict[str, str]()
    for name, path in zip(names(run, paths), paths, strict=True):
        first.setdefault(name, path)
    return list(first.values())


def few_topics(run: Run) -> str:
    """What is wrong with so many records about so few topics; empty when nothing is."""
    wanted, given = run.profile.synthesis.count, len(topics(run)[0])
    if given < 2:
        return f"topics: {given} to write about, too few for every kind of record; name at least two, and those held out, in topics.file"
    if wanted <= RECORDS_PER_TOPIC * given:
        return ""
    return (
        f"topics: {given} to write {wanted:,} records about, which would repeat one another; "
        f"name a list of at least {-(-wanted // RECORDS_PER_TOPIC):,} in topics.file, or lower synthesis.count"
    )


def names(run: Run, paths: Sequence[str]) -> list[str]:
    """Topic names as the prompts use them: truncated unless the profile says otherwise."""
    t = run.profile.topics
    return [prompts.truncate_topic(p, t.max_depth) if t.truncate else p for p in paths]


# --- 01, 02: the teacher -------------------------------------------------------------------------


def brainstorm_prompts(run: Run) -> list[Prompt]:
    """Brainstorm prompts of the data topics and the held-out ones."""
    data, held_out = topics(run)
    p, t = run.profile.prompts, run.profile.topics
    how = t.model_dump(include={"max_depth", "truncate", "tasks_per_topic"})
    planned = tasks.plan_brainstorm(_paths(run), **how, style=p.style, clone=p.clone)
    wanted = set(names(run, [*data, *held_out]))
    return [q for q in planned if q.topic in wanted]


def _ask_teacher(run: Run, draft: Draft, name: str, purpose: str, planned: Sequence[Prompt], **how: Any) -> None:
    """Fill a draft with the teacher's answers to `planned`; the log and the artifact have one name."""
    who = run.profile.teacher
    t = teacher.open_teacher(who, run.replay)
    entries = asking.ask(t, planned, purpose=purpose, log=run.log(name), attempts=who.attempts, **how)
    write_jsonl(draft.file("data.jsonl"), entries)
    write_json(draft.file("ledger.json"), asking.spent(run.log(name), planned, purpose, who))
    draft.info |= {"teacher": t.label, "outcomes": generate.counts(entries), "partial": asking.unanswered(entries)}


def _asked(run: Run, planned: Sequence[Prompt]) -> dict[str, Any]:
    return {"prompts": prompts.text_digest("".join(q.digest for q in planned)), "teacher": run.profile.teacher.cache_key_fields()}


@stage("tasks", Kind.TEACHER, "01", parameters=lambda run: _asked(run, brainstorm_prompts(run)))
def brainstorm(run: Run, draft: Draft) -> None:
    """The teacher's answers to the brainstorm prompts."""
    if few := few_topics(run):
        raise UserError(few)
    _ask_teacher(run, draft, "tasks", "brainstorm", brainstorm_prompts(run), parse=asking.parse_tasks)


def task_table(artifact: Artifact) -> dict[tuple[str, str], list[str]]:
    """(kind, topic) -> tasks, of every readable brainstorm answer."""
    table = {}
    for e in artifact.rows():
        found, why = records.parse_string_list(e["raw"], e["finish_reason"])
        if not why:
            table[e["kind"], e["topic"]] = found
    return table


def plan(run: Run, purpose: str, count: int, *, held_out: bool = False) -> Lazy[Prompt]:
    """Synthesis prompts for a purpose, from the data topics (or the held-out ones)."""
    p = run.profile
    how = p.prompts.model_dump() | {"tasks_per_topic": p.topics.tasks_per_topic, "data_seed": p.data_seed}
    about, table = names(run, topics(run)[1 if held_out else 0]), task_table(run.store.need("tasks"))
    return tasks.plan_synthesis(purpose, count, about, table, **how)


def seed_plan(run: Run) -> Lazy[Prompt]:
    """Prompts of the seed data.

    Recorded answers exist for the plans of `RECORDED_PLANS`, whose topics are truncated; a smaller profile takes the first prompts of
    the smallest plan that has enough (they are in order of record id, so any prefix mixes the kinds).
    """
    if run.profile.teacher.kind != "recorded":
        return plan(run, "seed", run.profile.seeds)
    table = {(r["kind"], r["topic"]): json.loads(r["answer"]) for r in teacher.recorded_rows("tasks")}
    large_enough = (plan for plan in RECORDED_PLANS if run.profile.seeds <= plan[1])
    topics_, count = next(large_enough, RECORDED_PLANS[-1])
    if run.profile.seeds > count:
        raise UserError(f"seeds {run.profile.seeds}: the recorded teacher has {count}; lower it or use an endpoint")
    known = [prompts.truncate_topic(path) for path in load_topics().paths[:topics_]]
    full = tasks.plan_synthesis("seed", count, known, table, attributes=run.profile.prompts.attributes)
    return full[: run.profile.seeds]


@stage("seeds", Kind.TEACHER, "02", inputs=["tasks"], parameters=lambda run, tasks: _asked(run, seed_plan(run)))
def seed_data(run: Run, draft: Draft, tasks: Artifact) -> None:
    """The teacher's examples, one outcome per prompt."""
    _ask_teacher(run, draft, "seeds", "seed", seed_plan(run))


def teacher_records(run: Run) -> list[dict[str, Any]]:
    """The teacher's examples as records, in the order of their ids, which mixes the kinds."""
    by_id = {q.id: q for q in seed_plan(run)}
    found = [(e, generate.outcome_of(e).record) for e in run.store.need("seeds").rows()]
    return [curate.make_record(by_id[e["record"]], r, source="teacher", parent=None, seed=0) for e, r in found if r]


def guide(run: Run) -> Any:
    """The guide model (a SentenceTransformer)."""
    console.quiet()
    return loading.sentence_transformer(run.profile.models.guide, "float32")


def rubric(run: Run, entries: Sequence[dict[str, Any]] = (), planned: Sequence[Prompt] = ()) -> judge.RubricJudge:
    """The rubric judge, with the texts of `entries` embedded in one pass."""
    j = judge.RubricJudge(guide(run))
    by_id = {q.id: q for q in planned}
    j.precompute_embeddings((e["raw"], by_id[e["record"].partition("#")[0]]) for e in entries)
    return j


# --- 03 to 05: the three generators ---------------------------------------------------------------


def unseen(run: Run) -> Lazy[Prompt]:
    """Prompts on held-out topics, for comparing generators."""
    return plan(run, "evaluation", run.profile.synthesis.evaluation_prompts, held_out=True)


def _evaluations(run: Run) -> Instances:
    yield from each("03", generator=("base", "junior"))
    yield from each("04", generator=("senior",))


@generated("eval-{generator}", _evaluations, "{generator}", work=lambda p, generator: p.synthesis.evaluation_prompts)
def evaluation(run: Run, generator: str) -> Ask:
    """Answers to the unseen prompts, without a grammar: with one even an untrained model writes valid JSON."""
    return Ask(unseen(run), constrained=False)


def _trained(run: Run, settings: Training) -> dict[str, Any]:
    return {
        "training": settings.cache_key_fields(),
        "seed": run.profile.seed,
        "base": loading.model_id(run.profile.models.generator),
    }


def train(run: Run, function: Callable[..., Any], name: str, **arguments: Any) -> None:
    """Call a training function with the run's seed, in as many processes as `training` says (`launch.train`)."""
    given = {"seed": run.profile.seed, "cache": run.folder / "checkpoints"} | arguments
    launch.train(function, run.profile.training, run.folder / "workers" / name, **given)


def _train_generator(run: Run, draft: Draft, function: Callable[..., Any], name: str, **arguments: Any) -> None:
    """Fill a draft with a LoRA adapter of the base model, trained as the profile's section `name` says."""
    base, settings = run.profile.models.generator, getattr(run.profile, name)
    kind = compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base))
    draft.info |= compute_type.facts(kind.name)
    train(run, function, name, base=base, settings=settings, output=draft.path, **arguments)


def _steps(p: Profile, name: str) -> float:
    settings = getattr(p, name)
    examples = min(settings.examples, p.senior.prompts) if name == "senior" else settings.examples
    return examples * settings.epochs


@stage(
    "junior",
    Kind.GENERATOR,
    "03",
    inputs=["seeds"],
    parameters=lambda run, seeds: _trained(run, run.profile.junior),
    work=lambda p: _steps(p, "junior"),
)
def junior(run: Run, draft: Draft, seeds: Artifact) -> None:
    """LoRA adapter of the base, trained on the seeds (Eq. 1)."""
    text = {q.id: q.text for q in seed_plan(run)}
    pairs = [(text[e["record"]], generate.text_of(e)) for e in seeds.rows() if e["status"] == "ok" and e["record"] in text]
    _train_generator(run, draft, sft.train, "junior", pairs=pairs, label="junior")


def root_prompts(run: Run) -> Lazy[Prompt]:
    """Prompts of the root data, from which the preference pairs come."""
    return plan(run, "root", run.profile.senior.prompts)


@generated("root", "04", "junior", work=lambda p: p.senior.prompts * p.senior.candidates)
def root(run: Run) -> Ask:
    """Several candidates of the junior for each root prompt."""
    return Ask(root_prompts(run), candidates=run.profile.senior.candidates)


def _judge(run: Run, root: Artifact) -> dict[str, Any]:
    who = run.profile.teacher
    by: dict[str, Any] = {"weights": judge.RubricJudge.WEIGHTS} if who.judge == "rubric" else {"teacher": who.cache_key_fields()}
    if who.judge == "rubric" and run.profile.models.guide != RUBRIC_GUIDE:
        by["guide"] = loading.named(run.profile.models.guide)
    return {"judge": who.judge, **by}


@stage("pairs", Kind.PAIRS, "04", inputs=["root"], parameters=_judge)
def preferences(run: Run, draft: Draft, root: Artifact) -> None:
    """Best and worst of each prompt's candidates, with the judge's reason."""
    who, planned, entries = run.profile.teacher, root_prompts(run), root.rows()
    groups: dict[str, list[dict[str, Any]]] = {}
    for e in entries:
        groups.setdefault(e["record"].partition("#")[0], []).append(e)
    items = [(q, groups[q.id]) for q in planned if q.id in groups]
    if who.judge == "llm":
        decide: Any = judge.LlmJudge(teacher.open_teacher(who, run.replay), run.log("judge"), who.judge_temperature)
        questions = [(q, [records.own_text(e["raw"], q.kind) for e in group]) for q, group in items]
        draft.info["partial"] = decide.ask(questions)
        write_json(draft.file("ledger.json"), asking.spent(run.log("judge"), decide.questions(questions), "judge", who))
    else:
        decide = rubric(run, entries, planned)
    pairs, count = preference_pairs.make_pairs(decide, items)
    write_jsonl(draft.file("data.jsonl"), pairs)
    write_json(draft.file("counts.json"), count)
    draft.info |= {"judge": decide.label, "counts": count, "audit": getattr(decide, "audit", {})}


@stage(
    "senior",
    Kind.GENERATOR,
    "04",
    inputs=["junior", "pairs"],
    parameters=lambda run, junior, pairs: _trained(run, run.profile.senior),
    work=lambda p: _steps(p, "senior"),
)
def senior(run: Run, draft: Draft, junior: Artifact, pairs: Artifact) -> None:
    """DPO from the junior (Eq. 2)."""
    from speed_core.preference import dpo

    read = {"junior": junior.weights(), "pairs": pairs.rows()}
    _train_generator(run, draft, dpo.train, "senior", **read, cache=run.folder / "dpo")


def _weak_samples(run: Run) -> dict[str, tuple[Prompt, str]]:
    """{record: (prompt, first valid candidate)} of the root data, as many as the teacher is to revise."""
    first: dict[str, dict[str, Any]] = {}
    for e in run.store.need("root").rows():
        if e["status"] == "ok":
            record = e["record"].split("#")[0]
            first.setdefault(record, e | {"record": record})
    used = list(first.values())[: run.profile.revisor.examples]
    return {e["record"]: (q, generate.text_of(e)) for e, q in with_prompts(used, root_prompts(run))}


def _with_endpoint(run: Run) -> Instances:
    return [] if run.profile.teacher.kind == "recorded" else [("05", {})]


@stage(
    "revisions",
    Kind.TEACHER,
    _with_endpoint,
    inputs=["root"],
    parameters=lambda run, root: {"teacher": run.profile.teacher.cache_key_fields(), "count": run.profile.revisor.examples},
)
def revisions(run: Run, draft: Draft, root: Artifact) -> None:
    """The first valid candidate of each root prompt, revised by the teacher (SPEED section 3.2.4)."""
    weak = _weak_samples(run).items()
    items = [dataclasses.replace(q, id=f"{rid}/revise", text=prompts.revise(q.text, text)) for rid, (q, text) in weak]
    _ask_teacher(run, draft, "revisions", "revise", items)


def revision_rows(run: Run) -> list[dict[str, Any]]:
    """Rows {kind, task, prompt, weak, answer}: what the revisor learns from.

    Recorded: weak samples drawn once from an early junior, rewritten by this repository's authors. With an endpoint: artifact
    `revisions`, which has to be there.
    """
    if run.profile.teacher.kind == "recorded":
        return [dict(r) for r in teacher.recorded_rows("revisions")][: run.profile.revisor.examples]
    answers = {e["record"].removesuffix("/revise"): e for e in run.store.need("revisions").rows()}
    return [
        {"kind": e["kind"], "task": e["task"], "prompt": q.text, "weak": weak, "answer": generate.text_of(e)}
        for rid, (q, weak) in _weak_samples(run).items()
        if (e := answers.get(rid)) and e["status"] == "ok"
    ]


def _revision_pairs(run: Run) -> list[tuple[str, str]]:
    if not (rows := revision_rows(run)):
        raise UserError(
            "revisions: none; restore assets/recorded/revisions.jsonl, or let notebook 04 write root data for the endpoint"
        )
    return [(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in rows]


@stage(
    "revisor",
    Kind.GENERATOR,
    "05",
    inputs=lambda run: ["revisions"] if _with_endpoint(run) else [],
    parameters=lambda run, *revisions: (
        _trained(run, run.profile.revisor) | {"data": prompts.text_digest("".join(a + b for a, b in _revision_pairs(run)))}
    ),
    work=lambda p: _steps(p, "revisor"),
)
def revisor(run: Run, draft: Draft, *revisions: Artifact) -> None:
    """SFT from the unaligned base on (prompt, weak sample) -> revision (Eq. 3)."""
    _train_generator(run, draft, sft.train, "revisor", pairs=_revision_pairs(run), label="revisor")


def revision_of(raw: Artifact, planned: Sequence[Prompt]) -> Ask:
    """One revision of every valid record of `raw` (one pass, as in the paper)."""
    good = with_prompts(raw.stored().where(lambda e: e["status"] == "ok"), planned)

    def revision(n: int) -> Prompt:
        e, q = good[n]
        return dataclasses.replace(q, text=prompts.revise(q.text, generate.text_of(e)))

    return Ask(Lazy(revision, range(len(good))))


@generated("revised-eval", "05", "revisor", inputs=["eval-junior"], work=lambda p: p.synthesis.evaluation_prompts)
def revised_evaluation(run: Run, raw: Artifact) -> Ask:
    """The junior's answers to the unseen prompts, revised."""
    return revision_of(raw, unseen(run))


@generated("revised-twice", "05", "revisor", inputs=["revised-eval"], work=lambda p: p.synthesis.evaluation_prompts)
def revised_twice(run: Run, raw: Artifact) -> Ask:
    """The same, revised once more."""
    return revision_of(raw, unseen(run))


def with_prompts(entries: Sequence[dict[str, Any]], planned: Sequence[Prompt]) -> Lazy[tuple[dict[str, Any], Prompt]]:
    """Each outcome with the prompt that it answers. Raises OtherPrompts where this run has no such prompt."""
    place = {q.id: i for i, q in enumerate(planned)}
    try:
        at = array("q", (place[e["record"]] for e in entries))
    except KeyError as error:
        raise OtherPrompts(
            f"record {error}: answers a prompt that this run does not have; run the notebooks before again"
        ) from None
    return Lazy(lambda i: (entries[i], planned[at[i]]), range(len(at)))

"""Notebooks 01 to 06: the teacher's data, the three generators, the synthesis.

Each stage is declared once (`stage.stage`) with everything that decides its result; the store makes it again only when one of
these things changed, and says which.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from speed_core import console
from speed_core.data import asking, curate, prompts, records, tasks, teacher
from speed_core.data.prompts import Prompt
from speed_core.data.topics import RECORDS_PER_TOPIC, load_topics
from speed_core.files import Lazy, UserError, spooled, write_json, write_jsonl
from speed_core.generation import generate, sft
from speed_core.models import compute_type, launch, loading, training
from speed_core.preference import judge
from speed_core.preference import pairs as preference_pairs
from speed_core.profile import Profile, Training, dotted
from speed_core.store.artifacts import Artifact, Draft, OtherPrompts
from speed_core.store.run_context import Run
from speed_core.study.stage import Instances, Kind, Stage, each, stage

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
    p, t = run.profile.prompts, run.profile.topics
    return tasks.plan_synthesis(
        purpose,
        count,
        names(run, topics(run)[1 if held_out else 0]),
        task_table(run.store.need("tasks")),
        tasks_per_topic=t.tasks_per_topic,
        attributes=p.attributes,
        data_seed=run.profile.data_seed,
        style=p.style,
        clone=p.clone,
    )


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


# --- what a generator is asked --------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Prompts for a generator: `candidates` answers to each, with ids "RECORD#k" and a seed each where there are several.

    constrained: whether a grammar holds the answers to the form; the profile says it where this is None.
    """

    planned: Sequence[Prompt]
    candidates: int = 1
    constrained: bool | None = None

    def requests(self, run: Run) -> Lazy[generate.Request]:
        def request(n: int) -> generate.Request:
            q, k = self.planned[n // self.candidates], n % self.candidates
            rid = f"{q.id}#{k}" if self.candidates > 1 else q.id
            seed = int(prompts.text_digest(f"{rid}|{run.profile.seed}")[:8], 16) & 0x7FFFFFFF
            return generate.Request(rid, training.prompt_text(q.text), q.kind, seed)

        return Lazy(request, range(len(self.planned) * self.candidates))

    def decoding(self, run: Run) -> generate.Decoding:
        g = run.profile.generation
        constrained = g.constrained if self.constrained is None else self.constrained
        return generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, constrained)

    def parameters(self, run: Run, generator: str) -> dict[str, Any]:
        g, asked = run.profile.generation, hashlib.sha256()
        for r in self.requests(run):
            asked.update((r.id + r.text).encode())
        return {
            "prompts": asked.hexdigest(),
            "decoding": dataclasses.asdict(self.decoding(run)),
            "generator": generator,
            "seed": run.profile.seed,
            "dtype": _dtype(run),
        } | ({"attempts": g.attempts} if g.attempts > 1 else {})

    def write(self, run: Run, draft: Draft, name: str, generator: str) -> None:
        """Fill a draft with one outcome a request; the log and the artifact have one name."""
        g, requests, decoding = run.profile.generation, self.requests(run), self.decoding(run)
        if run.replay:
            entries: Sequence[dict[str, Any]] = generate.replay(requests, run.log(name), decoding, g.attempts, _dtype(run))
        else:
            entries = _generate(run, requests, generator, decoding, name)
            if g.engine != "server" and g.executor == "process":  # others know best what they compute in
                folder = loading.resolve(run.profile.models.generator)
                draft.info |= compute_type.facts(compute_type.choose(_dtype(run), folder=folder).name)
        write_jsonl(draft.file("data.jsonl"), entries)
        draft.info |= {"outcomes": generate.counts(entries), "new_tokens": sum(e["new_tokens"] for e in entries)}


def _dtype(run: Run) -> str:
    g = run.profile.generation
    return "auto" if g.engine == "server" else g.dtype  # a server computes in its own


def generated(
    name: str,
    made: str | Callable[[Run], Instances],
    generator: str,
    *,
    inputs: Sequence[str] = (),
    work: Callable[..., float],
) -> Callable[[Callable[..., Ask]], Stage]:
    """Declare a stage of answers of `generator` ("base", "junior", "senior", "revisor", or a key in braces); the decorated function
    says what is asked: (run, *inputs, **keys) -> Ask."""

    def declare(ask: Callable[..., Ask]) -> Stage:
        def parameters(run: Run, *read: Artifact, **keys: Any) -> dict[str, Any]:
            return ask(run, *read, **keys).parameters(run, generator.format(**keys))

        def write(run: Run, draft: Draft, *read: Artifact, **keys: Any) -> None:
            ask(run, *read, **keys).write(run, draft, name.format(**keys), generator.format(**keys))

        def uses(run: Run, **keys: Any) -> list[str]:
            return [g for g in [generator.format(**keys)] if g != "base"]

        return stage(name, Kind.GENERATED, made, parameters=parameters, inputs=inputs, uses=uses, work=work)(write)

    return declare


def sample(run: Run, name: str, planned: Sequence[Prompt], generator: str, **how: Any) -> Artifact:
    """Artifact `name`, which no notebook has: outcomes of `generator` on prompts. `how` as in `Ask`."""
    ask, used = Ask(planned, **how), [a for a in [run.store.get(generator)] if a]
    with run.store.stage(name, ask.parameters(run, generator), used) as draft:
        if draft:
            ask.write(run, draft, name, generator)
    return run.store.need(name)


def _generate(
    run: Run, requests: Sequence[generate.Request], generator: str, decoding: generate.Decoding, name: str
) -> Sequence[dict[str, Any]]:
    """Answer requests with the engine of the profile; the log is the artifact's name."""
    g, base = run.profile.generation, run.profile.models.generator
    common: dict[str, Any] = {"log": run.log(name), "decoding": decoding, "label": name, "attempts": g.attempts}
    if g.engine == "server":
        from speed_core.generation.server_engine import ServerEngine

        # The server holds the weights; an adapter that was made here is named by its digest all the same.
        made = run.store.get(generator) if generator != "base" else None
        model_id = f"server:{base}{loading.settings_id(base)}+{loading.weights_id(made.weights()) if made else generator}"
        served = ServerEngine(g.base_url, base if generator == "base" else generator, base, concurrency=g.concurrency)
        try:
            return generate.generate_all(requests, model=base, model_id=model_id, engine=served, **common)
        finally:
            served.close()
    base, adapter = generator_weights(run, generator)
    workers = g.workers if g.executor == "ray" else 0
    options = generate.EngineOptions(g.engine, g.dtype, g.max_length, g.batch_size, workers, g.ray_address)
    return generate.generate_all(requests, model=base, adapter=adapter, engine=options, **common)


def generator_weights(run: Run, generator: str) -> tuple[str, Any]:
    """(base name or folder, adapter folder or None) of one of the four generators."""
    base = run.profile.models.generator
    if generator == "base":
        return base, None
    adapter = run.store.need(generator).weights()
    if generator == "senior":
        from speed_core.preference import dpo

        return dpo.reference_model_path(base, run.store.need("junior").weights()), adapter
    return base, adapter


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


def _computed(run: Run, settings: Training) -> dict[str, str]:
    folder = loading.resolve(run.profile.models.generator)
    return compute_type.facts(compute_type.choose(settings.dtype, training=True, folder=folder).name)


def train(run: Run, function: Callable[..., Any], name: str, **arguments: Any) -> None:
    """Call a training function with the run's seed, in as many processes as `training` says (`launch.train`)."""
    given = {"seed": run.profile.seed, "cache": run.folder / "checkpoints"} | arguments
    launch.train(function, run.profile.training, run.folder / "workers" / name, **given)


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
    settings = run.profile.junior
    draft.info |= _computed(run, settings)
    text = {q.id: q.text for q in seed_plan(run)}
    pairs = [(text[e["record"]], generate.text_of(e)) for e in seeds.rows() if e["status"] == "ok" and e["record"] in text]
    train(
        run,
        sft.train,
        "junior",
        base=run.profile.models.generator,
        pairs=pairs,
        settings=settings,
        output=draft.path,
        label="junior",
    )


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

    settings = run.profile.senior
    draft.info |= _computed(run, settings)
    base, cache = run.profile.models.generator, run.folder / "dpo"
    read = {"junior": junior.weights(), "pairs": pairs.rows()}
    train(run, dpo.train, "senior", base=base, **read, settings=settings, output=draft.path, cache=cache)


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
    items = [
        dataclasses.replace(q, id=f"{rid}/revise", text=prompts.revise(q.text, text))
        for rid, (q, text) in _weak_samples(run).items()
    ]
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
    base, settings = run.profile.models.generator, run.profile.revisor
    draft.info |= _computed(run, settings)
    train(run, sft.train, "revisor", base=base, pairs=_revision_pairs(run), settings=settings, output=draft.path, label="revisor")


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


# --- 06: synthesis --------------------------------------------------------------------------------


def synthesis_prompts(run: Run) -> Lazy[Prompt]:
    """Prompts of the large-scale synthesis."""
    return plan(run, "synthesis", run.profile.synthesis.count)


@generated("raw", "06", "senior", work=lambda p: p.synthesis.count)
def raw(run: Run) -> Ask:
    """One sample of the senior for each synthesis prompt."""
    return Ask(synthesis_prompts(run))


@generated("revised", "06", "revisor", inputs=["raw"], work=lambda p: p.synthesis.count)
def revised(run: Run, raw: Artifact) -> Ask:
    """One revision of each valid sample."""
    return revision_of(raw, synthesis_prompts(run))


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


def to_records(run: Run, entries: Sequence[dict[str, Any]], planned: Sequence[Prompt], source: str) -> Lazy[dict[str, Any]]:
    """Records of the valid outcomes."""
    return spooled(
        curate.make_record(q, found, source=source, parent=e["id"] if source == "revised" else None, seed=e["seed"])
        for e, q in with_prompts(entries, planned)
        if (found := generate.outcome_of(e).record)
    )


def revised_records(run: Run, raw: Artifact, revised: Artifact, planned: Sequence[Prompt], source: str) -> Lazy[dict[str, Any]]:
    """Revised records; where the revision is no valid record the raw one stays, so nothing is lost to revision."""
    better = to_records(run, revised.stored(), planned, "revised")
    place = {r["id"]: i for i, r in enumerate(better)}
    return spooled(better[place[r["id"]]] if r["id"] in place else r for r in to_records(run, raw.stored(), planned, source))


def teacher_records(run: Run) -> list[dict[str, Any]]:
    """The teacher's examples as records, in the order of their ids, which mixes the kinds."""
    by_id = {q.id: q for q in seed_plan(run)}
    found = [(e, generate.outcome_of(e).record) for e in run.store.need("seeds").rows()]
    return [curate.make_record(by_id[e["record"]], r, source="teacher", parent=None, seed=0) for e, r in found if r]


def curated(run: Run, *read: Artifact, **keys: Any) -> dict[str, Any]:
    """Parameters of a data set."""
    return {"curate": dotted(run.profile.curate), "size": run.profile.evaluation.size}


def write_dataset(run: Run, draft: Draft, name: str, rows: Sequence[dict[str, Any]], how: str) -> None:
    """Fill a draft with curated records as a folder that `datasets.load_dataset` opens, plus what was dropped."""
    from speed_core.evaluation.offline_tasks import offline_texts

    texts = offline_texts(run.profile.evaluation.size) if "offline" in run.profile.evaluation.tasks else {}
    kept, dropped = curate.curate(rows, run.profile.curate, texts)
    curate.write_dataset(draft.path, kept, title=f"Synthetic embedding data, {name} ({run.profile.name})", how=how)
    write_jsonl(draft.file("dropped.jsonl"), dropped)
    draft.info |= {"kept": len(kept), "dropped": len(dropped)}


@stage("synthetic", Kind.DATA, "06", inputs=["raw", "revised"], parameters=curated)
def synthetic(run: Run, draft: Draft, raw: Artifact, revised: Artifact) -> None:
    """The data set of the paper's recipe: samples of the senior, revised, curated."""
    how = "Written by the senior generator and revised once, as in SPEED; see notebook 06."
    write_dataset(run, draft, "synthetic", revised_records(run, raw, revised, synthesis_prompts(run), "senior"), how)


# --- Table 5 -----------------------------------------------------------------------------------------


def teacher_use(run: Run) -> dict[str, dict[str, int]]:
    """Table 5 of this run: {brainstorm, seed, preference, revision: {calls, input, output}}, the last two in tokens.

    An endpoint's own counts. Recorded answers have none: theirs are those of the generator's tokenizer. A rubric asks nobody.
    """
    asked = {"brainstorm": "tasks", "seed": "seeds", "preference": "pairs", "revision": "revisions"}
    if run.profile.teacher.kind != "recorded":
        out = {}
        for purpose, name in asked.items():
            a = run.store.get(name)
            if a and name == "pairs" and run.profile.teacher.judge == "llm" and "ledger.json" not in a.manifest["files"]:
                raise UserError(
                    "pairs: made before its calls were counted; remove its folder and run notebook 04 again (from its log)"
                )
            rows = a.json("ledger.json").values() if a and "ledger.json" in a.manifest["files"] else ()
            counted = (("calls", "calls"), ("input", "input_tokens"), ("output", "output_tokens"))
            out[purpose] = {k: sum(int(r[key]) for r in rows) for k, key in counted}
        return out
    texts: dict[str, list[tuple[str, str]]] = {"preference": []}
    for purpose, planned in (("brainstorm", brainstorm_prompts(run)), ("seed", seed_plan(run))):
        text = {q.id: q.text for q in planned}
        rows = [e for e in run.store.need(asked[purpose]).rows() if e["status"] != "error" and e["record"] in text]
        texts[purpose] = [(text[e["record"]], e["raw"]) for e in rows]
    texts["revision"] = [(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in revision_rows(run)]
    tokenizer = loading.load_tokenizer(run.profile.models.generator)

    def tokens(column: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(column), add_special_tokens=False)["input_ids"])) if column else 0

    return {
        p: {"calls": len(texts[p])} | {k: tokens([pair[i] for pair in texts[p]]) for i, k in enumerate(("input", "output"))}
        for p in asked
    }

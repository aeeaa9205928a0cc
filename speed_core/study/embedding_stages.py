"""Notebooks 07b to 11: embedding models trained on the data sets that are compared, and their scores.

Stages like those of `generation_stages`, whose data sets they read. Each compared model is trained once for every seed of
`training_seeds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from speed_core.data import prompts
from speed_core.data.prompts import Prompt
from speed_core.files import Lazy, digest, write_json
from speed_core.models import compute_type, loading
from speed_core.profile import Embedding, Profile
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.stage import Instances, Kind, Stage, each, find, stage


class Arm(StrEnum):
    """The data sets that notebook 10 compares: of junior and senior, as written and revised; of the untrained base; the teacher's."""

    JR = "jr"
    JR_RE = "jr_re"
    SR = "sr"
    SR_RE = "sr_re"
    BASE = "base"
    TEACHER = "teacher"


class StudentArm(StrEnum):
    """How a student learns: with which mask, else (`guided`) on which data."""

    GUIDED = "guided"
    PLAIN = "plain"  # no mask
    WEAK = "weak"  # the mask of a guide of two layers
    MARGIN = "margin"  # the mask with a margin of 0.05
    LABELLED = "labelled"  # equally many pairs that people labelled (`offline_tasks.labelled_pairs`)
    BOTH = "both"  # labelled pairs and the teacher's records
    UNCOVERED = "uncovered"  # the teacher's records without a topic
    COVERED = "covered"  # equally many, with it (`topic_records`)
    MIXED_SR_RE = "mixed_sr_re"  # labelled pairs and records of a data set of notebook 10 (S2)
    MIXED_TEACHER = "mixed_teacher"


TABLE2 = (Arm.JR, Arm.JR_RE, Arm.SR, Arm.SR_RE)
ARMS = tuple(Arm)
MIXED = {StudentArm.MIXED_SR_RE: Arm.SR_RE, StudentArm.MIXED_TEACHER: Arm.TEACHER}
WHOLE = 0  # layers of a student that is the guide itself
TOPIC = "Computers"  # the topic that notebook 07b leaves out of a student's data, then puts back in (G5)


class Student(NamedTuple):
    """A small encoder: the guide's first `layers` layers (or all of them: `WHOLE`), trained as `arm` says."""

    layers: int
    seed: int
    arm: StudentArm

    @property
    def keys(self) -> dict[str, Any]:
        return {"layers": "whole" if self.layers == WHOLE else self.layers, "arm": self.arm, "seed": self.seed}

    @property
    def name(self) -> str:
        return STUDENT.format(**self.keys)


STUDENT = "student-{layers}-{arm}-{seed}"

# --- 10: the data sets that are compared ----------------------------------------------------------


def ablation_prompts(p: Profile) -> int:
    """How many of the synthesis prompts junior and senior answer for the comparison; some records are lost on the way, and
    40% more prompts than records leave enough."""
    return min(p.synthesis.count, int(p.study.ablation_examples * 1.4))


def _compared(run: Run) -> Lazy[Prompt]:
    return generation_stages.synthesis_prompts(run)[: ablation_prompts(run.profile)]


def _answering(run: Run) -> Instances:
    junior = [a for a in run.profile.study.arms if a in (Arm.JR, Arm.JR_RE)]
    return each("10", generator=["junior"] * bool(junior) + ["base"] * (Arm.BASE in run.profile.study.arms))


@generation_stages.generated(
    "raw-{generator}",
    _answering,
    "{generator}",
    work=lambda p, generator: p.synthesis.count if generator == "base" else ablation_prompts(p),
)
def raw_of(run: Run, generator: str) -> generation_stages.Ask:
    """Answers of junior or base to the senior's prompts. Fewer of the base's are records, so it answers all of them."""
    return generation_stages.Ask(generation_stages.synthesis_prompts(run) if generator == "base" else _compared(run))


def _revising(run: Run) -> Instances:
    return [("10", {})] if Arm.JR_RE in run.profile.study.arms else []


@generation_stages.generated("revised-junior", _revising, "revisor", inputs=["raw-junior"], work=lambda p: ablation_prompts(p))
def revised_junior(run: Run, raw: Artifact) -> generation_stages.Ask:
    """The junior's answers, revised."""
    return generation_stages.revision_of(raw, _compared(run))


SOURCES = {
    Arm.TEACHER: ["seeds"],
    Arm.BASE: ["raw-base"],
    Arm.JR: ["raw-junior"],
    Arm.JR_RE: ["raw-junior", "revised-junior"],
    Arm.SR: ["raw"],
    Arm.SR_RE: ["raw", "revised"],
}


@stage(
    "synthetic-{arm}",
    Kind.DATA,
    lambda run: each("10", arm=run.profile.study.arms),
    inputs=lambda run, arm: SOURCES[arm],
    parameters=generation_stages.curated,
)
def arm_data(run: Run, draft: Draft, raw: Artifact, revised: Artifact | None = None, *, arm: Arm) -> None:
    """The data set of an arm, from the same prompts (but the teacher's own examples)."""
    prompts_, source = (_compared(run), "junior") if arm in (Arm.JR, Arm.JR_RE) else (
        generation_stages.synthesis_prompts(run), "base" if arm == Arm.BASE else "senior"
    )  # fmt: skip
    if arm == Arm.TEACHER:
        rows: Sequence[dict[str, Any]] = generation_stages.teacher_records(run)
    elif revised:
        rows = generation_stages.revised_records(run, raw, revised, prompts_, source)
    else:
        rows = generation_stages.to_records(run, raw.stored(), prompts_, source)
    if arm in (Arm.SR, Arm.SR_RE):
        ids = {q.id for q in _compared(run)}
        rows = [r for r in rows if r["id"] in ids]
    generation_stages.write_dataset(run, draft, f"synthetic-{arm}", rows, f"Ablation {arm}, see notebook 10.")


def ablation_data(run: Run, arms: Sequence[str] | None = None) -> dict[str, Artifact]:
    """The data sets of `study.arms` (or of `arms`), with the answers that they are made from."""
    # Notebook 06 made the senior's (or they are shipped); at a point of a sweep that trains another senior they are made again here.
    made_here = run.store.made("raw") is not None or (run.point and run.store.made("senior") is not None)
    out: dict[str, Artifact] = {}
    for arm in map(Arm, arms or run.profile.study.arms):
        for one in (find(run, name) for name in SOURCES[arm]):
            if one and (one.notebook == "10" or (one.notebook == "06" and made_here)):
                one.make(run)
        out[arm] = arm_data(run, arm=arm)
    return out


def compares_all(run: Run) -> bool:
    """Whether notebook 10 compares everything that its figures show: a point of a sweep does not."""
    return not run.point and run.profile.study.arms == ARMS


def ablation_size(run: Run) -> int:
    """Records in each compared data set: as many as the smallest of Table 2's has, at most `study.ablation_examples`."""
    made = [run.store.get(f"synthetic-{k}") for k in run.profile.study.arms if k in TABLE2]
    return min([run.profile.study.ablation_examples] + [a.manifest["kept"] for a in made if a])


def ablation_arms(run: Run) -> list[str]:
    """The data sets that are compared: Table 2's, and the base model's and the teacher's, which may have as few as half of the
    compared records (`trained_on` says how many they have), but a batch."""
    enough = max(ablation_size(run) / 2, run.profile.embedding.batch)
    made = {k: run.store.get(f"synthetic-{k}") for k in run.profile.study.arms}
    return [k for k, a in made.items() if k in TABLE2 or not a or a.manifest["kept"] >= enough]


# --- embedding models -------------------------------------------------------------------------------


def training_seeds(run: Run) -> list[int]:
    """The seeds that every embedding model is trained with: the run's own and those after it (`study.seeds`)."""
    return [run.profile.seed + k for k in run.profile.study.seeds]


def scaled(size: int) -> str:
    """The arm of notebook 11 that learns from `size` records."""
    return f"scale{size}"


def _own_sizes(run: Run) -> dict[str, int]:
    """{arm: records} of notebook 11's sizes for which models of their own are trained."""
    # Notebook 10 comes before 11: until its data set is there, the plan takes it for the beginning of notebook 06's.
    soon = run.profile.embedding.guided and Arm.SR_RE in run.profile.study.arms and not run.store.get("synthetic-sr_re")
    equal = ablation_size(run)
    return {scaled(n): n for n in scaling_sizes(run)[:-1] if not (shares_ablation(run, n) or (soon and n == equal))}


def _models(run: Run) -> Instances:
    arms = {"08": ["guided", "plain"], "10": ablation_arms(run), "11": list(_own_sizes(run))}
    return [(notebook, {"arm": arm, "seed": s}) for notebook, of in arms.items() for arm in of for s in training_seeds(run)]


def _learning(run: Run, arm: str) -> Embedding:
    """The profile's training, with what an arm changes: the loss, or how many records it learns from."""
    if arm in ARMS:
        changes: dict[str, Any] = {"examples": ablation_size(run)}
    elif arm in ("guided", "plain"):
        changes = {"guided": arm == "guided"}
    else:
        changes = {"guided": True, "examples": next(n for n in scaling_sizes(run) if scaled(n) == arm)}
    return run.profile.embedding.model_copy(update=changes)


def _records(p: Profile, arm: str) -> float:
    known = {scaled(n): n for n in p.study.scaling} | {
        "guided": (whole := min(p.embedding.examples, p.synthesis.count)),
        "plain": whole,
    }
    return known.get(arm, p.study.ablation_examples) * p.embedding.epochs


@stage(
    "embedder-{arm}-{seed}",
    Kind.EMBEDDER,
    _models,
    inputs=lambda run, arm, seed: [f"synthetic-{arm}" if arm in ARMS else "synthetic"],
    parameters=lambda run, data, arm, seed: {
        "training": _learning(run, arm).cache_key_fields(),
        "seed": seed,
        "base": loading.model_id(run.profile.models.embedder),
        "guide": loading.named(run.profile.models.guide),
    },
    work=lambda p, arm, seed: _records(p, arm),
)
def embedder(run: Run, draft: Draft, data: Artifact, *, arm: str, seed: int) -> None:
    """A sentence-transformers model trained on the data set of its arm."""
    from speed_core.contrastive.train import train_embedder

    settings, base = _learning(run, arm), run.profile.models.embedder
    draft.info |= compute_type.facts(compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).name)
    generation_stages.train(
        run,
        train_embedder,
        f"embedder-{arm}-{seed}",
        base=base,
        rows=data.rows("train.jsonl"),
        settings=settings,
        guide=run.profile.models.guide,
        guide_cache=run.folder / "guide",
        seed=seed,
        output=draft.path,
        label=f"embedder-{arm}-{seed}",
    )


def embedders(run: Run, arm: str) -> list[Artifact]:
    """The embedding models of an arm, one a training seed, made where they are not current."""
    return [embedder(run, arm=arm, seed=s) for s in training_seeds(run)]


def ablation_embedders(run: Run, arms: Sequence[str] | None = None) -> dict[str, list[Artifact]]:
    """Embedding models for each of the compared data sets (or of `arms`), all trained on `ablation_size` records where their data
    set has as many."""
    return {arm: embedders(run, arm) for arm in arms or ablation_arms(run)}


def trained_on(run: Run, arm: str) -> int | None:
    """How many records each embedding model of an arm learned from; None when none was trained."""
    model = run.store.get(f"embedder-{arm}-{training_seeds(run)[0]}")
    return model.json("training.json")["rows"] if model else None


def learned(run: Run, arm: str) -> str:
    """Digest of the texts that each embedding model of an arm learned from: equal where two arms have the same records."""
    rows = run.store.need(f"synthetic-{arm}").rows("train.jsonl")[: trained_on(run, arm)]
    return digest([[r[name] for name in ("instruction", "query", "positive", "negative")] for r in rows])


def records(run: Run, arms: Iterable[str]) -> dict[str, int]:
    """{arm: records that each of its embedding models learned from}, without the arms that have no trained model."""
    return {arm: n for arm in arms if (n := trained_on(run, arm))}


def seeded_scores(run: Run, arm: str) -> list[dict[str, Any]]:
    """Scores of the models of an arm, in the order of the seeds, made where they are not current."""
    return [embedder_scores(run, arm=arm, seed=s).json("scores.json") for s in training_seeds(run)]


def scored(run: Run, arm: str) -> list[Artifact]:
    """The artifacts `scores-ARM-SEED` that are there, in the order of the seeds."""
    found = [run.store.get(f"scores-{arm}-{s}") for s in training_seeds(run)]
    return [a for a in found if a]


def already_scored(run: Run, arms: Sequence[str]) -> dict[str, list[Artifact]]:
    """Of `arms`, those that this very run has scored with all training seeds: {arm: artifacts}. What is shipped takes no part: its
    models are another run's."""
    found = {arm: [run.store.made(f"scores-{arm}-{s}") for s in training_seeds(run)] for arm in arms}
    return {arm: [a for a in made if a] for arm, made in found.items() if all(made)}


# --- 11: more data ----------------------------------------------------------------------------------


def scaling_models(run: Run) -> dict[int, tuple[str, list[Artifact]]]:
    """size -> (arm, models) of notebook 11, each trained on the first records of notebook 06's data set."""
    return {n: (arm := scaling_arm(run, n), embedders(run, arm)) for n in scaling_sizes(run)}


def scaling_arm(run: Run, size: int) -> str:
    """The arm of one size: notebook 08's for the largest, notebook 10's Sr+Re where it learned the very same records."""
    if size == scaling_sizes(run)[-1]:
        return "guided"
    return Arm.SR_RE if shares_ablation(run, size) else scaled(size)


def shares_ablation(run: Run, size: int) -> bool:
    """Whether notebook 10's Sr+Re models learn what models of notebook 11 would: the same loss on the same `size` records."""
    ours, theirs = run.store.get("synthetic-sr_re"), run.store.get("synthetic")
    if not (ours and theirs and run.profile.embedding.guided and size == ablation_size(run)):
        return False
    return ours.rows("train.jsonl")[:size] == theirs.rows("train.jsonl")[:size]


def scaling_sizes(run: Run) -> list[int]:
    """Notebook 11's data sizes as far as there are records; the last is always the whole training set of notebook 08."""
    data = run.store.get("synthetic")
    used = min(run.profile.embedding.examples, data.manifest["kept"] if data else run.profile.synthesis.count)
    return [n for n in run.profile.study.scaling if n < used] + [used]


# --- 07b: students ----------------------------------------------------------------------------------


def students(run: Run) -> list[Student]:
    """Notebook 07b's students; only the smallest gets the arms beside guided and plain, and the whole guide (`WHOLE`) none but
    "uncovered" (G4)."""
    plan, mixed = run.profile.study.student, tuple(MIXED)
    more = [a for a in StudentArm if a not in (StudentArm.GUIDED, StudentArm.PLAIN, *mixed)]
    cut = [
        Student(layers, seed, arm)
        for layers in plan.layers
        for seed in plan.seeds
        for arm in [StudentArm.GUIDED, StudentArm.PLAIN] + (more if layers == min(plan.layers) else [])
    ]
    return cut + [Student(WHOLE, seed, StudentArm.UNCOVERED) for seed in plan.seeds]


def mixed_students(run: Run) -> list[Student]:
    """The students of S2, which notebook 10 trains; none where it lacks one of their data sets."""
    plan = run.profile.study
    there = set(MIXED.values()) <= set(plan.arms)
    return [Student(min(plan.student.layers), s, arm) for arm in (MIXED if there else ()) for s in plan.student.seeds]


def mixed_size(run: Run) -> int:
    """Synthetic records that each student of S2 learns from: as many as notebook 10 compares, and the smaller of both sets has."""
    made = [run.store.get(f"synthetic-{arm}") for arm in MIXED.values()]
    return min([ablation_size(run)] + [a.manifest["kept"] for a in made if a])


def mixed_scores(run: Run) -> dict[str, list[Artifact]]:
    """{arm: artifacts of its scores, in the order of the seeds} of S2's students, which are trained where they are not current."""
    out: dict[str, list[Artifact]] = {}
    for s in mixed_students(run):
        student(run, **s.keys)
        out.setdefault(s.arm, []).append(student_scores(run, **s.keys))
    return out


def _students(run: Run) -> Instances:
    return [("07b", s.keys) for s in students(run)] + [("10", s.keys) for s in mixed_students(run)]


def _student_reads(run: Run, layers: int | str, arm: str, seed: int) -> list[str]:
    if arm in MIXED:
        return [f"synthetic-{MIXED[StudentArm(arm)]}"]
    return [] if arm == StudentArm.LABELLED else ["seeds"]


def _bases(run: Run, layers: int | str, arm: str) -> tuple[str, str]:
    """(the model that a student starts from, its guide)."""
    whole = run.profile.models.guide
    base = loading.resolve(whole) if layers == "whole" else loading.shallow_encoder(whole, int(layers))
    return str(base), whole if arm != StudentArm.WEAK else str(loading.shallow_encoder(whole, 2))


def _student_base(run: Run, layers: int | str) -> str:
    base, _ = _bases(run, layers, "")
    return loading.weights_id(loading.resolve(base)) + loading.settings_id(run.profile.models.guide)


def student_training(run: Run, arm: str) -> Embedding:
    plan = run.profile.study.student
    changes = {"lora": None, "dtype": "float32", "guided": arm != StudentArm.PLAIN, "micro_batch": plan.batch}
    changes |= {k: getattr(plan, k) for k in ("examples", "epochs", "batch", "lr")}
    return run.profile.embedding.model_copy(update=changes | {"margin": 0.05 if arm == StudentArm.MARGIN else 0.0})


def _labelled(run: Run, arm: str) -> list[dict[str, Any]]:
    from speed_core.evaluation import offline_tasks

    if arm not in (StudentArm.LABELLED, StudentArm.BOTH, *MIXED):
        return []
    plan = run.profile.study.student
    return list(offline_tasks.labelled_pairs(plan.examples, run.profile.data_seed, run.profile.evaluation.size))


def _student_parameters(run: Run, *read: Artifact, layers: int | str, arm: str, seed: int) -> dict[str, Any]:
    (_, guide), whole = _bases(run, layers, arm), run.profile.models.guide
    out = {"training": student_training(run, arm).cache_key_fields(), "seed": seed}
    out["base"] = _student_base(run, layers)
    out["guide"] = loading.weights_id(loading.resolve(guide)) + loading.settings_id(whole)
    if rows := _labelled(run, arm):
        out["labelled"] = prompts.text_digest("".join(r["query"] + r["positive"] for r in rows))
    if arm in (StudentArm.UNCOVERED, StudentArm.COVERED):
        out["topic"] = TOPIC
    return out | ({"records": mixed_size(run)} if arm in MIXED else {})


def _student_work(p: Profile, layers: int | str, arm: str, seed: int) -> float:
    depth, twice = 6 if layers == "whole" else int(layers), arm in (StudentArm.BOTH, *MIXED)  # the packaged guide has six layers
    return depth * p.study.student.examples * p.study.student.epochs * (2 if twice else 1)


@stage(STUDENT, Kind.STUDENT, _students, inputs=_student_reads, parameters=_student_parameters, work=_student_work)
def student(run: Run, draft: Draft, *read: Artifact, layers: int | str, arm: str, seed: int) -> None:
    """A student (`Student`), trained on the seed data or on what its arm says (`StudentArm`)."""
    from speed_core.contrastive.train import train_embedder

    base, guide = _bases(run, layers, arm)
    rows = _labelled(run, arm)
    if arm in (StudentArm.UNCOVERED, StudentArm.COVERED):
        rows = topic_records(run, covered=arm == StudentArm.COVERED)
    elif arm in MIXED:
        rows = read[0].rows("train.jsonl")[: mixed_size(run)] + rows
    elif arm != StudentArm.LABELLED:
        rows = generation_stages.teacher_records(run)[: run.profile.study.student.examples] + rows
    settings = student_training(run, arm).model_copy(update={"examples": len(rows)})
    draft.info |= compute_type.facts(settings.dtype)
    label = STUDENT.format(layers=layers, arm=arm, seed=seed)
    kept = {"guide_cache": run.folder / "guide", "cache": run.folder / "checkpoints", "output": draft.path}
    train_embedder(base, rows, settings, guide=guide, seed=seed, label=label, **kept)


def topic_records(run: Run, *, covered: bool) -> list[dict[str, Any]]:
    """The teacher's records without any on `TOPIC`, or with those in place of the last others: equally many, at most
    `study.student.examples`, and of those on the topic at most half."""
    records = generation_stages.teacher_records(run)
    on, off = ([r for r in records if (r["topic"].split("/")[0] == TOPIC) == wanted] for wanted in (True, False))
    off = off[: run.profile.study.student.examples]
    on = on[: len(off) // 2]
    return off[: len(off) - len(on)] + on if covered else off


def by_topic(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The chatterbot retrieval of a scored model as two tasks: "on" holds the questions about computing, "off" the others."""
    from speed_core.evaluation import offline_tasks

    computing = [c in offline_tasks.COMPUTING for c in offline_tasks.question_categories(run.profile.evaluation.size)]
    items = result["tasks"][offline_tasks.QUESTIONS]["items"]
    parts = {name: [v for v, c in zip(items, computing, strict=True) if c == on] for name, on in (("on", True), ("off", False))}
    return {"tasks": {k: {"type": "Retrieval", "score": sum(v) / len(v), "items": v} for k, v in parts.items()}}


# --- scores -----------------------------------------------------------------------------------------


def _scoring(run: Run, model: str = "", *, instructed: bool = True, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Parameters of scores on the profile's tasks or on `tasks`: of `model`, or of the artifact that is read."""
    e = run.profile.evaluation
    out = {"tasks": tuple(tasks) or e.tasks, "size": e.size, "max_length": e.max_length, "instructed": instructed}
    # A trained model says the type of its training.
    return out | ({"model": loading.named(model), "dtype": run.profile.embedding.dtype} if model else {"model": "artifact"})


def _score(run: Run, draft: Draft, label: str, model: Artifact | str, parameters: dict[str, Any]) -> None:
    """Fill a draft with mteb's scores of a model: an artifact's, or one with a name."""
    from speed_core.evaluation import evaluate
    from speed_core.evaluation.encoder import load_encoder

    e, where = run.profile.evaluation, str(model.weights()) if isinstance(model, Artifact) else model
    how = {"max_length": e.max_length, "batch_size": e.batch_size, "dtype": parameters.get("dtype", "stored")}
    encoder = load_encoder(where, label, instructed=parameters["instructed"], **how)
    draft.info |= compute_type.facts(str(next(encoder.model.parameters()).dtype).removeprefix("torch."))
    found = evaluate.resolve_tasks(parameters["tasks"], e.size)
    write_json(draft.file("scores.json"), evaluate.evaluate(encoder, found, run.folder / "mteb", label=label))


def _topic_questions(arm: str) -> tuple[str, ...]:
    """What a student is scored on when not on all tasks: a left out topic is asked for in the chatterbot questions."""
    from speed_core.evaluation import offline_tasks

    return (offline_tasks.QUESTIONS,) if arm in (StudentArm.UNCOVERED, StudentArm.COVERED) else ()


@lru_cache(maxsize=8)
def _texts(size: str) -> dict[str, int]:
    """Evaluation texts of each offline task."""
    from speed_core.evaluation import offline_tasks

    return {name: len(texts) for name, texts in offline_tasks.offline_texts(size).items()}


def _to_embed(p: Profile, tasks: Sequence[str] = ()) -> float:
    texts = _texts(p.evaluation.size)
    return sum(texts[t] for t in tasks or texts) if tasks or p.evaluation.tasks == ("offline",) else 1


@stage(
    f"scores-{STUDENT}",
    Kind.SCORES,
    _students,
    inputs=lambda run, **keys: [STUDENT.format(**keys)],
    parameters=lambda run, model, layers, arm, seed: _scoring(run, tasks=_topic_questions(arm)),
    work=lambda p, layers, arm, seed: _to_embed(p, _topic_questions(arm)),
)
def student_scores(run: Run, draft: Draft, model: Artifact, *, layers: int | str, arm: str, seed: int) -> None:
    """Scores of a student."""
    _score(run, draft, model.name, model, _scoring(run, tasks=_topic_questions(arm)))


@stage(
    "scores-student-{layers}-untrained",
    Kind.SCORES,
    lambda run: each("07b", layers=run.profile.study.student.layers),
    parameters=lambda run, layers: _scoring(run) | {"model": _student_base(run, layers), "dtype": "float32"},
    work=lambda p, layers: _to_embed(p),
)
def untrained_student_scores(run: Run, draft: Draft, *, layers: int) -> None:
    """Scores of a student before it learns anything, which say whether its training did something (`gates`)."""
    base, _ = _bases(run, layers, "")
    _score(run, draft, f"student-{layers}-untrained", base, _scoring(run) | {"dtype": "float32"})


def _named_scores(name: str, notebook: str, *, role: str, instructed: bool, on: str = "") -> Stage:
    """Declare the scores of one of the profile's models, as it comes: on all tasks, or on those of the students' arm `on`."""

    def parameters(run: Run) -> dict[str, Any]:
        return _scoring(run, getattr(run.profile.models, role), instructed=instructed, tasks=_topic_questions(on))

    def write(run: Run, draft: Draft) -> None:
        _score(run, draft, name, getattr(run.profile.models, role), parameters(run))

    def work(p: Profile) -> float:
        return _to_embed(p, _topic_questions(on))

    return stage(f"scores-{name}", Kind.SCORES, notebook, parameters=parameters, work=work)(write)


guide_before = _named_scores("guide-topic", "07b", role="guide", instructed=False, on=StudentArm.UNCOVERED)
untrained_scores = _named_scores("untrained", "09", role="embedder", instructed=True)
guide_scores = _named_scores("guide", "09", role="guide", instructed=False)

BARE = "bare"  # notebook 08's guided models, their queries without an instruction


def _scored_models(run: Run) -> Instances:
    moved = {"08": "09"}  # notebook 09 scores what 08 trains
    bare = [("09", {"arm": BARE, "seed": s}) for s in training_seeds(run)]
    return [(moved.get(notebook, notebook), keys) for notebook, keys in _models(run)] + bare


@stage(
    "scores-{arm}-{seed}",
    Kind.SCORES,
    _scored_models,
    inputs=lambda run, arm, seed: [f"embedder-{'guided' if arm == BARE else arm}-{seed}"],
    parameters=lambda run, model, arm, seed: _scoring(run, instructed=arm != BARE),
    work=lambda p, arm, seed: _to_embed(p),
)
def embedder_scores(run: Run, draft: Draft, model: Artifact, *, arm: str, seed: int) -> None:
    """Scores of an embedding model."""
    _score(run, draft, f"{arm}-{seed}", model, _scoring(run, instructed=arm != BARE))


def _overlap(run: Run, data: Artifact) -> dict[str, Any]:
    from speed_core.evaluation import contamination

    e = run.profile.evaluation
    found = {"tasks": e.tasks, "size": e.size, "words": run.profile.curate.overlap_words, "near": contamination.NEAR}
    return found | {"guide": loading.model_id(run.profile.models.guide)}


@stage("contamination-synthetic", Kind.REPORT, "09", inputs=["synthetic"], parameters=_overlap)
def contamination(run: Run, draft: Draft, data: Artifact) -> None:
    """What each evaluated task's texts share with the data set (`contamination.report`)."""
    from speed_core.evaluation import contamination, evaluate, offline_tasks

    e, model = run.profile.evaluation, generation_stages.guide(run)
    kept, dropped = data.rows("train.jsonl"), data.rows("dropped.jsonl")
    found = contamination.report(
        contamination.sample(offline_tasks.distinct_texts(evaluate.resolve_tasks(e.tasks, e.size))),
        kept + dropped,
        kept,
        words=run.profile.curate.overlap_words,
        embed=lambda texts: model.encode(list(texts), batch_size=64, show_progress_bar=False),
    )
    write_json(draft.file("report.json"), found)

"""The study's stages (notebooks 07 to 11): embedding models trained on the data sets that are compared, and their scores.

Stages like those of `pipeline`, whose data sets they read. Each compared model is trained once for every seed of
`training_seeds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from speed_core.data import prompts
from speed_core.files import digest, write_json
from speed_core.models import compute_type, loading
from speed_core.profile import Profile, dotted
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import generation_stages

TABLE2 = ("jr", "jr_re", "sr", "sr_re")
ARMS = (*TABLE2, "base", "teacher")  # of notebook 10
MIXED = {"mixed_sr_re": "sr_re", "mixed_teacher": "teacher"}  # students that learn labelled pairs too (S2), and from which data
WHOLE = 0  # layers of a student that is the guide itself
TOPIC = "Computers"  # the topic that notebook 07 leaves out of a student's data, then puts back in (G5)


def ablation_prompts(p: Profile) -> int:
    """How many of the synthesis prompts junior and senior answer for the comparison; some records are lost on the way, and
    40% more prompts than records leave enough."""
    return min(p.synthesis.count, int(p.study.ablation_examples * 1.4))


def ablation_data(run: Run, arms: Sequence[str] | None = None) -> dict[str, Artifact]:
    """The data sets of `study.arms` (or of `arms`): of junior and senior, each as written and revised (Table 2, the same
    prompts), of the base model without training (beside Table 1's instruct model off the shelf), and the teacher's own examples."""
    everything = generation_stages.plan(run, "synthesis", run.profile.synthesis.count)
    planned = everything[: ablation_prompts(run.profile)]
    ids = {q.id for q in planned}

    def own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in rows if r["id"] in ids]

    def made(arm: str) -> tuple[list[dict[str, Any]], list[Artifact]]:
        """(records, artifacts that they come from) of one arm."""
        if arm == "teacher":
            return generation_stages.teacher_records(run), [run.store.need("seeds")]
        if arm == "base":  # fewer of its texts are records, so it answers all prompts
            raw = generation_stages.sample(run, "raw-base", everything, "base")
            return generation_stages.to_records(run, raw.rows(), everything, "base"), [raw]
        if arm.startswith("jr"):
            raw = generation_stages.sample(run, "raw-junior", planned, "junior")
            if arm == "jr":
                return generation_stages.to_records(run, raw.rows(), planned, "junior"), [raw]
            better = generation_stages.revise(run, "revised-junior", raw, planned)
            return generation_stages.revised_records(run, raw, better, planned, "junior"), [raw, better]
        # Notebook 06 made both (or they are shipped); at a point of a sweep that trains another senior they are made again here.
        made_here = run.store.made("raw") is not None or (run.point and run.store.made("senior") is not None)
        raw = generation_stages.sample(run, "raw", everything, "senior") if made_here else run.store.need("raw")
        if arm == "sr":
            return own(generation_stages.to_records(run, raw.rows(), everything, "senior")), [raw]
        better = generation_stages.revise(run, "revised", raw, everything) if made_here else run.store.need("revised")
        return own(generation_stages.revised_records(run, raw, better, everything, "senior")), [raw, better]

    out: dict[str, Artifact] = {}
    for arm in arms or run.profile.study.arms:
        rows, parents = made(arm)
        out[arm] = generation_stages.dataset(run, f"synthetic-{arm}", rows, parents, f"Ablation {arm}, see notebook 10.")
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


def ablation_embedders(run: Run, arms: Sequence[str] | None = None) -> dict[str, list[Artifact]]:
    """Embedding models for each of the compared data sets (or of `arms`), one a seed, all trained on `ablation_size` records
    where their data set has as many."""
    equal = ablation_size(run)
    return {k: embedders(run, k, run.store.need(f"synthetic-{k}"), limit=equal) for k in arms or ablation_arms(run)}


def training_seeds(run: Run) -> list[int]:
    """The seeds that every embedding model is trained with: the run's own and those after it (`study.seeds`)."""
    return [run.profile.seed + k for k in run.profile.study.seeds]


def embedders(run: Run, arm: str, data: Artifact, **how: Any) -> list[Artifact]:
    """Artifacts `embedder-ARM-SEED`, one a training seed; `how` as in `embedder`."""
    return [embedder(run, f"embedder-{arm}-{s}", data, seed=s, **how) for s in training_seeds(run)]


def trained_on(run: Run, arm: str) -> int | None:
    """How many records each embedding model of an arm learned from; None when none was trained."""
    model = run.store.get(f"embedder-{arm}-{training_seeds(run)[0]}")
    return model.json("training.json")["rows"] if model else None


def learned(run: Run, arm: str) -> str:
    """Digest of the texts that each embedding model of an arm learned from: equal where two arms have the same records."""
    rows = run.store.need(f"synthetic-{arm}").rows("train.jsonl")[: trained_on(run, arm)]
    return digest([[r[name] for name in ("instruction", "query", "positive", "negative")] for r in rows])


def records(run: Run, arms: Iterable[str]) -> dict[str, int]:
    """{arm: records that each of its embedding models learned from}, without arms of which none was trained."""
    return {arm: n for arm in arms if (n := trained_on(run, arm))}


def seeded_scores(run: Run, arm: str, trained: Sequence[Artifact], **how: Any) -> list[dict[str, Any]]:
    """Scores of the models of `embedders`, in the order of the seeds: artifacts `scores-ARM-SEED`."""
    return [scores(run, f"{arm}-{s}", m, **how) for s, m in zip(training_seeds(run), trained, strict=True)]


def scored(run: Run, arm: str) -> list[Artifact]:
    """The artifacts `scores-ARM-SEED` that are there, in the order of the seeds."""
    found = [run.store.get(f"scores-{arm}-{s}") for s in training_seeds(run)]
    return [a for a in found if a]


def already_scored(run: Run, arms: Sequence[str]) -> dict[str, list[Artifact]]:
    """Of `arms`, those that this very run has scored with all training seeds: {arm: artifacts}. What is shipped takes no part: its
    models are another run's."""
    found = {arm: [run.store.made(f"scores-{arm}-{s}") for s in training_seeds(run)] for arm in arms}
    return {arm: [a for a in made if a] for arm, made in found.items() if all(made)}


def scaling_models(run: Run) -> dict[int, tuple[str, list[Artifact]]]:
    """size -> (arm, models) of notebook 11, each trained on the first records of notebook 06's data set."""
    return {n: scaling_arm(run, n) for n in scaling_sizes(run)}


def scaling_arm(run: Run, size: int) -> tuple[str, list[Artifact]]:
    """(arm, models) of one size: notebook 08's for the largest, notebook 10's Sr+Re where it learned the very same records."""
    data = run.store.need("synthetic")
    if size == scaling_sizes(run)[-1]:
        return "guided", embedders(run, "guided", data, guided=True)
    if shares_ablation(run, size):
        return "sr_re", ablation_embedders(run, ["sr_re"])["sr_re"]
    return f"scale{size}", embedders(run, f"scale{size}", data, guided=True, limit=size)


def shares_ablation(run: Run, size: int) -> bool:
    """Whether notebook 10's Sr+Re models learn what models of notebook 11 would: the same loss on the same `size` records."""
    ours, theirs = run.store.get("synthetic-sr_re"), run.store.get("synthetic")
    if not (ours and theirs and run.profile.embedding.guided and size == ablation_size(run)):
        return False
    return ours.rows("train.jsonl")[:size] == theirs.rows("train.jsonl")[:size]


def embedder(
    run: Run, name: str, data: Artifact, *, seed: int | None = None, limit: int | None = None, guided: bool | None = None
) -> Artifact:
    """Artifact `name`: a sentence-transformers model trained on (the first `limit` of) a data set."""
    from speed_core.contrastive import embedder

    settings = run.profile.embedding
    changes = {k: v for k, v in (("guided", guided), ("examples", limit)) if v is not None}
    settings = settings.model_copy(update=changes)
    seed = run.profile.seed if seed is None else seed
    base = run.profile.models.embedder
    parameters = {
        "training": dotted(settings),
        "seed": seed,
        "base": loading.model_id(base),
        "guide": loading.named(run.profile.models.guide),
    }
    with run.store.stage(name, parameters, [data]) as draft:
        if draft:
            draft.info |= compute_type.facts(
                compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).name
            )
            embedder.train(
                base,
                data.rows("train.jsonl"),
                settings,
                guide=run.profile.models.guide,
                guide_cache=run.folder / "guide",
                seed=seed,
                output=draft.path,
                label=name,
            )
    return run.store.need(name)


def student_arms(run: Run) -> list[tuple[int, int, str]]:
    """(layers, seed, arm) of notebook 07's students; only the smallest gets the arms beside guided and plain, and the whole
    guide (`WHOLE`) none but "uncovered" (G4)."""
    plan, more = run.profile.study.student, ("weak", "margin", "labelled", "both", "uncovered", "covered")
    cut = [
        (layers, seed, arm)
        for layers in plan.layers
        for seed in plan.seeds
        for arm in ("guided", "plain") + (more if layers == min(plan.layers) else ())
    ]
    return cut + [(WHOLE, seed, "uncovered") for seed in plan.seeds]


def mixed_arms(run: Run) -> list[tuple[int, int, str]]:
    """(layers, seed, arm) of the students of S2, which notebook 10 trains; none where it lacks one of their data sets."""
    plan = run.profile.study
    return [
        (min(plan.student.layers), seed, arm)
        for arm in (MIXED if set(MIXED.values()) <= set(plan.arms) else ())
        for seed in plan.student.seeds
    ]


def mixed_size(run: Run) -> int:
    """Synthetic records that each student of S2 learns from: as many as notebook 10 compares, and the smaller of both sets has."""
    made = [run.store.get(f"synthetic-{arm}") for arm in MIXED.values()]
    return min([ablation_size(run)] + [a.manifest["kept"] for a in made if a])


def mixed_scores(run: Run) -> dict[str, list[Artifact]]:
    """{arm: artifacts of its scores, in the order of the seeds} of S2's students, which are trained where they are not current."""
    out: dict[str, list[Artifact]] = {}
    for layers, seed, arm in mixed_arms(run):
        name = student_name(layers, arm, seed)
        scores(run, name, student(run, layers, arm, seed))
        out.setdefault(arm, []).append(run.store.need(f"scores-{name}"))
    return out


def student_name(layers: int, arm: str, seed: int) -> str:
    """Name of a student's artifact."""
    return f"student-{'whole' if layers == WHOLE else layers}-{arm}-{seed}"


def scaling_sizes(run: Run) -> list[int]:
    """Notebook 11's data sizes as far as there are records; the last is always the whole training set of notebook 08."""
    data = run.store.get("synthetic")
    used = min(run.profile.embedding.examples, data.manifest["kept"] if data else run.profile.synthesis.count)
    return [n for n in run.profile.study.scaling if n < used] + [used]


def student(run: Run, layers: int, arm: str, seed: int) -> Artifact:
    """Artifact `student-...`: the guide's first `layers` layers (or all of them: `WHOLE`), trained on the seed data.

    `arm`: "plain" (no mask), "guided", "margin" (mask with margin 0.05), "weak" (the mask of a guide of two layers), and
    guided on other data: "labelled" (equally many pairs that people labelled, `offline_tasks.labelled_pairs`), "both",
    "uncovered" and "covered" (`topic_records`), and `MIXED` (labelled pairs, and records of one of notebook 10's data sets).
    """
    from speed_core.contrastive import embedder
    from speed_core.evaluation import offline_tasks

    plan, whole = run.profile.study.student, run.profile.models.guide
    base = loading.resolve(whole) if layers == WHOLE else loading.shallow_encoder(whole, layers)
    guide_ = run.profile.models.guide if arm != "weak" else str(loading.shallow_encoder(run.profile.models.guide, 2))
    changes = {"lora": None, "dtype": "float32", "guided": arm != "plain", "micro_batch": plan.batch}
    changes |= {k: getattr(plan, k) for k in ("examples", "epochs", "batch", "lr")} | {"margin": 0.05 if arm == "margin" else 0.0}
    settings = run.profile.embedding.model_copy(update=changes)
    name = student_name(layers, arm, seed)
    parameters = {"training": dotted(settings), "seed": seed, "base": loading.weights_id(base) + loading.settings_id(whole)}
    parameters["guide"] = loading.weights_id(loading.resolve(guide_)) + loading.settings_id(whole)
    rows: list[dict[str, Any]] = []
    parents: list[Artifact] = []
    if arm in ("labelled", "both", *MIXED):
        rows += offline_tasks.labelled_pairs(plan.examples, run.profile.data_seed, run.profile.evaluation.size)
        parameters["labelled"] = prompts.text_digest("".join(r["query"] + r["positive"] for r in rows))
    if arm in ("uncovered", "covered"):
        rows, parents = topic_records(run, covered=arm == "covered"), [run.store.need("seeds")]
        parameters["topic"] = TOPIC
    elif arm in MIXED:
        parameters["records"], parents = mixed_size(run), [run.store.need(f"synthetic-{MIXED[arm]}")]
        rows = parents[0].rows("train.jsonl")[: mixed_size(run)] + rows
    elif arm != "labelled":
        rows, parents = generation_stages.teacher_records(run)[: plan.examples] + rows, [run.store.need("seeds")]
    with run.store.stage(name, parameters, parents) as draft:
        if draft:
            settings = settings.model_copy(update={"examples": len(rows)})
            draft.info |= compute_type.facts(settings.dtype)
            embedder.train(
                str(base), rows, settings, guide=guide_, guide_cache=run.folder / "guide", seed=seed, output=draft.path, label=name
            )  # fmt: skip
    return run.store.need(name)


def topic_records(run: Run, *, covered: bool) -> list[dict[str, Any]]:
    """The teacher's records without any on `TOPIC`, or with those in place of the last others: equally many, at most
    `study.student.examples`, and of those on the topic at most half."""
    records = generation_stages.teacher_records(run)
    on, off = ([r for r in records if (r["topic"].split("/")[0] == TOPIC) == wanted] for wanted in (True, False))
    off = off[: run.profile.study.student.examples]
    on = on[: len(off) // 2]
    return off[: len(off) - len(on)] + on if covered else off


def student_tasks(arm: str) -> tuple[str, ...] | None:
    """What an arm of `student` is scored on when not on all tasks: a left out topic is asked for in the chatterbot questions."""
    from speed_core.evaluation import offline_tasks

    return (offline_tasks.QUESTIONS,) if arm in ("uncovered", "covered") else None


def guide_before(run: Run) -> dict[str, Any]:
    """Artifact `scores-guide-topic`: the guide itself on the same questions, as it comes."""
    return scores(run, "guide-topic", run.profile.models.guide, instructed=False, tasks=student_tasks("uncovered"))


def by_topic(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The chatterbot retrieval of a scored model as two tasks: "on" holds the questions about computing, "off" the others."""
    from speed_core.evaluation import offline_tasks

    computing = [c in offline_tasks.COMPUTING for c in offline_tasks.question_categories(run.profile.evaluation.size)]
    items = result["tasks"][offline_tasks.QUESTIONS]["items"]
    parts = {name: [v for v, c in zip(items, computing, strict=True) if c == on] for name, on in (("on", True), ("off", False))}
    return {"tasks": {k: {"type": "Retrieval", "score": sum(v) / len(v), "items": v} for k, v in parts.items()}}


def scores(
    run: Run, name: str, model: Artifact | str, *, instructed: bool = True, tasks: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Artifact `scores-NAME`: mteb's scores of a model (an `embedder` artifact, or a model name) on the profile's tasks or on `tasks`."""
    e = run.profile.evaluation
    wanted = tasks or e.tasks
    parents = [model] if isinstance(model, Artifact) else []
    parameters: dict[str, Any] = {"tasks": wanted, "size": e.size, "max_length": e.max_length, "instructed": instructed}
    parameters["model"] = loading.named(model) if isinstance(model, str) else "artifact"
    if isinstance(model, str):  # a trained model says the type of its training
        parameters["dtype"] = run.profile.embedding.dtype
    with run.store.stage(f"scores-{name}", parameters, parents) as draft:
        if draft:
            from speed_core.evaluation import evaluate

            where = str(model.weights()) if isinstance(model, Artifact) else model
            how = {"max_length": e.max_length, "batch_size": e.batch_size, "dtype": parameters.get("dtype", "stored")}
            encoder = evaluate.load(where, name, instructed=instructed, **how)
            draft.info |= compute_type.facts(str(next(encoder.model.parameters()).dtype).removeprefix("torch."))
            found = evaluate.resolve_tasks(wanted, e.size)
            write_json(draft.file("scores.json"), evaluate.evaluate(encoder, found, run.folder / "mteb", label=name))
    return run.store.need(f"scores-{name}").json("scores.json")


def contamination(run: Run, name: str) -> dict[str, dict[str, Any]]:
    """Artifact `contamination-NAME`: what each evaluated task's texts share with the data set NAME (`contamination.report`)."""
    from speed_core.evaluation import contamination, evaluate, offline_tasks

    e, words, data = run.profile.evaluation, run.profile.curate.overlap_words, run.store.need(name)
    parameters: dict[str, Any] = {"tasks": e.tasks, "size": e.size, "words": words, "near": contamination.NEAR}
    guide = run.profile.models.guide
    parameters["guide"] = loading.model_id(guide)
    with run.store.stage(f"contamination-{name}", parameters, [data]) as draft:
        if draft:
            model = generation_stages.guide(run)
            kept, dropped = data.rows("train.jsonl"), data.rows("dropped.jsonl")
            found = contamination.report(
                contamination.sample(offline_tasks.distinct_texts(evaluate.resolve_tasks(e.tasks, e.size))),
                kept + dropped,
                kept,
                words=words,
                embed=lambda texts: model.encode(list(texts), batch_size=64, show_progress_bar=False),
            )
            write_json(draft.file("report.json"), found)
    return run.store.need(f"contamination-{name}").json("report.json")

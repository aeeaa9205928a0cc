"""Scores of the students (notebook 07b), of the models as they come (09) and of every embedding model (09 to 11); contamination."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from speed_core.files import write_json
from speed_core.models import compute_type, loading
from speed_core.profile import Profile
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import embedding_stages, generation_stages, student_stages
from speed_core.study.stage import Instances, Kind, Stage, each, stage
from speed_core.study.student_stages import STUDENT, StudentArm, mixed_students, student


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
    student_stages.student_instances,
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
    parameters=lambda run, layers: _scoring(run) | {"model": student_stages.base_id(run, layers), "dtype": "float32"},
    work=lambda p, layers: _to_embed(p),
)
def untrained_student_scores(run: Run, draft: Draft, *, layers: int) -> None:
    """Scores of a student before it learns anything, which say whether its training did something (`gates`)."""
    base, _ = student_stages.bases(run, layers, "")
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
    bare = [("09", {"arm": BARE, "seed": s}) for s in embedding_stages.training_seeds(run)]
    return [(moved.get(notebook, notebook), keys) for notebook, keys in embedding_stages.model_instances(run)] + bare


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

    def embed(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), batch_size=64, show_progress_bar=False)

    texts = contamination.sample(offline_tasks.distinct_texts(evaluate.resolve_tasks(e.tasks, e.size)))
    found = contamination.report(texts, kept + dropped, kept, words=run.profile.curate.overlap_words, embed=embed)
    write_json(draft.file("report.json"), found)


def seeded_scores(run: Run, arm: str) -> list[dict[str, Any]]:
    """Scores of the models of an arm, in the order of the seeds, made where they are not current."""
    return [embedder_scores(run, arm=arm, seed=s).json("scores.json") for s in embedding_stages.training_seeds(run)]


def scored(run: Run, arm: str) -> list[Artifact]:
    """The artifacts `scores-ARM-SEED` that are there, in the order of the seeds."""
    found = [run.store.get(f"scores-{arm}-{s}") for s in embedding_stages.training_seeds(run)]
    return [a for a in found if a]


def already_scored(run: Run, arms: Sequence[str]) -> dict[str, list[Artifact]]:
    """Of `arms`, those that this very run has scored with all training seeds: {arm: artifacts}. What is shipped takes no part: its
    models are another run's."""
    found = {arm: [run.store.made(f"scores-{arm}-{s}") for s in embedding_stages.training_seeds(run)] for arm in arms}
    return {arm: [a for a in made if a] for arm, made in found.items() if all(made)}


def mixed_scores(run: Run) -> dict[str, list[Artifact]]:
    """{arm: artifacts of its scores, in the order of the seeds} of S2's students, which are trained where they are not current."""
    out: dict[str, list[Artifact]] = {}
    for s in mixed_students(run):
        student(run, **s.keys)
        out.setdefault(s.arm, []).append(student_scores(run, **s.keys))
    return out

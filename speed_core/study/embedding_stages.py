"""Notebooks 08, 10 and 11: embedding models, trained on the data sets that are compared and on more of one data set.

Each is trained once for every seed of `training_seeds`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from speed_core.files import digest
from speed_core.models import compute_type, loading
from speed_core.profile import Embedding, Profile
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.ablation_stages import ARMS, Arm, ablation_arms, ablation_size
from speed_core.study.stage import Instances, Kind, stage


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


def model_instances(run: Run) -> Instances:
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
    whole = min(p.embedding.examples, p.synthesis.count)
    known = {scaled(n): n for n in p.study.scaling} | {"guided": whole, "plain": whole}
    return known.get(arm, p.study.ablation_examples) * p.embedding.epochs


@stage(
    "embedder-{arm}-{seed}",
    Kind.EMBEDDER,
    model_instances,
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

    settings, base, name = _learning(run, arm), run.profile.models.embedder, f"embedder-{arm}-{seed}"
    draft.info |= compute_type.facts(compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).name)
    learns = {"base": base, "rows": data.rows("train.jsonl"), "settings": settings, "seed": seed}
    guide = {"guide": run.profile.models.guide, "guide_cache": run.folder / "guide"}
    generation_stages.train(run, train_embedder, name, **learns, **guide, output=draft.path, label=name)


def embedders(run: Run, arm: str) -> list[Artifact]:
    """The embedding models of an arm, one a training seed, made where they are not current."""
    return [embedder(run, arm=arm, seed=s) for s in training_seeds(run)]


def ablation_embedders(run: Run) -> dict[str, list[Artifact]]:
    """Embedding models for each of the compared data sets, all trained on `ablation_size` records where their data
    set has as many."""
    return {arm: embedders(run, arm) for arm in ablation_arms(run)}


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

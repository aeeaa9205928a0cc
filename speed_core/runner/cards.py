"""Cards in the hub's format, with the files they describe: a folder that `hf upload` pushes as it is.

Every fact is read from manifests, training histories and mteb's own result files; the words around them are templates in
assets/cards. Nothing here reaches a hub.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mteb
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from speed_core.contrastive import embedder
from speed_core.evaluation import evaluate, offline_tasks, uncertainty
from speed_core.files import ASSETS, UserError
from speed_core.profile import dotted
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run

TEMPLATES = ASSETS / "cards"
# Models that packages carry: (hub id, licence, where its terms are).
PACKAGED = {
    "package:gemma-3-270m": ("google/gemma-3-270m", "gemma", "https://ai.google.dev/gemma/terms"),
    "package:all-MiniLM-L6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", ""),
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**12, "1M<n<10M"))


def write(run: Run, name: str, out: Path, *, merged: bool = False) -> Path:
    """Write the card of artifact `name`, its files and, for a model, mteb's result files into the folder `out`.

    `merged`: in place of a model's adapter the whole model, which `SentenceTransformer(out)` loads. Returns the card's path. Raises UserError for an artifact that is neither `embedder-...` nor `synthetic...`, and when
    `out` is the artifact itself.
    """
    if not name.startswith(("embedder-", "synthetic")):
        raise UserError(f"card {name!r}: cards are written for embedder-* and synthetic* artifacts; give one of those")
    artifact = run.store.need(name)
    if out.resolve() == artifact.weights().resolve():
        raise UserError(f"{out}: this is the artifact itself; give another folder")
    whole = merged and not name.startswith("synthetic")
    for file in () if whole else artifact.manifest["files"]:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.file(file), out / file)
    if whole:
        embedder.merged(artifact.weights(), out)
    card = _dataset_card(run, artifact) if name.startswith("synthetic") else _model_card(run, artifact, out / "results", whole)
    card.save(out / "README.md")
    return out / "README.md"


def local_paths(out: Path) -> list[str]:
    """What should not be pushed as it is: "FILE: PATH" for every path of this machine in the small JSON files of `out`."""
    small = [path for path in sorted(out.rglob("*.json")) if path.stat().st_size < 1 << 20]
    texts = [(path, text) for path in small for text in re.findall(r'"(/[^"\n]+)"', path.read_text(encoding="utf-8"))]
    return [f"{path.relative_to(out)}: {text}" for path, text in texts if text.count("/") > 1 and Path(text).exists()]


def _model_card(run: Run, artifact: Artifact, target: Path, merged: bool) -> ModelCard:
    """The card of an embedding model, its adapter alone or `merged`; mteb's result files go into the folder `target`."""
    m, training, adapter = artifact.manifest, artifact.json("training.json"), artifact.file("adapter/body.json")
    # An adapter names the model that it belongs to; a whole model was trained from the profile's.
    base = json.loads(adapter.read_text(encoding="utf-8"))["base"] if adapter.is_file() else run.profile.models.embedder
    alone = adapter.is_file() and not merged
    hub, licence = _licence(base)
    scores, instructed = _scores(run, artifact)
    data = ModelCardData(
        base_model=hub,
        library_name="peft" if alone else "sentence-transformers",
        model_name=f"{artifact.name}-{run.profile.name}",
        eval_results=(_eval_results(run, scores, target) or None) if scores else None,
        **licence,  # type: ignore[arg-type]
    )
    more = {
        "data": next(iter(m["parents"])),
        "training": training,
        "last": training["history"][-1] if training.get("history") else {},
        "settings": dotted(m["parameters"]["training"]),
        "adapter": alone,
        "scores": score_table(scores) if scores else "",
        "with_instruction": instructed,
        "instructed": repr(embedder.instruct("{task}", "{text}")),
        "example": repr(embedder.instruct("Given a question, retrieve the text that answers it", "what do bees eat")),
    }
    template = str(TEMPLATES / "model.md")
    return ModelCard.from_template(data, template, **_facts(run, artifact, hub, licence["license"]), **more)


def _dataset_card(run: Run, artifact: Artifact) -> DatasetCard:
    """The card of a synthetic data set."""
    rows, size = artifact.rows("train.jsonl"), artifact.manifest["files"]["train.jsonl"]["bytes"]
    hub, licence = _licence(run.profile.models.generator)
    facts = _facts(run, artifact, hub, licence["license"])
    if licence["license"] == "gemma":  # outputs are not the model, so its licence is not theirs by name
        licence = {"license": "other", "license_name": "gemma-output", "license_link": licence["license_link"]}
    own = DatasetCard(artifact.file("README.md").read_text(encoding="utf-8")).data.to_dict()
    data = DatasetCardData(
        size_categories=next(label for most, label in SIZES if len(rows) < most),
        pretty_name=facts["title"],
        configs=own["configs"],  # its name is taken from the contents, see `curate.write_dataset`
        dataset_info={
            "config_name": own["configs"][0]["config_name"],
            "features": [{"name": k, "dtype": "int64" if k == "seed" else "string"} for k in (rows[0] if rows else ())],
            "splits": [{"name": "train", "num_examples": len(rows), "num_bytes": size}],
        },
        **licence,  # type: ignore[arg-type]
    )
    more: dict[str, Any] = {
        "count": len(rows),
        "kinds": sorted(Counter(r["kind"] for r in rows).items()),
        "prompts": run.profile.prompts,
        "dropped": list(_dropped(run, artifact)),
    }
    return DatasetCard.from_template(data, str(TEMPLATES / "dataset.md"), **facts, **more)


def _facts(run: Run, artifact: Artifact, hub: str, licence: str) -> dict[str, Any]:
    """What both templates say. Of an artifact upstream that was made again since, only the digest is known."""
    upstream = lineage(run, artifact)
    teachers = {a.manifest["teacher"]: None for a in upstream.values() if isinstance(a, Artifact) and a.manifest.get("teacher")}
    return {
        "title": f"{artifact.name}-{run.profile.name}",
        "m": artifact.manifest,
        "digest": artifact.digest,
        "hub": hub,
        "base_licence": licence,
        "upstream": upstream,
        "teacher": ", ".join(teachers),
    }


def lineage(run: Run, artifact: Artifact) -> dict[str, Artifact | str]:
    """Everything that an artifact was made from, nearest first: the artifact, or the digest of one that was made again since."""
    out: dict[str, Artifact | str] = {}
    todo = [artifact]
    while todo:
        for name, digest in todo.pop(0).manifest["parents"].items():
            if name not in out:
                found = run.store.get(name)
                out[name] = found if found and found.digest == digest else digest
                todo += [found] if found and found.digest == digest else []
    return out


def _licence(model: str) -> tuple[str, dict[str, str]]:
    """(hub id, licence fields of a card's front matter) of a base model; another hub model's licence is not guessed."""
    if model in PACKAGED:
        hub, name, link = PACKAGED[model]
        return hub, {"license": name} | ({"license_link": link} if link else {})
    hub = model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else Path(model).name
    return hub, {"license": "other", "license_name": "that-of-the-base-model", "license_link": f"https://huggingface.co/{hub}"}


def _scores(run: Run, artifact: Artifact) -> tuple[dict[str, Any] | None, bool]:
    """(what `evaluate.evaluate` found for this very model, whether its queries got the instruction); None when it was not scored.

    Of several scores those with the instruction are taken, as users of the model are told to give it; of these the ones named
    as the model is, before those on other tasks.
    """
    made = [run.store.get(name) for name in sorted({path.name for root in run.store.roots for path in root.glob("scores-*")})]
    own = [a for a in made if a and a.manifest["parents"].get(artifact.name) == artifact.digest]
    name = f"scores-{artifact.name.removeprefix('embedder-')}"
    ranked = sorted(own, key=lambda a: (not a.manifest["parameters"].get("instructed"), a.name != name))
    return (ranked[0].json("scores.json"), bool(ranked[0].manifest["parameters"].get("instructed"))) if ranked else (None, False)


def _eval_results(run: Run, scores: Mapping[str, Any], target: Path) -> list[EvalResult]:
    """Values in points (0-100) of every split and subset in mteb's result files, which are copied to `target`.

    The files lie in the folder of the weights' digest and of the name that the model was scored under.
    """
    revision, name = scores["revision"], scores["model"].replace("/", "__")
    folders = [root.parent / "mteb" / revision / "results" / name / revision for root in reversed(run.store.roots)]
    found = [path for folder in folders for path in folder.glob("*.json")]
    ours = {t.metadata.name: t.metadata for t in offline_tasks.offline_tasks(run.profile.evaluation.size)}
    out = []
    for task, path in sorted({path.stem: path for path in found if path.stem in scores["tasks"]}.items()):
        (target / name / revision).mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_name("model_meta.json")):
            if file.is_file():
                shutil.copyfile(file, target / name / revision / file.name)
        kept, about = json.loads(path.read_text(encoding="utf-8")), ours.get(task) or mteb.get_task(task).metadata
        hub = str(about.dataset["path"])
        out += [
            EvalResult(
                task_type=about.type,
                # The hub joins results of one data set. Several of our tasks come from one package, and an aggregate has no data set.
                dataset_type=f"speed-step-by-step/{task}" if task in ours else f"mteb/{task}" if " " in hub else hub,
                dataset_name=f"{task} (not MTEB)" if task in ours else f"MTEB {task}",
                dataset_config=row["hf_subset"],
                dataset_split=split,
                dataset_revision=kept["dataset_revision"],
                metric_type=about.main_score,
                metric_value=round(100 * row["main_score"], 3),
                source_name=f"mteb {kept['mteb_version']}, file in results/",
                source_url="https://github.com/embeddings-benchmark/mteb",
            )
            for split, rows in kept["scores"].items()
            for row in rows
        ]
    return out


def score_table(scores: Mapping[str, Any]) -> str:
    """A line a task: points with the bootstrap's 95% interval over its texts (or a classifier's repetitions), where it has one."""
    lines = ["| task | type | score | 95% interval |", "|---|---|---|---|"]
    for name, task in scores["tasks"].items():
        found = uncertainty.average([{"tasks": {name: task}}])
        interval = uncertainty.NO_TEXTS if found.no_texts else f"[{found.low:.1f}, {found.high:.1f}]"
        lines.append(f"| {name} | {task['type']} | {100 * task['score']:.1f} | {interval} |")
    means = ", ".join(f"{kind} {value:.1f}" for kind, value in evaluate.category_means(scores).items())
    return "\n".join([*lines, "", f"Means: {means}."])


def _dropped(run: Run, artifact: Artifact) -> Iterator[tuple[str, int]]:
    """(rule, count) of the answers that the generators and the curation lost, zeros too."""
    for name in artifact.manifest["parents"]:
        found = run.store.get(name)
        for outcome, count in (found.manifest.get("outcomes", {}) if found else {}).items():
            if outcome != "ok":
                yield f"{outcome} answer in `{name}`" + ("; the raw record stayed" if name.startswith("revised") else ""), count
    rules = Counter(r["dropped_by"] for r in artifact.rows("dropped.jsonl"))
    yield from ((rule, rules[rule]) for rule in ("near-duplicate", "evaluation overlap"))

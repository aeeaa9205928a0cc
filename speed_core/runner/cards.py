"""Cards in the hub's format, with the files they describe: a folder that `hf upload` pushes as it is.

Everything said is read from manifests, training histories and mteb's own result files; nothing here reaches a hub.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_core.contrastive import embedder
from speed_core.files import UserError
from speed_core.profile import dotted
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run

# What the packages carry: (hub id, licence, where its terms are).
PACKAGED = {
    "package:gemma-3-270m": ("google/gemma-3-270m", "gemma", "https://ai.google.dev/gemma/terms"),
    "package:all-MiniLM-L6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", ""),
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**12, "1M<n<10M"))
FIELDS = {
    "id": "of the prompt; the same in all data sets of a run",
    "kind": "retrieval, classification, sts, short_short or long_long",
    "task": "the task that the prompt gave",
    "topic": "the topic that the prompt gave",
    "instruction": "what the query is instructed with in training",
    "query": "written",
    "positive": "written; belongs to the query",
    "negative": "written; a hard negative, null for short_short and long_long",
    "language": "of the texts",
    "source": "who wrote it last: teacher, junior, senior or revised",
    "parent": "id of the answer that was revised, else null",
    "seed": "of the sampling",
    "prompt_digest": "SHA-256 of the prompt",
}
PROJECT = "SPEED, step by step"


def write(run: Run, name: str, out: Path) -> Path:
    """Write the card of artifact `name`, its files and, for a model, mteb's result files into the folder `out`.

    Returns the card's path. Raises UserError for an artifact that is neither `embedder...` nor `synthetic...`, and when
    `out` is the artifact itself.
    """
    if not name.startswith(("embedder-", "synthetic")):
        raise UserError(f"card {name!r}: cards are written for embedder-* and synthetic* artifacts; give one of those")
    artifact = run.store.need(name)
    if out.resolve() == artifact.weights().resolve():
        raise UserError(f"{out}: this is the artifact itself; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in artifact.manifest["files"]:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.file(file), out / file)
    if name.startswith("synthetic"):
        text = dataset_card(run, artifact)
    else:
        results = scored(run, artifact)
        if results:
            copy_results(run, results, out / "results")
        text = model_card(run, artifact, results)
    path = out / "README.md"
    path.write_text(str(text) + "\n", encoding="utf-8")
    return path


def local_paths(out: Path) -> list[str]:
    """What should not be pushed as it is: "FILE: PATH" for every path of this machine in the small JSON files of `out`."""
    found = []
    for path in sorted(out.rglob("*.json")):
        if path.stat().st_size < 1 << 20:
            for text in re.findall(r'"(/[^"\n]+)"', path.read_text(encoding="utf-8")):
                if text.count("/") > 1 and Path(text).exists():
                    found.append(f"{path.relative_to(out)}: {text}")
    return found


def base_of(run: Run, artifact: Artifact) -> str:
    """The name of the model that an embedder was trained from: of its adapter where it has one, else the profile's."""
    body = artifact.file("adapter/body.json")
    if body.is_file():
        return str(json.loads(body.read_text(encoding="utf-8"))["base"])
    return run.profile.models.embedder


def licence(model: str) -> tuple[str, dict[str, str]]:
    """(hub id, licence fields of a card's front matter) of a base model; another hub model's licence is not guessed."""
    if model in PACKAGED:
        hub, name, link = PACKAGED[model]
        return hub, {"license": name} | ({"license_link": link} if link else {})
    hub = model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else Path(model).name
    return hub, {"license": "other", "license_name": "that-of-the-base-model", "license_link": f"https://huggingface.co/{hub}"}


def lineage(run: Run, artifact: Artifact) -> dict[str, Artifact | str]:
    """Everything that an artifact was made from, nearest first: the artifact, or the digest of one that has moved since."""
    out: dict[str, Artifact | str] = {}
    todo = [artifact]
    while todo:
        for name, wanted in todo.pop(0).manifest["parents"].items():
            found = run.store.get(name)
            same = found is not None and found.digest == wanted
            if name not in out:
                out[name] = found if found is not None and same else wanted
                if found is not None and same:
                    todo.append(found)
    return out


def scored(run: Run, artifact: Artifact) -> dict[str, Any] | None:
    """What `evaluate.evaluate` found for this very model, and "instructed": whether its queries got the instruction, as its
    users are told to give it. None when the model has not been scored in this run.

    Of several scores the instructed ones are taken, of these the ones named as the model is, before those on other tasks.
    """
    names = dict.fromkeys(p.name for root in run.store.roots for p in sorted(root.glob("scores-*")))
    found = [s for n in names if (s := run.store.get(n)) and s.manifest["parents"].get(artifact.name) == artifact.digest]
    if not found:
        return None
    own = f"scores-{artifact.name.removeprefix('embedder-')}"
    best = min(found, key=lambda s: (not _instructed(s), s.name != own, s.name))
    return {**best.json("scores.json"), "instructed": _instructed(best)}


def _instructed(scores: Artifact) -> bool:
    return bool(scores.manifest["parameters"].get("instructed"))


def result_files(run: Run, results: Mapping[str, Any]) -> dict[str, Path]:
    """{task: mteb's own result file} of a scored model: in the folder of its weights' digest and of the name that it was scored
    under, for one model may have been scored in several ways."""
    revision, name = results["revision"], results["model"].replace("/", "__")
    found = [
        p
        for f in (root.parent for root in run.store.roots)
        for p in sorted((f / "mteb" / revision / "results" / name / revision).glob("*.json"))
    ]
    return {p.stem: p for p in reversed(found) if p.stem in results["tasks"]}


def copy_results(run: Run, results: Mapping[str, Any], target: Path) -> None:
    """mteb's result files of a scored model, as they are: MODEL/REVISION/TASK.json, with model_meta.json."""
    for path in result_files(run, results).values():
        place = target / path.parent.parent.name / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_name("model_meta.json")):
            if file.is_file():
                shutil.copyfile(file, place / file.name)


def _task_metadata(names: Sequence[str], size: str) -> dict[str, Any]:
    import mteb

    from speed_core.evaluation import offline_tasks

    ours = {t.metadata.name: t.metadata for t in offline_tasks.offline_tasks(size)}
    return {n: ours[n] if n in ours else mteb.get_task(n).metadata for n in names}


def eval_results(run: Run, results: Mapping[str, Any]) -> list[Any]:
    """huggingface_hub's EvalResult (values in points, 0-100) of every split and subset in mteb's result files."""
    from huggingface_hub import EvalResult

    files = result_files(run, results)
    about, out = _task_metadata(list(files), run.profile.evaluation.size), []
    for name, path in sorted(files.items()):
        said, m, ours = json.loads(path.read_text(encoding="utf-8")), about[name], name.startswith("Offline")
        for split, rows in said["scores"].items():
            out += [
                EvalResult(
                    task_type=m.type,
                    # Results of one dataset are joined: ours need a name each, several come from one package.
                    dataset_type=f"speed-step-by-step/{name}" if ours else _hub_path(name, m),
                    dataset_name=f"{name} (not MTEB)" if ours else f"MTEB {name}",
                    dataset_config=row["hf_subset"],
                    dataset_split=split,
                    dataset_revision=said["dataset_revision"],
                    metric_type=m.main_score,
                    metric_value=round(100 * row["main_score"], 3),
                    source_name=f"mteb {said['mteb_version']}, file in results/",
                    source_url="https://github.com/embeddings-benchmark/mteb",
                )
                for row in rows
            ]
    return out


def _hub_path(name: str, metadata: Any) -> str:
    """ORG/NAME of a task's data set; an aggregate such as CQADupstack has none, so its own name."""
    path = str(metadata.dataset["path"])
    return path if " " not in path else f"mteb/{name}"


def score_table(results: Mapping[str, Any]) -> str:
    """A line a task: points with the bootstrap's 95% interval over its texts (or a classifier's repetitions), where it has one."""
    from speed_core.evaluation import evaluate, uncertainty

    lines = ["| task | type | score | 95% interval |", "|---|---|---|---|"]
    for name, task in results["tasks"].items():
        found = uncertainty.average([{"tasks": {name: task}}])
        interval = uncertainty.NO_TEXTS if found.no_texts else f"[{found.low:.1f}, {found.high:.1f}]"
        lines.append(f"| {name} | {task['type']} | {100 * task['score']:.1f} | {interval} |")
    means = evaluate.category_means(results)
    return "\n".join(lines) + "\n\nMeans: " + ", ".join(f"{k} {v:.1f}" for k, v in means.items()) + "."


def chain_table(run: Run, artifact: Artifact) -> str:
    """A line for each artifact upstream: digest, seed, who answered, when. What moved since then has its digest only."""
    lines = ["| made from | digest | seed | by | written |", "|---|---|---|---|---|"]
    for name, found in lineage(run, artifact).items():
        if isinstance(found, str):
            lines.append(f"| {name} | {found} | | made again since, or not in this run | |")
            continue
        m = found.manifest
        by = m.get("teacher") or m.get("judge") or m["parameters"].get("generator", "")
        lines.append(f"| {name} | {found.digest} | {m['parameters'].get('seed', '')} | {by} | {m['written'][:10]} |")
    return "\n".join(lines)


def teacher_limit(run: Run, artifact: Artifact) -> str:
    """Who stood at the beginning of the chain, in one sentence."""
    found = [
        a.manifest["teacher"] for a in lineage(run, artifact).values() if isinstance(a, Artifact) and a.manifest.get("teacher")
    ]
    who = ", ".join(dict.fromkeys(found)) or "not known: the seed data have moved since"
    recorded = "recorded" in who
    return f"Teacher: {who}." + (
        " **The recorded teacher is not GPT-4o output**: its answers were written for the repository by its authors with the help "
        "of an AI writing assistant." if recorded else ""
    )  # fmt: skip


def settings_table(values: Mapping[str, Any]) -> str:
    """Settings as a table, a line each."""
    shown = {k: ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in dotted(dict(values)).items()}
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in shown.items())])


def _licence_note(hub: str, fields: Mapping[str, str], data: bool) -> str:
    if fields["license"] == "gemma":
        what = "The texts are output of models derived from Gemma" if data else "This model is a derivative of Gemma"
        more = "; a model trained on them to perform like Gemma is a derivative too" if data else ""
        return (
            f"{what} ([{hub}](https://huggingface.co/{hub})): Gemma is provided under and subject to the Gemma Terms of Use found at "
            f"ai.google.dev/gemma/terms, its prohibited use policy included{more}."
        )
    return f"The base model is {hub}; its licence ({fields['license']}) holds for what is derived from it. Read it before you publish."


def model_card(run: Run, artifact: Artifact, results: Mapping[str, Any] | None) -> Any:
    """huggingface_hub's ModelCard of an embedding model; `results` as `scored` gives them, or None."""
    from huggingface_hub import ModelCard, ModelCardData

    m, training = artifact.manifest, artifact.json("training.json")
    hub, licence_fields = licence(base_of(run, artifact))
    title = f"{artifact.name}-{run.profile.name}"
    beside = f" ({m['beside']} models at a time)" if "beside" in m else ""
    adapter = any(f.startswith("adapter/") for f in m["files"])
    (data, data_digest), *_ = m["parents"].items()
    front = ModelCardData(
        language="en",
        base_model=hub,
        library_name="peft" if adapter else "sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "mteb", "speed", "synthetic-data"],
        model_name=title,
        eval_results=(eval_results(run, results) or None) if results else None,
        **licence_fields,  # type: ignore[arg-type]
    )
    load = (
        "from speed_core.contrastive.embedder import load_trained\n\nmodel = load_trained(FOLDER)  # a LoRA adapter, put on its base"
        if adapter
        else "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer(FOLDER)"
    )
    guided = "guided contrastive loss (GISTEmbed)" if training.get("guided") else "InfoNCE"
    given = "queries with the instruction" if results and results["instructed"] else "**queries without the instruction**"
    scores = (
        f"{score_table(results)}\n\nScored by mteb, {given}; its result files are in `results/`. Tasks called Offline... are small ones "
        "made for the repository from texts in Python packages; they are not MTEB's and not comparable with its leaderboard. The "
        "intervals are over texts; the training seed is not covered.\n"
        if results
        else "Not scored in this run.\n"
    )
    last = training["history"][-1] if training.get("history") else {}
    return ModelCard(f"""---
{front.to_yaml()}
---
# {title}

A text embedding model trained on synthetic data, made by *{PROJECT}*, a companion to SPEED
([arXiv 2410.18634](https://arxiv.org/abs/2410.18634)) and GISTEmbed ([arXiv 2402.16829](https://arxiv.org/abs/2402.16829)).

| | |
|---|---|
| base model | {hub}, weights {m["parameters"]["base"]} |
| training data | artifact `{data}`, digest {data_digest}; {training["rows"]} records |
| loss | {guided}{f", guide {m['parameters']['guide']}" if training.get("guided") else ""} |
| seed | {m["parameters"]["seed"]} |
| made | {m["written"]}, {m["device"]}, {m["seconds"]} s{beside}, code {m["code"]} |
| this artifact | digest {artifact.digest} |

## Use

```python
{load}
query = {embedder.instruct("Given a question, retrieve the text that answers it", "what do bees eat")!r}
vectors = model.encode([query, "Bees live on nectar and pollen."], normalize_embeddings=True)
```

Queries (and both sides of symmetric tasks) are given as `{embedder.instruct("{task}", "{text}")!r}`; documents as they are.

## Scores

{scores}
## How it was made

{chain_table(run, artifact)}

{settings_table(m["parameters"]["training"])}

Last step: {", ".join(f"{k} {v:.4g}" for k, v in last.items() if isinstance(v, (int, float)))}.

## Limits

- {teacher_limit(run, artifact)}
- Trained on {training["rows"]} records written by a small language model that nobody checked for truth; one training seed.
- English only. Meant for study of the method, not for use in a product.

## Licence

{_licence_note(hub, licence_fields, data=False)}
""")


def dataset_card(run: Run, artifact: Artifact) -> Any:
    """huggingface_hub's DatasetCard of a synthetic data set."""
    from huggingface_hub import DatasetCard, DatasetCardData

    m, rows, p = artifact.manifest, artifact.rows("train.jsonl"), run.profile
    hub, licence_fields = licence(p.models.generator)
    if licence_fields["license"] == "gemma":  # outputs are not the model: the hub's name for its terms would say too much
        licence_fields = {"license": "other", "license_name": "gemma-output", "license_link": licence_fields["license_link"]}
    title = f"{artifact.name}-{p.name}"
    kept = DatasetCard(artifact.file("README.md").read_text(encoding="utf-8")).data.to_dict()
    front = DatasetCardData(
        language="en",
        annotations_creators="machine-generated",
        language_creators="machine-generated",
        multilinguality="monolingual",
        task_categories=["sentence-similarity", "text-retrieval"],
        size_categories=next(label for most, label in SIZES if len(rows) < most),
        pretty_name=title,
        tags=["synthetic", "speed", "text-embeddings"],
        configs=kept["configs"],  # its name is taken from the contents, see `curate.write_dataset`
        dataset_info={
            "config_name": kept["configs"][0]["config_name"],
            "features": [{"name": k, "dtype": "int64" if k == "seed" else "string"} for k in (rows[0] if rows else FIELDS)],
            "splits": [{"name": "train", "num_examples": len(rows), "num_bytes": m["files"]["train.jsonl"]["bytes"]}],
        },
        **licence_fields,  # type: ignore[arg-type]
    )
    kinds = Counter(r["kind"] for r in rows)
    kinds_table = "\n".join(f"| {k} | {kinds[k]} |" for k in sorted(kinds))
    fields_table = "\n".join(f"| {k} | {v} |" for k, v in FIELDS.items())
    lost = "\n".join(f"| {rule} | {count} |" for rule, count in _losses(run, artifact))
    words = "numbers of words as in the paper" if p.prompts.attributes == "paper" else f"attributes: {p.prompts.attributes}"
    return DatasetCard(f"""---
{front.to_yaml()}
---
# {title}

{len(rows)} synthetic training records for text embedding models, made by *{PROJECT}*, a companion to SPEED
([arXiv 2410.18634](https://arxiv.org/abs/2410.18634)). Synthetic text, not checked for truth: no source of facts.

| kind | records |
|---|---|
{kinds_table}
| **sum** | {len(rows)} |

## How it was made

Base model of the generators: {hub}. Prompts: style `{p.prompts.style}`, {words}. This artifact has digest {artifact.digest},
written {m["written"]} on {m["device"]}, code {m["code"]}.

{chain_table(run, artifact)}

## What was dropped

| rule | answers |
|---|---|
{lost}

Near-duplicates: MinHash over {m["parameters"]["curate"]["shingle"]}-word shingles, Jaccard {m["parameters"]["curate"]["threshold"]}.
Evaluation overlap: {m["parameters"]["curate"]["overlap_words"]} words in a row shared with an evaluation text. What the last two took is in `dropped.jsonl`,
with the reason.

## What is in a row

| field | |
|---|---|
{fields_table}

## Limits

- {teacher_limit(run, artifact)}
- Written by a small language model: sentences may be wrong, repetitive or off their task. English only.
- A hard negative may be right after all; the guided loss (GISTEmbed) is there for that.

## Licence

{_licence_note(hub, licence(p.models.generator)[1], data=True)}
""")


def _losses(run: Run, artifact: Artifact) -> Iterator[tuple[str, int]]:
    """(rule, count) of what the generators' answers and the curation lost; zeros are said too."""
    for name in artifact.manifest["parents"]:
        found = run.store.get(name)
        for outcome, count in (found.manifest.get("outcomes", {}) if found else {}).items():
            if outcome != "ok":
                yield f"{outcome} answer in `{name}`" + ("; the raw record stayed" if name.startswith("revised") else ""), count
    rules = Counter(r["dropped_by"] for r in artifact.rows("dropped.jsonl"))
    for rule in ("near-duplicate", "evaluation overlap"):
        yield rule, rules[rule]

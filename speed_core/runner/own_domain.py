"""Data and an embedding model for topics of one's own: what `python -m speed_core domain` makes of a profile."""

from __future__ import annotations

from pathlib import Path

from speed_core.data.topics import load_topics
from speed_core.files import UserError
from speed_core.runner import cards
from speed_core.runner.own_tasks import own_tasks, scorecard
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.stage import Kind, Planned, planned


def build(run: Run, out: Path, data: Path | None = None) -> None:
    """Make the training set and the first embedding model of a run, and put them into the folder `out`.

    `out`/dataset: the records with their card. `out`/model: the whole model with its card, for `SentenceTransformer(path)`. With
    `data`, texts as in `own_tasks`, `out`/scorecard: the model minus its untrained self on them. A run that was stopped goes on where
    it stopped. Raises UserError for topics or texts that will not do, before anything is made.
    """
    if not run.profile.topics.file:
        raise UserError("topics.file: empty; name a file with your topics, one path a line (docs/own-data.md says which forms)")
    if few := generation_stages.few_topics(run):
        raise UserError(few)
    if data:
        own_tasks(data)
    print(load_topics(run.profile.topics.file))
    stages = needed(run, Kind.EMBEDDER)
    for number, one in enumerate(stages, 1):
        print(f"{number} of {len(stages)}: {one.name} ({one.kind})")
        one.make(run)
    cards.write(run, "synthetic", out / "dataset")
    cards.write(run, stages[-1].name, out / "model", merged=True)
    print(f"{run.store.need('synthetic').manifest['kept']} records in {out / 'dataset'}, the embedding model in {out / 'model'}")
    if data:
        scorecard([str(out / "model"), run.profile.models.embedder], out / "scorecard", data=data)


def needed(run: Run, kind: Kind) -> list[Planned]:
    """The first stage of `kind` and everything that it reads, near and far, in the order of making."""
    every = {p.name: p for p in planned(run)}
    todo, found = [next(p.name for p in every.values() if p.kind is kind)], set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += every[name].reads(run)
    return [p for p in every.values() if p.name in found]

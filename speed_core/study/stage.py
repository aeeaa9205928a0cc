"""The registry: every artifact that a run can make is declared once, beside the code that makes it.

    @stage("senior", Kind.GENERATOR, "04", inputs=("junior", "pairs"), parameters=...)
    def senior(run, draft, junior, pairs): ...

`senior(run)` then makes the artifact where it is not current, and returns it. A declaration may stand for several artifacts:
`embedder(run, arm="guided", seed=0)` makes "embedder-guided-0". From the declarations follow the plan, which notebook makes
what, what runs side by side, what a replay rebuilds and what can be shipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from speed_core.files import write_json
from speed_core.profile import Profile
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run


class Kind(StrEnum):
    """What an artifact holds."""

    TEACHER = "answers of the teacher"
    GENERATED = "answers of a generator"
    PAIRS = "preference pairs"
    DATA = "a data set"
    GENERATOR = "a trained generator"
    STUDENT = "a small encoder"
    EMBEDDER = "an embedding model"
    SCORES = "scores of a model"
    REPORT = "a report"


REBUILT = (Kind.TEACHER, Kind.GENERATED, Kind.PAIRS, Kind.DATA)  # from the request logs alone
SIDE_BY_SIDE = (Kind.STUDENT, Kind.EMBEDDER, Kind.SCORES)  # small enough for several at a time

Keys = Mapping[str, Any]
Instances = Iterable[tuple[str, Keys]]  # (number of the notebook, keys)


@dataclass(frozen=True, eq=False)
class Stage:
    """A declaration. `name` has a field in braces for each key.

    write: fills a draft from (run, draft, *inputs, **keys).
    parameters: (run, *inputs, **keys) -> everything else that decides the contents, as JSON.
    inputs: names of the artifacts that it reads, or a function of (run, **keys).
    uses: inputs too, but the stage can do without: a generator's weights are not needed where a server or a log answers.
    instances: which artifacts a run has, each with the notebook that makes it.
    work: (profile, **keys) -> how much there is to do, in the stage's own unit; costs grow with it.
    """

    name: str
    kind: Kind
    write: Callable[..., None]
    parameters: Callable[..., dict[str, Any]]
    inputs: Callable[..., Sequence[str]]
    uses: Callable[..., Sequence[str]]
    instances: Callable[[Run], Instances]
    work: Callable[..., float]

    def __call__(self, run: Run, **keys: Any) -> Artifact:
        """The artifact, made now where it is not current."""
        return Planned(self, "", keys).make(run)


STAGES: list[Stage] = []  # in the order of their declaration


@dataclass(frozen=True)
class Planned:
    """One artifact that a run can make: a declaration with values for its keys."""

    stage: Stage
    notebook: str
    keys: Keys

    @property
    def name(self) -> str:
        return self.stage.name.format(**self.keys)

    @property
    def kind(self) -> Kind:
        return self.stage.kind

    def uses(self, run: Run) -> list[str]:
        return list(self.stage.uses(run, **self.keys))

    def reads(self, run: Run) -> list[str]:
        """Names of everything that it reads, a generator first."""
        return [*self.uses(run), *self.stage.inputs(run, **self.keys)]

    def decided_by(self, run: Run) -> tuple[dict[str, Any], list[Artifact], list[Artifact]]:
        """(parameters, artifacts of `uses`, artifacts of `inputs`). Raises UserError where an input is missing, or answers other
        prompts than this run's."""
        used = [a for name in self.uses(run) if (a := run.store.get(name))]
        read = [run.store.need(name) for name in self.stage.inputs(run, **self.keys)]
        return self.stage.parameters(run, *read, **self.keys), used, read

    def make(self, run: Run) -> Artifact:
        """The artifact, made now where it is not current."""
        parameters, used, read = self.decided_by(run)
        with run.store.stage(self.name, parameters, [*used, *read]) as draft:
            if draft:
                self.stage.write(run, draft, *read, **self.keys)
        return run.store.need(self.name)

    def work(self, profile: Profile) -> float:
        return self.stage.work(profile, **self.keys)


def stage(
    name: str,
    kind: Kind,
    made: str | Callable[[Run], Instances],
    *,
    parameters: Callable[..., dict[str, Any]],
    inputs: Sequence[str] | Callable[..., Sequence[str]] = (),
    uses: Sequence[str] | Callable[..., Sequence[str]] = (),
    work: Callable[..., float] = lambda profile, **keys: 1,
) -> Callable[[Callable[..., None]], Stage]:
    """Declare the decorated function as the one that writes `name`; see `Stage`. `made`: the notebook of a stage without keys, else
    its instances."""

    def declare(write: Callable[..., None]) -> Stage:
        one = Stage(
            name, kind, write, parameters,
            inputs if callable(inputs) else lambda run, **keys: inputs,
            uses if callable(uses) else lambda run, **keys: uses,
            made if callable(made) else lambda run: [(made, {})],
            work,
        )  # fmt: skip
        STAGES.append(one)
        return one

    return declare


def planned(run: Run) -> list[Planned]:
    """Every artifact that a run can make, in the order of the notebooks. What a notebook only notes down (`FACTS`) is left out."""
    run = dataclasses.replace(run, store=run.store.silent())
    every = [Planned(one, notebook, keys) for one in STAGES for notebook, keys in one.instances(run)]
    return sorted(every, key=lambda p: p.notebook)


def find(run: Run, name: str) -> Planned | None:
    return next((p for p in planned(run) if p.name == name), None)


# Results of a few numbers that a notebook computes and notes down, by the notebook.
FACTS = {
    "judge-check": "04", "second-pass": "05", "mask": "07", "guided-gain": "07b", "generators": "10", "mixed": "10",
    "hard-negatives": "10", "study": "10", "scaling": "11",
}  # fmt: skip


def notebook_of(run: Run, name: str) -> str:
    """Number of the notebook that makes an artifact, empty for one that no run of this profile has."""
    one = find(run, name)
    return one.notebook if one else FACTS.get(name, "")


def trained_generators() -> list[str]:
    return [one.name for one in STAGES if one.kind is Kind.GENERATOR]


def rebuilt(run: Run) -> list[str]:
    """The artifacts that a replay rebuilds from the request logs alone."""
    return [p.name for p in planned(run) if p.kind in REBUILT]


def each(notebook: str, **values: Iterable[Any]) -> Iterator[tuple[str, Keys]]:
    """(notebook, keys) for every value of one key."""
    for key, these in values.items():
        for value in these:
            yield notebook, {key: value}


def note(
    run: Run, name: str, facts: Mapping[str, Any], inputs: Iterable[Artifact] = (), decided_by: Mapping[str, Any] | None = None
) -> Artifact:
    """Artifact `name` (of `FACTS`): a few numbers that a notebook computed from `inputs`, in NAME.json. It is written again where they,
    or the values of `decided_by`, are others."""
    with run.store.stage(name, facts if decided_by is None else decided_by, inputs) as draft:
        if draft:
            write_json(draft.file(f"{name}.json"), facts)
    return run.store.need(name)

"""Topics to tasks to requests: which prompts a stage issues, and in which order.

All choices are pure functions of (topics, brainstormed tasks, counts, data seed): no state, no
global randomness. The same call gives the same requests on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speed_core.data import prompts
from speed_core.data.records import KINDS
from speed_core.files import Lazy

TaskTable = Mapping[tuple[str, str], Sequence[str]]  # (kind, topic) -> brainstormed tasks

# classification : STS : retrieval : matching = 7 : 7 : 7 : 2 (SPEED section 4.1); matching is halved.
RATIO = {"retrieval": 7.0, "classification": 7.0, "sts": 7.0, "short_short": 1.0, "long_long": 1.0}


def split_count(count: int) -> dict[str, int]:
    """Divide `count` over the kinds by `RATIO` (largest remainder, so the parts add up)."""
    total = sum(RATIO.values())
    exact = {k: count * RATIO[k] / total for k in KINDS}
    parts: dict[str, int] = {k: int(v) for k, v in exact.items()}
    by_remainder = sorted(KINDS, key=lambda k: (parts[k] - exact[k], KINDS.index(k)))
    for kind in by_remainder[: count - sum(parts.values())]:
        parts[kind] += 1
    return parts


def plan_brainstorm(
    topics: Sequence[str],
    *,
    max_depth: int = 4,
    truncate: bool = True,
    tasks_per_topic: int = 1,
    style: str = "own",
    clone: str = "",
) -> list[prompts.Prompt]:
    """One brainstorm prompt for each topic and each of its kinds, for three tasks, or as many as are used of a topic."""
    # SPEED's released prompts ask for about five, whatever is used of them.
    count = max(3, tasks_per_topic) if style == "own" else 3
    out = []
    for position, path in enumerate(topics):
        topic = prompts.truncate_topic(path, max_depth) if truncate else path
        kinds = ("retrieval", "classification", *(("short_short",), ("long_long",), ())[position % 3])  # matching in turn
        out += [prompts.brainstorm(k, topic, count=count, style=style, clone=clone) for k in kinds]
    return out


def choose_tasks(table: TaskTable, tasks_per_topic: int = 1, data_seed: int = 0) -> dict[tuple[str, str], list[str]]:
    """Keep `tasks_per_topic` of the brainstormed tasks of each topic (SPEED Table 3: one is best)."""
    chosen = {}
    for (kind, topic), tasks in table.items():
        rng = prompts.rng_for(f"choose|{data_seed}|{kind}|{topic}")
        chosen[kind, topic] = rng.sample(list(tasks), min(tasks_per_topic, len(tasks)))
    return chosen


def plan_synthesis(
    stage: str,
    count: int,
    topics: Sequence[str],
    table: TaskTable,
    *,
    tasks_per_topic: int = 1,
    attributes: str = "paper",
    data_seed: int = 0,
    style: str = "own",
    clone: str = "",
) -> Lazy[prompts.Prompt]:
    """`count` synthesis prompts over the kinds and topics, ordered by record id.

    Ordering by id mixes the kinds, so that any prefix is a small version of the whole: nested
    subsets of one run serve the scaling study. Topics are used in turn; a topic that comes up again
    gets its next task or the next index of the same task, hence other attributes.
    Raises ValueError when a kind has to be written but no topic has a task for it.
    """
    fixed: dict[str, Any] = {"seed": data_seed, "stage": stage, "table": attributes, "style": style}

    def prompt(key: tuple[str, str, str, str, int]) -> prompts.Prompt:
        _, kind, topic, task, turn = key
        return prompts.synthesis(kind, topic, task, index=turn, **fixed, clone=clone)

    chosen = choose_tasks(table, tasks_per_topic, data_seed)
    keys = []
    for kind, number in split_count(count).items():
        usable = [t for t in topics if kind == "sts" or chosen.get((kind, t))]
        if number and not usable:
            raise ValueError(f"kind {kind!r}: none of {len(topics)} topics has a task; brainstorm it first")
        # At a fixed size several tasks per topic mean fewer topics (Table 3).
        usable = usable[: -(-number // tasks_per_topic)]
        for j in range(number):
            topic = usable[j % len(usable)]
            turn = j // len(usable)
            tasks = chosen.get((kind, topic), [""])
            task = tasks[turn % len(tasks)]
            keys.append((prompts.synthesis_id(kind, topic, task, index=turn, **fixed), kind, topic, task, turn))
    return Lazy(prompt, sorted(keys))

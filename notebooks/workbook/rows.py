"""Rows for the figures of notebooks 01 to 06: plain numbers in the form that `basic` and `figures` draw.

A row of an estimate is {label, value, low, high} with a 95% interval; shares lie between 0 and 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from speed_core.evaluation import uncertainty

Row = dict[str, Any]


def topic_depths(paths: Sequence[str], shorten: Callable[[str], str]) -> dict[str, dict[str, int]]:
    """{"raw paths", "truncated": {number of levels, as text: topics}} for `basic.counts`; both have the same levels."""
    raw, cut = (Counter(str(p.count("/") + 1) for p in some) for some in (paths, [shorten(p) for p in paths]))
    levels = sorted(set(raw) | set(cut))
    return {"raw paths": {k: raw[k] for k in levels}, "truncated": {k: cut[k] for k in levels}}


def seed_steps(outcomes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(step, records left) from the teacher's prompts to valid records, for `basic.waterfall`; `outcomes` as in a manifest."""
    prompts = sum(outcomes.values())
    answered = prompts - outcomes["error"]
    complete = answered - outcomes["truncated"] - outcomes["refused"]
    return [("prompts", prompts), ("answered", answered), ("complete", complete), ("valid records", outcomes["ok"])]


def synthesis_steps(outcomes: Mapping[str, int], dropped: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(step, records left) from the senior's prompts to the training set, for `basic.waterfall`.

    `outcomes` as in a manifest; `dropped` are the rows that curation rejected, with `dropped_by`.
    """
    prompts, valid = sum(outcomes.values()), outcomes["ok"]
    twins = sum(r["dropped_by"] == "near-duplicate" for r in dropped)
    return [
        ("prompts", prompts),
        ("complete", prompts - outcomes["truncated"] - outcomes["error"]),
        ("valid records", valid),
        ("no near-duplicate", valid - twins),
        ("no evaluation overlap", valid - len(dropped)),
    ]


def share(label: str, values: Sequence[bool | float]) -> Row:
    """The share of true values with Wilson's interval, which keeps its width even where the share is zero."""
    low, high = uncertainty.share_interval(values)
    return {"label": label, "value": float(np.mean([bool(v) for v in values])), "low": low, "high": high}


def valid_shares(outcomes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The share of valid records among the outcomes {status} of each label."""
    return [share(label, [e["status"] == "ok" for e in some]) for label, some in outcomes.items()]


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each row: its label, value and interval."""
    return ["{label}: {value:.2f} [{low:.2f}, {high:.2f}]".format(**r) for r in rows]


def mean(label: str, values: Sequence[float], scale: float = 1.0) -> Row:
    """`scale` times the mean of `values`, with its bootstrap interval; zero without width where there are no values."""
    low, high = uncertainty.bootstrap_interval(values, "mean") if len(values) else (0.0, 0.0)
    found = {"value": sum(map(float, values)) / max(1, len(values)), "low": low, "high": high}
    return {"label": label} | {k: scale * v for k, v in found.items()}


def evidence(row: Row, what: str) -> Row:
    """What notebook 12 reads of a row without repeated training (`uncertainty.claim_evidence`); `what` says what was measured."""
    return uncertainty.claim_evidence(row["value"], row["low"], row["high"], what)


def kept_by_kind(records: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> list[Row]:
    """For each kind, the share of its valid `records` that curation `kept` (Table 6); a row has `kind`, `valid`, `kept` as well."""
    valid, left = (Counter(r["kind"] for r in some) for some in (records, kept))
    out = []
    for kind in sorted(valid):
        label = f"{kind.replace('_', '-')} ({left[kind]} of {valid[kind]})"
        row = share(label, [k < left[kind] for k in range(valid[kind])])
        out.append(row | {"kind": kind, "valid": valid[kind], "kept": left[kind]})
    return out


def packed_example(tokenizer: Any, pairs: Sequence[Mapping[str, str]], capacity: int = 64) -> dict[str, Any]:
    """One packed row of preference pairs {prompt, chosen, rejected}, for `figures.packed_mask`.

    Each text is cut to a few tokens, so that the mask can be read: the last 8 of the prompt, the first 6 of the chosen and 5 of
    the rejected text. `capacity` is the most tokens of a row.
    """
    from speed_core.preference import prompt_sharing  # with torch, which takes seconds

    groups = []
    for p in pairs:
        texts = [p["prompt"], p["chosen"], p["rejected"]]
        prompt, chosen, rejected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        groups.append(prompt_sharing.PromptGroup(prompt[-8:], [chosen[:6], rejected[:5]], [(0, 1, 1.0)]))
    return prompt_sharing.collate(groups, pad=0, capacity=capacity)

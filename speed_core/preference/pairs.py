"""Preference pairs from judged candidates, and how often one generator's answers beat another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from speed_core.data import prompts, records
from speed_core.data.prompts import Prompt
from speed_core.preference.judge import LlmJudge, RubricJudge


class PairOutcome(StrEnum):
    """What became of a prompt's candidates."""

    PAIR = "pairs"
    NO_VALID_CANDIDATE = "no_valid_candidate"
    SAME_TEXT = "same_text"  # best and worst are
    TIE = "tie"  # their scores differ by less than `min_gap`


def make_pairs(
    judge: RubricJudge | LlmJudge, items: Sequence[tuple[Prompt, Sequence[dict[str, Any]]]], min_gap: float = 0.05
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Preference pairs from root data, (prompt, its candidates' log entries), and the number of prompts of each `PairOutcome`.

    The chosen text must be a valid record.
    """
    pairs: list[dict[str, Any]] = []
    count = {outcome.value: 0 for outcome in PairOutcome}
    for prompt, entries in items:
        texts, ends = [records.own_text(e["raw"], prompt.kind) for e in entries], [e["finish_reason"] for e in entries]
        verdict = judge.judge(prompt, texts, ends)
        chosen, rejected = entries[verdict.best], entries[verdict.worst]
        if chosen["status"] != "ok":
            outcome = PairOutcome.NO_VALID_CANDIDATE
        elif verdict.best == verdict.worst or verdict.scores[verdict.best] - verdict.scores[verdict.worst] < min_gap:
            outcome = PairOutcome.TIE
        elif chosen["raw"].strip() == rejected["raw"].strip():
            outcome = PairOutcome.SAME_TEXT
        else:
            outcome = PairOutcome.PAIR
            pairs.append(
                {
                    "id": prompt.id,
                    "kind": prompt.kind,
                    "prompt": prompt.text,
                    "chosen": texts[verdict.best],
                    "rejected": texts[verdict.worst],
                    "rejected_status": rejected["status"],
                    "score_chosen": verdict.scores[verdict.best],
                    "score_rejected": verdict.scores[verdict.worst],
                    "reason": verdict.reason,
                }
            )
        count[outcome.value] += 1
    return pairs, count


def win_rate(judge: RubricJudge, items: Sequence[tuple[Prompt, dict[str, Any], dict[str, Any]]]) -> np.ndarray:
    """Per prompt: 1 when the first answer scores higher than the second, 0.5 for a tie, 0 otherwise."""
    judge.precompute_embeddings((a["raw"], prompt) for prompt, *answers in items for a in answers)
    out = []
    for prompt, *answers in items:
        first, second = (judge.score(a["raw"], prompt, a["finish_reason"])[0] for a in answers)
        out.append(0.5 if abs(first - second) < 1e-9 else float(first > second))
    return np.array(out)


def prefers_revision(judge: RubricJudge, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """For rows {kind, task, prompt, weak, answer}: 1 where the judge prefers the revision `answer` to the `weak` sample
    that it was made from, 0.5 for a tie, 0 otherwise."""
    items = [prompts.parse_prompt_attributes(r["kind"], r["task"], r["prompt"]) for r in rows]
    answers = [[{"raw": r[name], "finish_reason": "stop"} for name in ("answer", "weak")] for r in rows]
    return win_rate(judge, [(prompt, better, weak) for prompt, (better, weak) in zip(items, answers, strict=True)])

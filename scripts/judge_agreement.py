"""How far the rubric agrees with a blind reader: `assets/recorded/judgements.jsonl` ranks the candidates of 264 lists.

    python scripts/judge_agreement.py     # prints the table of docs/results.md; a minute on two cores

The lists are the 120 root prompts of the recorded run at `overnight` (four candidates of the junior), its 120 unseen prompts (junior,
senior and, where there is one, the revised junior, in random order), and the 24 root prompts of the recorded run at `tiny`, which
are among the 120 but were answered by another junior. The reader, an AI writing assistant, was not told who wrote what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from speed_core.data import teacher
from speed_core.data.prompts import parse_prompt_attributes
from speed_core.evaluation.uncertainty import bootstrap_interval
from speed_core.preference.judge import RubricJudge
from speed_core.study.generation_stages import guide
from speed_core.study.runs import open_run


def agreement(rubric: RubricJudge, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{kind, list, best, worst, tau, chance} of each list that the reader did not leave wholly tied.

    `best`, `worst`: whether the rubric's best (worst) candidate has the reader's first (last) rank; `chance`: the share of candidates
    that have the first rank; `tau`: Kendall's tau-b of both orders.
    """
    asked = [parse_prompt_attributes(r["kind"], r["task"], r["prompt"]) for r in rows]
    rubric.precompute_embeddings((text, prompt) for r, prompt in zip(rows, asked, strict=True) for text in r["candidates"])
    out = []
    for r, prompt in zip(rows, asked, strict=True):
        ranks = np.array(r["ranks"])
        if len(set(ranks)) > 1:
            scores = [rubric.score(text, prompt)[0] for text in r["candidates"]]
            tau = float(kendalltau(-ranks, scores).statistic) if len(set(scores)) > 1 else 0.0
            found = {"best": ranks[np.argmax(scores)] == 1, "worst": ranks[np.argmin(scores)] == max(ranks), "tau": tau}
            out.append({"kind": r["kind"], "list": r["list"], "chance": float(np.mean(ranks == 1)), **found})
    return out


def main() -> None:
    found = agreement(RubricJudge(guide(open_run("overnight"))), teacher.recorded_rows("judgements"))
    print("| lists | n | best (chance) | worst | Kendall's tau |\n|---|---|---|---|---|")
    groups = {name: [r for r in found if r["list"] == name] for name in ("root", "unseen", "root, tiny")}
    groups |= {f"root, {kind}": [r for r in groups["root"] if r["kind"] == kind] for kind in sorted({r["kind"] for r in found})}
    for name, rows in groups.items():
        shown = []
        for key in ("best", "worst", "tau"):
            values = [float(r[key]) for r in rows]
            low, high = bootstrap_interval(values, "mean")
            chance = f" ({np.mean([r['chance'] for r in rows]):.2f})" if key == "best" else ""
            shown.append(f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]{chance}")
        print(f"| {name} | {len(rows)} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()

"""Notebook 09: scores of several models side by side, and their differences by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from speed_core.evaluation import evaluate, uncertainty
from speed_core.evaluation.uncertainty import Result
from speed_core.study import paper_values

Results = Mapping[str, Sequence[Result]]  # {model: results of its seeds}


def by_task(results: Results) -> pd.DataFrame:
    """Scores times 100: a row for each task, a column for each model (its mean over the seeds), and with several seeds the standard
    deviation of "guided" over them."""

    def points(result: Result) -> dict[str, float]:
        return {task: 100 * entry["score"] for task, entry in result["tasks"].items()}

    each = {name: pd.DataFrame(map(points, found)) for name, found in results.items()}
    table = pd.DataFrame({name: scores.mean() for name, scores in each.items()})
    if len(results["guided"]) > 1:
        table["sd guided"] = each["guided"].std()
    return table


def by_category(results: Results) -> pd.DataFrame:
    """Means over the tasks of a category, as in Table 1, with SPEED's own on MTEB as the last column."""
    each = {name: pd.DataFrame([evaluate.category_means(dict(r)) for r in found]) for name, found in results.items()}
    means = pd.DataFrame({name: scores.mean() for name, scores in each.items()})
    means["SPEED 7B, MTEB-56"] = paper_values.SPEED_SCORES
    return means


def benchmarks(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """The means of each benchmark of MTEB among `tasks` over the seeds, in points; empty where none is asked for. Raises UserError when
    a task of a benchmark was not scored."""
    each = [evaluate.benchmark_means(dict(r), tasks) for r in results]
    means = {name: pd.DataFrame([found[name] for found in each]).mean().round(1).to_string() for name in each[0]}
    return "\n\n".join(f"{name}\n{text}" for name, text in means.items())


def differences(a: Sequence[Result], b: Sequence[Result], draws: int) -> list[dict[str, Any]]:
    """Rows of a figure: `a` minus `b` over all tasks and over each type of task, with intervals over texts and seeds."""
    types: dict[str, list[str] | None] = {"all tasks": None}
    types |= {t: [t] for t in dict.fromkeys(entry["type"] for entry in a[0]["tasks"].values())}
    return [uncertainty.difference(a, b, names, draws=draws).row(label) for label, names in types.items()]


def overlap(report: Mapping[str, Mapping[str, Any]], scores: pd.Series) -> pd.DataFrame:
    """The report of `contamination-synthetic` as a table, beside the `scores` of the trained model.

    Columns: texts, ngram_before and ngram_after (percent of them that share `curate.overlap_words` consecutive words with a training
    record, before curation and after it; NaN where each text is a single word), near (percent whose nearest training text under the
    guide has a cosine of at least `contamination.NEAR`), mean and highest of these cosines.
    """
    seen = pd.DataFrame(report).T.drop(columns=["checked", "pair"]).astype(float).astype({"texts": int})
    seen.insert(0, "score", scores)
    seen[["ngram_before", "ngram_after", "near"]] *= 100
    return seen


def closest(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation text and the training text that are nearest to each other, and their task; of sentences where there are any."""
    sentences = {task: entry for task, entry in report.items() if entry["checked"]} or report
    task, top = max(sentences.items(), key=lambda item: item[1]["closest"])
    return "\n".join([f"closest pair: cosine {top['closest']:.2f}, {task}", *(f"   {text!r}" for text in top["pair"])])

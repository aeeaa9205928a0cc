"""Measurements of notebooks 04 to 06 and 09 that take more lines than a cell has: log-probabilities of a text, score gains, a slow count,
the difference of two arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speed_core import console
from speed_core.data import curate, minhash
from speed_core.data.prompts import Prompt
from speed_core.files import UserError
from speed_core.models import compute_type, loading, token_logprobs
from speed_core.preference import prompt_sharing, usable_pairs
from speed_core.preference.judge import RubricJudge
from speed_core.profile import Curate
from speed_core.store.run_context import Run
from speed_core.study import generator_answers

NO_WEIGHTS = "(a replay has no weights: zeros stand for the log-probabilities)"


def four_log_probs(run: Run, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What Eq. 2 reads of the first of the `pairs` {prompt, chosen, rejected} that can be trained on: log-probabilities of whole texts.

    {policy_chosen, policy_rejected} under this run's senior, {reference_chosen, reference_rejected} under its junior. UserError
    where no pair is usable. The senior's adapter lies on the junior's merged weights, so one model gives all four. A replay has no
    weights: it prints so, and gives zeros.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = [f"{who}_{side}" for who in ("policy", "reference") for side in ("chosen", "rejected")]
    if run.replay:
        print(NO_WEIGHTS)
        return dict.fromkeys(names, 0.0)
    console.quiet()
    folder, adapter = generator_answers.generator_weights(run, "senior")
    loading.check_adapter(adapter, folder)
    tokenizer = loading.load_tokenizer(folder)
    groups, skipped = usable_pairs.check_pairs(tokenizer, [dict(p) for p in pairs], run.profile.senior.max_length, most=1)
    if not groups:
        counts = {reason: len(rows) for reason, rows in skipped.items()}
        raise UserError(f"pairs: none of {len(pairs)} can be trained on; set aside: {counts}")
    dtype = compute_type.torch_type(compute_type.choose("auto", folder=folder).name)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    token_logprobs.hidden_states_only(model)
    batch = prompt_sharing.collate(groups, tokenizer.pad_token_id)
    sides = batch["pairs"][0]
    with torch.no_grad():
        policy = prompt_sharing.completion_log_probs(model, batch)[sides]
        with model.disable_adapter():
            reference = prompt_sharing.completion_log_probs(model, batch)[sides]
    return dict(zip(names, [*policy.tolist(), *reference.tolist()], strict=True))


def revisor_log_probs(run: Run, asked: Sequence[str], written: str) -> tuple[list[str], list[list[float]]]:
    """(tokens of `written`, the log-probability of each of them under this run's revisor after each of the texts `asked`).

    A replay has no weights: it prints so, and gives zeros.
    """
    name = run.profile.models.generator
    tokenizer = loading.load_tokenizer(name)
    if run.replay:
        print(NO_WEIGHTS)
        tokens = [tokenizer.decode([t]) for t in tokenizer(written, add_special_tokens=False)["input_ids"]]
        return tokens, [[0.0] * len(tokens) for _ in asked]
    console.quiet()
    model = loading.load_causal_lm(*generator_answers.generator_weights(run, "revisor"))
    found = [token_log_probs(model, tokenizer, text, written) for text in asked]
    return found[0][0], [logps for _, logps in found]


def token_log_probs(model: Any, tokenizer: Any, read: str, written: str) -> tuple[list[str], list[float]]:
    """(tokens of `written`, the log-probability that a generator gives each of them) after it has read `read`.

    Both texts are tokenised as in training; the token that ends the text is left out.
    """
    import torch

    from speed_core.generation import sft

    (row,), _ = sft.encode_rows(tokenizer, [(read, written)], max_length=1 << 20)
    ids, scored = torch.tensor([row["input_ids"]]), torch.tensor([row["completion_mask"]]).bool()
    with torch.no_grad():
        found = token_logprobs.token_log_probs(model, ids, torch.ones_like(ids), scored)[scored]
    return [tokenizer.decode([t]) for t in ids[scored].tolist()[:-1]], found.tolist()[:-1]


def rewritten(
    after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
) -> list[tuple[str, str, Prompt]]:
    """(new text, old text, prompt) of each valid outcome of `after`; outcomes {record, status, raw} are joined by their record."""
    old, asked = {e["record"]: e["raw"] for e in before}, {q.id: q for q in prompts}
    return [(e["raw"], old[e["record"]], asked[e["record"]]) for e in after if e["status"] == "ok"]


def gains(judge: RubricJudge, texts: Sequence[tuple[str, str, Prompt]]) -> list[float]:
    """For each (new text, old text, prompt): the judge's score of the new one minus that of the old one."""
    return [judge.score(new, q)[0] - judge.score(old, q)[0] for new, old, q in texts]


def length_drift(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[int]:
    """Words of the second answer minus words of the first, for each prompt that both answered with a valid record.

    Outcomes {raw, status} in the same order of prompts.
    """
    pairs = zip(before, after, strict=True)
    return [len(b["raw"].split()) - len(a["raw"].split()) for a, b in pairs if a["status"] == b["status"] == "ok"]


def duplicates_one_by_one(records: Sequence[Mapping[str, Any]], settings: Curate) -> set[str]:
    """Ids of the records that are near-duplicates of an earlier kept one of their kind, found by comparing every pair.

    The rule of `curate.near_duplicates` without hashing: the time grows with the square of the number of records.
    """
    runs = [minhash.shingles(curate.record_text(r), settings.shingle) for r in records]
    kept: list[int] = []
    for i, r in enumerate(records):
        alike = (minhash.jaccard(runs[k], runs[i]) for k in kept if records[k]["kind"] == r["kind"])
        if not any(score >= settings.threshold for score in alike):
            kept.append(i)
    return {r["id"] for r in records} - {records[i]["id"] for i in kept}


def compare(
    run: Run, results: Mapping[str, Sequence[Any]], one: str, other: str, figure: str, title: str,
    published: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Draw and print arm `one` minus arm `other` of `results`, over all tasks and by type of task: {label: row {value, low, high, ...}}.

    `published`: {label: the paper's difference}. Both arms' scores are in the run (`scores-ARM-SEED` or `scores-ARM`).
    """
    from speed_core.plots import basic
    from speed_core.study import score_stages  # with mteb, which takes seconds
    from workbook import score_tables

    rows = score_tables.differences(results[one], results[other], run.profile.evaluation.bootstrap)
    arms = [score_stages.scored(run, a) or [run.store.need(f"scores-{a}")] for a in (one, other)]
    basic.estimates(run, figure, rows, sum(arms, []), title, "points", paper=published, line=0)
    for r in rows:
        print(f"{r['label']:16} {r['value']:+6.2f} [{r['low']:+.2f}, {r['high']:+.2f}]")
    return {r["label"]: r for r in rows}

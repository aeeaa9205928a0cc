"""Which preference pairs can be trained on, as groups of one prompt; every other pair is counted by reason and row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from speed_core.files import UserError
from speed_core.models import loading, training
from speed_core.preference.prompt_sharing import PromptGroup


class Skipped(StrEnum):
    """Why a pair is not trained on."""

    SAME = "same"  # chosen equals rejected
    EMPTY = "empty"  # one side is
    TRUNCATED = "truncated"  # cut at the token limit: training would teach an <eos> that nobody wrote
    TOO_LONG = "too_long"  # prompt and one completion have more than `max_length` tokens
    # The prompt has other tokens alone (as at generation time) than joined to its completion: the loss would not start where
    # the text does.
    TOKENIZATION_BOUNDARY = "joins"


def check_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, Any]], max_length: int, *, share: bool = True, most: int | None = None
) -> tuple[list[PromptGroup], dict[str, list[int]]]:
    """Groups of pairs {prompt, chosen, rejected[, weight, truncated, rejected_status]}, and the numbers of the rows skipped for
    each reason (`Skipped`).

    Pairs of one prompt become one group, each text once. Rows behind the `most`-th usable pair are not looked at. UserError for
    a row of another form.
    """
    skipped: dict[str, list[int]] = {reason.value: [] for reason in Skipped}
    groups: dict[str, PromptGroup] = {}
    places: dict[tuple[str, str], int] = {}  # of each text among its group's completions
    usable = 0
    for number, pair in enumerate(pairs):
        if usable == most:
            break
        _check_row(number, pair)
        text, sides = training.prompt_text(pair["prompt"]), (pair["chosen"], pair["rejected"])
        prompt = loading.encode_prompt(tokenizer, text)
        completions = [tokenizer(side, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for side in sides]
        if not all(side.strip() for side in sides):
            skipped[Skipped.EMPTY].append(number)
        elif sides[0].strip() == sides[1].strip():
            skipped[Skipped.SAME].append(number)
        elif pair.get("truncated") or pair.get("rejected_status") == "truncated":
            skipped[Skipped.TRUNCATED].append(number)
        elif len(prompt) + max(map(len, completions)) > max_length:
            skipped[Skipped.TOO_LONG].append(number)
        elif any(loading.encode_prompt(tokenizer, text + side)[: len(prompt)] != prompt for side in sides):
            skipped[Skipped.TOKENIZATION_BOUNDARY].append(number)
        else:
            key = pair["prompt"] if share else str(number)
            group = groups.setdefault(key, PromptGroup(prompt, [], []))
            for side, ids in zip(sides, completions, strict=True):
                if (key, side) not in places:
                    places[key, side] = len(group.completions)
                    group.completions.append(ids)
            group.pairs.append((places[key, sides[0]], places[key, sides[1]], float(pair.get("weight", 1.0))))
            group.rows.append(number)
            usable += 1
    return list(groups.values()), skipped


def _check_row(number: int, pair: dict[str, Any]) -> None:
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(pair.get(key), str):
            raise UserError(
                f"senior: pair {number}: {key} is {pair.get(key, 'missing')!r}, not a text; correct or remove the row"
            )
    training.refuse_surrogates(number, **{key: pair[key] for key in ("prompt", "chosen", "rejected")})
    weight = pair.get("weight", 1.0)
    if type(weight) not in (int, float) or not math.isfinite(weight) or weight <= 0:
        raise UserError(f"senior: pair {number}: weight is {weight!r}, not a positive number; correct or remove the row")

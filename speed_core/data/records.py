"""The five kinds of synthetic example, and the parser that reads all model text.

A generator answers a prompt with one JSON object. `parse` decides what that text is: a usable example, or a named reason
why not. It never repairs, rewrites or evaluates the text: a newline inside a value stays a newline, and a record that
cannot be read is counted, not fixed. The JSON keys are those of SPEED's released prompts.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from speed_core.files import surrogate


class Status(StrEnum):
    """How a request ends. Every request ends in exactly one of these."""

    OK = "ok"
    INVALID = "invalid"  # the text breaks a rule, which `Outcome.reason` names
    REFUSED = "refused"
    TRUNCATED = "truncated"  # cut off at the token limit
    ERROR = "error"  # there is no text


WEAK = (Status.INVALID, Status.TRUNCATED, Status.REFUSED)  # there is a text, but no record: worth another attempt

FIELDS = ("query", "positive", "negative")
# The five tasks of SPEED: kind -> JSON keys in the order of FIELDS; the last two, its matching tasks, have no negative.
KEYS: dict[str, tuple[str, ...]] = {
    "retrieval": ("user_query", "positive_document", "hard_negative_document"),
    "classification": ("input_text", "label", "misleading_label"),
    "sts": ("S1", "S2", "S3"),
    "short_short": ("input", "positive_document"),
    "long_long": ("input", "positive_document"),
}
KINDS = tuple(KEYS)

# Longest value that is accepted, in characters.
MAX_CHARS = 4000

_REFUSALS = ("i'm sorry", "i am sorry", "sorry, ", "i cannot", "i can't", "as an ai", "i'm unable", "i am unable")

# Parts of the words in which servers say that a text was held back; "refusal" is a message's own field.
REFUSED = re.compile("content[-_ ]?filter|guardrail|safety|toxic|recitation|prohibited|block|moderat|spii|sensitive|refus")


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    `reason` names the rule that failed (empty when ok). `record` holds {"query", "positive", "negative"} when ok, else None.
    """

    status: Status
    reason: str = ""
    record: dict[str, str | None] | None = None
    raw: str = field(default="", repr=False)


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of a record of `kind`."""
    keys = KEYS[kind]
    return {
        "type": "object",
        "properties": {k: {"type": "string", "minLength": 1, "maxLength": MAX_CHARS} for k in keys},
        "required": list(keys),
        "additionalProperties": False,
    }


Span = tuple[Any, int, int]  # a value, where it starts in the text, and where it ends


def _objects(raw: str, opening: str = "{") -> list[Span]:
    """(value, start, end) of each JSON value in `raw` that begins with `opening` and stands in no other one.

    A real JSON parser reads each, so a brace inside a string ends nothing (the released parser's non-greedy regex ends there). Text
    around them is allowed; a Markdown fence is the usual case.
    """
    decoder, found = json.JSONDecoder(), []
    start = raw.find(opening)
    while start >= 0:
        try:
            value, end = decoder.raw_decode(raw, start)
            found.append((value, start, end))
        except (ValueError, RecursionError):
            end = start + 1
        start = raw.find(opening, end)
    return found


_NAMES = "(?:seed:)?think(?:ing)?|thoughts?|reasoning|reflection|scratchpad"
OPENS = re.compile(
    rf"(?i)<(?:{_NAMES})>|[\[◁]think[\]▷]|<\|(?:begin_of_thought|start_thinking)\|>|<\|channel\|>(?:analysis|commentary)"
)
CLOSES = re.compile(rf"(?i)</(?:{_NAMES})>|[\[◁]/think[\]▷]|<\|end_(?:of_thought|thinking)\|>|<\|channel\|>final|assistantfinal")


def _thought(text: str) -> int:
    """Where the last closing tag of thinking ends; 0 where there is none."""
    return max((m.end() for m in CLOSES.finditer(text)), default=0)


def _answered(raw: str, found: list[Span]) -> list[Span]:
    """The values of `found` that belong to the answer: what a model wrote while it was thinking is set aside.

    Thinking ends at the last closing tag (the opening one may stand in the prompt) and lasts to the end where it is never closed. A tag
    inside of a value is the value's own text.
    """
    prose = list(raw)
    for _, start, end in found:
        prose[start:end] = " " * (end - start)
    outside = "".join(prose)
    after = _thought(outside)
    opened = OPENS.search(outside, after)
    return [v for v in found if v[1] >= after and (opened is None or v[2] <= opened.start())]


def objects(raw: str) -> list[dict[str, Any]]:
    """The JSON objects of an answer, in their order, without those of its thinking."""
    return [v for v, _, _ in _answered(raw, _objects(raw))]


def own_text(raw: str, kind: str) -> str:
    """The text of the record in a valid answer, to be learned or shown to a model: `raw` itself, but where thinking or further objects
    stand beside it, the object alone."""
    found = _objects(raw)
    if len(found) <= 1 and not CLOSES.search(raw) and not OPENS.search(raw):
        return raw
    fitting = [raw[start:end] for v, start, end in _answered(raw, found) if not broken_rule(v, kind)]
    return fitting[-1] if fitting else raw


def unfinished(raw: str, finish_reason: str) -> Outcome | None:
    """The outcome of a text that was not written to its end, or was refused; None when the model says that it is complete."""
    if finish_reason == "length":
        return Outcome(Status.TRUNCATED, "length", raw=raw)
    if REFUSED.search(finish_reason):
        return Outcome(Status.REFUSED, finish_reason, raw=raw)
    return None if finish_reason == "stop" else invalid(f"finish_reason:{finish_reason}", raw)


def invalid(reason: str, raw: str) -> Outcome:
    """The outcome of a text that breaks the rule `reason`."""
    return Outcome(Status.INVALID, reason, raw=raw)


def parse(raw: str, kind: str, finish_reason: str = "stop") -> Outcome:
    """Classify one raw model output for `kind`; never raises on any string.

    `finish_reason == "length"` means the model was cut off: such text is `truncated`, whatever it looks like. Thinking is set aside.
    Of several objects the one that fits the kind counts; two different ones that fit are `ambiguous`. Reasons of `invalid`: empty,
    no_object, not_json, only_thinking, ambiguous, finish_reason:WORD (a word that does not mean complete), and those of `broken_rule`.
    """
    if kind not in KEYS:
        raise ValueError(f"kind {kind!r}: unknown; use one of {', '.join(KEYS)}")
    if cut := unfinished(raw, finish_reason):
        return cut
    if not raw.strip():
        return invalid("empty", raw)
    found = _objects(raw)
    answers = [v for v, _, _ in _answered(raw, found)]
    if not answers:
        if "{" in raw and not found:
            return invalid("not_json", raw)
        if "{" not in raw and raw.strip().lower().replace("\u2019", "'").startswith(_REFUSALS):
            return Outcome(Status.REFUSED, "refusal_text", raw=raw)
        return invalid("only_thinking" if found or OPENS.search(raw) else "no_object", raw)
    fitting = [v for v in answers if not broken_rule(v, kind)]
    if not fitting:
        return invalid(broken_rule(answers[-1], kind), raw)
    if any(v != fitting[0] for v in fitting):
        return invalid("ambiguous", raw)
    values = [fitting[-1][k] for k in KEYS[kind]]
    return Outcome(Status.OK, record=dict(zip(FIELDS, [*values, None], strict=False)), raw=raw)


def broken_rule(value: dict[str, Any], kind: str) -> str:
    """The first rule of `kind` that a decoded object breaks, or "".

    Rules: missing_key:K, unknown_key, not_a_string:K, blank:K, too_long:K, lone_surrogate:K, query_equals_positive,
    positive_equals_negative, query_equals_negative.
    """
    keys = KEYS[kind]
    if missing := [key for key in keys if key not in value]:
        return f"missing_key:{missing[0]}"
    if len(value) > len(keys):
        return "unknown_key"
    for key in keys:
        text = value[key]
        if not isinstance(text, str):
            return f"not_a_string:{key}"
        if not text.strip():
            return f"blank:{key}"
        if len(text) > MAX_CHARS:
            return f"too_long:{key}"
        if surrogate(text):
            return f"lone_surrogate:{key}"
    texts = {name: value[key].strip().lower() for name, key in zip(FIELDS, keys, strict=False)}
    for a, b in (("query", "positive"), ("positive", "negative"), ("query", "negative")):
        if b in texts and texts[a] == texts[b]:
            return f"{a}_equals_{b}"
    return ""


def parse_string_list(raw: str, finish_reason: str = "stop") -> tuple[list[str], str]:
    """Read a brainstorm answer: a list of strings, as JSON or as a Python literal.

    The brainstorm prompts ask for "a list of strings"; models answer either way. JSON is tried first, then `ast.literal_eval`, which
    reads literals only and cannot run code. Thinking is set aside as in `parse`, and of several lists the one of strings counts.
    Returns the strings and a reason (empty when the answer is good). Duplicates are dropped, order is kept.
    """
    if cut := unfinished(raw, finish_reason):
        return [], cut.reason
    whole = _outermost(raw, 0)
    found = _objects(raw, "[")
    if whole is None:
        lists = [v for v, _, _ in _answered(raw, found)]
        if not any(map(_strings, lists)):
            late = _outermost(raw, _thought(raw))
            lists = lists if late is None else [late]
    else:
        opened = OPENS.search(raw, 0, raw.index("["))
        lists = [] if opened and not CLOSES.search(raw, opened.end(), raw.index("[")) else [whole]
    if not lists:
        return [], "only_thinking" if found or whole is not None else "not_a_list" if "[" in raw and "]" in raw else "no_list"
    good = [v for v in lists if _strings(v)]
    if any(v != good[0] for v in good):
        return [], "ambiguous"
    if not good:
        return [], "not_strings" if any(lists) else "empty_list"
    if any(surrogate(v) for v in good[0]):
        return [], "lone_surrogate"
    tasks = list(dict.fromkeys(v.strip() for v in good[0] if v.strip()))
    return tasks, "" if tasks else "empty_list"


def _strings(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(v, str) for v in value)


def _outermost(raw: str, after: int) -> list[Any] | None:
    """The list from the first bracket behind `after` to the last one, as JSON or as a Python literal; None where that is no list."""
    start = raw.find("[", after)
    text = raw[start : raw.rfind("]") + 1] if start >= 0 else ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
    return value if isinstance(value, list) else None


def released_parser_verdict(raw: str, kind: str) -> str:
    """What SPEED's released repair code would do with `raw`: kept, changed or lost.

    A description in our own code, for the drop microscope: text that is JSON as a whole is read as it
    is; otherwise newlines are deleted, a fence is taken off, and the first "{" up to the first "}" is read.
    """
    try:
        value = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        bare = raw.strip().replace("\n", "").removeprefix("```").removesuffix("```").removeprefix("json")
        start = bare.find("{")
        end = bare.find("}", start)
        try:
            value = json.loads(bare[start : end + 1], strict=False) if 0 <= start < end else None
        except (ValueError, RecursionError):
            return "lost"
    if not isinstance(value, dict) or KEYS[kind][0] not in value:
        return "lost"
    ours = [v for v, _, _ in _objects(raw)]
    return "kept" if ours and value == ours[0] else "changed"

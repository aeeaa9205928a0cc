"""The five kinds of synthetic example, and the one door through which model text enters.

A generator answers a prompt with one JSON object. `parse` decides what that text is: a usable
example, or a named reason why not. It never repairs, rewrites or evaluates the text: a newline
inside a value stays a newline, and a record that cannot be read is counted, not fixed.
Keys follow SPEED's released prompts (paper-facts in short: retrieval asks for user_query,
positive_document, hard_negative_document, and so on).
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from speed_core.files import surrogate

Kind = Literal["retrieval", "classification", "sts", "short_short", "long_long"]
Status = Literal["ok", "invalid", "refused", "truncated", "error"]

KINDS: tuple[Kind, ...] = ("retrieval", "classification", "sts", "short_short", "long_long")

# kind -> JSON keys in the order (query, positive, negative); the matching kinds have no negative.
KEYS: dict[str, tuple[str, ...]] = {
    "retrieval": ("user_query", "positive_document", "hard_negative_document"),
    "classification": ("input_text", "label", "misleading_label"),
    "sts": ("S1", "S2", "S3"),
    "short_short": ("input", "positive_document"),
    "long_long": ("input", "positive_document"),
}

# Longest value that is accepted, in characters. It bounds the grammar too (see `schema`), so that
# constrained decoding always ends.
MAX_CHARS = 4000

_REFUSALS = ("i'm sorry", "i am sorry", "sorry, ", "i cannot", "i can't", "as an ai", "i'm unable", "i am unable")


# Parts of the words in which servers say that a text was held back; "refusal" is a message's own field.
REFUSED = re.compile("content[-_ ]?filter|guardrail|safety|toxic|recitation|prohibited|block|moderat|spii|sensitive|refus")


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    `status` is one of ok, invalid, refused, truncated, error. `reason` names the rule that failed
    (empty when ok). `record` holds {"query", "positive", "negative"} when ok, else None.
    """

    status: Status
    reason: str = ""
    record: dict[str, str | None] | None = None
    raw: str = field(default="", repr=False)
    retryable: bool = False


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


_NAMES = "think|thinking|thought|reasoning"
OPENS = re.compile(rf"(?i)<(?:{_NAMES})>|\[think\]|<\|begin_of_thought\|>|<\|channel\|>(?:analysis|commentary)")
CLOSES = re.compile(rf"(?i)</(?:{_NAMES})>|\[/think\]|<\|end_of_thought\|>|<\|channel\|>final|assistantfinal")


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
    fitting = [raw[start:end] for v, start, end in _answered(raw, found) if check_fields(v, kind).status == "ok"]
    return fitting[-1] if fitting else raw


def unfinished(raw: str, finish_reason: str) -> Outcome | None:
    """The outcome of a text that was not written to its end, or was refused; None when the model says that it is complete."""
    if finish_reason == "length":
        return Outcome("truncated", "length", raw=raw)
    if REFUSED.search(finish_reason):
        return Outcome("refused", finish_reason, raw=raw)
    if finish_reason != "stop":
        return Outcome("invalid", f"finish_reason:{finish_reason}", raw=raw)
    return None


def parse(raw: str, kind: str, finish_reason: str = "stop") -> Outcome:
    """Classify one raw model output for `kind`; never raises on any string.

    `finish_reason == "length"` means the model was cut off: such text is `truncated`, whatever it looks like. Thinking is set aside.
    Of several objects the one that fits the kind counts; two different ones that fit are `ambiguous`. Reasons of `invalid`: empty,
    no_object, not_json, only_thinking, ambiguous, missing_key:K, unknown_key, not_a_string:K, blank:K, too_long:K, lone_surrogate:K,
    query_equals_positive, positive_equals_negative, query_equals_negative, finish_reason:WORD (a word that does not mean complete).
    """
    if kind not in KEYS:
        raise ValueError(f"kind {kind!r}: unknown; use one of {', '.join(KEYS)}")
    if cut := unfinished(raw, finish_reason):
        return cut
    if not raw.strip():
        return Outcome("invalid", "empty", raw=raw)
    found = _objects(raw)
    objects = [v for v, _, _ in _answered(raw, found)]
    if not objects:
        if raw.strip().lower().replace("\u2019", "'").startswith(_REFUSALS) and "{" not in raw:
            return Outcome("refused", "refusal_text", raw=raw)
        thought = "only_thinking" if found or OPENS.search(raw) else "no_object"
        return Outcome("invalid", "not_json" if "{" in raw and not found else thought, raw=raw)
    outcomes = [check_fields(value, kind, raw) for value in objects]
    fitting = [o for o in outcomes if o.status == "ok"]
    if any(o.record != fitting[0].record for o in fitting):
        return Outcome("invalid", "ambiguous", raw=raw)
    return fitting[-1] if fitting else outcomes[-1]


def check_fields(value: dict[str, Any], kind: str, raw: str = "") -> Outcome:
    """Apply the field rules of `kind` to an already decoded object."""
    keys = KEYS[kind]
    for key in keys:
        if key not in value:
            return Outcome("invalid", f"missing_key:{key}", raw=raw)
    for key in value:
        if key not in keys:
            return Outcome("invalid", "unknown_key", raw=raw)
    for key in keys:
        text = value[key]
        if not isinstance(text, str):
            return Outcome("invalid", f"not_a_string:{key}", raw=raw)
        if not text.strip():
            return Outcome("invalid", f"blank:{key}", raw=raw)
        if len(text) > MAX_CHARS:
            return Outcome("invalid", f"too_long:{key}", raw=raw)
        if surrogate(text):
            return Outcome("invalid", f"lone_surrogate:{key}", raw=raw)
    query, positive = value[keys[0]], value[keys[1]]
    negative = value[keys[2]] if len(keys) == 3 else None
    same = {"query_equals_positive": (query, positive)}
    if negative is not None:
        same["positive_equals_negative"] = (positive, negative)
        same["query_equals_negative"] = (query, negative)
    for reason, (a, b) in same.items():
        if a.strip().lower() == b.strip().lower():
            return Outcome("invalid", reason, raw=raw)
    return Outcome("ok", record={"query": query, "positive": positive, "negative": negative}, raw=raw)


def to_json(record: dict[str, str | None], kind: str) -> str:
    """The JSON text that a generator is trained to write for `record` (inverse of `parse`)."""
    values = (record["query"], record["positive"], record["negative"])
    return json.dumps(dict(zip(KEYS[kind], values, strict=False)), ensure_ascii=False, separators=(",", ":"))


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

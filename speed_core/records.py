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
from dataclasses import dataclass, field
from typing import Any, Literal

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

_REFUSALS = ("i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "i'm unable", "i am unable")


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


def _find_object(raw: str) -> tuple[Any, str]:
    """First JSON object in `raw` that decodes, and the reason if none does.

    `raw_decode` reads a whole object with a real JSON parser, so a brace inside a string does not
    end it (the released parser's non-greedy regex does). Text around the object is allowed; a
    Markdown fence is the usual case.
    """
    start = raw.find("{")
    if start < 0:
        return None, "no_object"
    decoder = json.JSONDecoder()
    first_error = "not_json"
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(raw, start)
        except (ValueError, RecursionError):
            start = raw.find("{", start + 1)
            continue
        return value, ""
    return None, first_error


def parse(raw: str, kind: str, finish_reason: str = "stop") -> Outcome:
    """Classify one raw model output for `kind`; never raises on any string.

    `finish_reason == "length"` means the model was cut off: such text is `truncated`, whatever it
    looks like. Reasons of `invalid`: empty, no_object, not_json, not_an_object, missing_key:K,
    unknown_key:K, not_a_string:K, blank:K, too_long:K, query_equals_positive,
    positive_equals_negative, query_equals_negative.
    """
    if kind not in KEYS:
        raise ValueError(f"kind {kind!r}: unknown; use one of {', '.join(KEYS)}")
    if finish_reason == "length":
        return Outcome("truncated", "length", raw=raw)
    if not raw.strip():
        return Outcome("invalid", "empty", raw=raw)
    value, why = _find_object(raw)
    if why:
        lowered = raw.strip().lower()
        if why == "no_object" and lowered.startswith(_REFUSALS):
            return Outcome("refused", "refusal_text", raw=raw)
        return Outcome("invalid", why, raw=raw)
    if not isinstance(value, dict):
        return Outcome("invalid", "not_an_object", raw=raw)
    return check_fields(value, kind, raw)


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
        if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
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

    The brainstorm prompts ask for "a list of strings"; models answer either way. JSON is tried
    first, then `ast.literal_eval`, which reads literals only and cannot run code. Returns the
    strings and a reason (empty when the answer is good). Duplicates are dropped, order is kept.
    """
    if finish_reason == "length":
        return [], "length"
    start, end = raw.find("["), raw.rfind("]")
    if start < 0 or end < start:
        return [], "no_list"
    text = raw[start : end + 1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return [], "not_a_list"
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return [], "not_strings"
    tasks = list(dict.fromkeys(v.strip() for v in value if v.strip()))
    return tasks, "" if tasks else "empty_list"


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
    ours = _find_object(raw)[0]
    return "kept" if value == ours else "changed"

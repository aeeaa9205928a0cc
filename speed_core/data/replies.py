"""What an OpenAI-compatible server says: a completion of any shape, a refusal in its own words, or how long to wait."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

T = TypeVar("T")
RETRYABLE = (408, 409, 425, 429)  # of the 4xx; 5xx are all tried again
OF_REQUEST = (400, 413, 414, 415, 422)  # this request is refused; other 4xx refuse the key, the model or the address
# What servers call a text that is whole, or cut at the limit. Any other word is handed on, and never counts as whole.
WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")
CUT = ("length", "max_tokens", "model_length")
# Words for what no other request would escape, which some servers send with 400 or 429. A 429 may speak of billing and yet pass.
SPENT = re.compile(
    r"(?i)invalid[_ ]api[_ ]key|api[_ ]key[_ ](has[_ ]been[_ ]|has[_ ]|is[_ ])?(not[_ ]?valid|invalid|expired|revoked|disabled)"
    r"|insufficient[_ ](quota|balance)"
)
OF_ALL = re.compile(
    SPENT.pattern + r"|model[_ ](is |id )?not[_ ](found|exist|valid)|model does not exist|billing|arrearage"
    r"|model[_ ](is[_ ]|has[_ ]been[_ ])?(decommissioned|deprecated)|invalid[_ ]model\b|organi[sz]ation.{0,30}(disabled|deactivated|suspended)"
)
FILTERED = re.compile(
    r"(?i)content[_ ](filter|policy|exists risk)|moderation|flagged|inappropriate|data[_ ]?inspection|safety system"
)


@dataclass(frozen=True)
class Completion:
    """One text that a model wrote for the request `id`. Token counts are for speed and cost.

    `finish_reason` is "stop", "length", the server's own word, or "error" where the request was refused for good: then `text`
    says why.
    """

    id: str
    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    new_tokens: int = 0
    counted: bool = True  # else the token counts are estimates


class NoAnswer(Exception):
    """A reply that is no completion: a gateway's error, a page of HTML, null."""


def read(body: str | bytes, request: str, prompt_tokens: float) -> Completion:
    """The completion for `request` in the body of a reply, chat or not, whatever its shape. Raises NoAnswer where the body
    is none, UnicodeDecodeError where it is no UTF-8.

    Tokens that the server does not count are estimated, 4 characters each. Half of a surrogate pair, which no file can hold, is
    read as U+FFFD. An empty list of choices has the finish reason "no_choices".
    """
    try:
        reply = _fields(json.loads(body))
    except json.JSONDecodeError:
        raise NoAnswer("an answer that is no JSON") from None
    error, choices = reply.get("error"), reply.get("choices")
    if error or not isinstance(choices, list) or None in choices[:1]:
        said = _fields(error).get("message", error)
        raise NoAnswer(f"an answer without choices{f': {said}' if said else ''}")
    choice = _fields(choices[0]) if choices else {}
    message = _fields(choice.get("message"))
    content = message.get("content") if choice.get("message") is not None else choice.get("text")
    parts = [
        {"type": "text", "text": p} if isinstance(p, str) else _fields(p)
        for p in (content if isinstance(content, list) else [content])
    ]
    refusal = message.get("refusal") or " ".join(str(p.get("refusal") or "") for p in parts if p.get("type") == "refusal").strip()
    texts = [p.get("text") for p in parts if p.get("type", "text") in ("text", "output_text")]
    text = str(refusal) if refusal else "".join(t for t in texts if isinstance(t, str))
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    word = str(choice.get("finish_reason") or ("none" if choices else "no_choices")).lower()
    word = "stop" if word in WHOLE else "length" if word in CUT else "server_error" if word == "error" else word
    usage = _fields(reply.get("usage"))
    guesses = {"prompt_tokens": math.ceil(prompt_tokens), "completion_tokens": math.ceil(len(text) / 4)}
    counted = {k: n for k, guess in guesses.items() if isinstance(n := usage.get(k), int) and (n > 0 or not guess)}
    tokens = guesses | counted
    word = "refusal" if refusal else word
    return Completion(request, text, word, tokens["prompt_tokens"], tokens["completion_tokens"], counted == tokens)


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    code = getattr(error, "status_code", None)
    return code if isinstance(code, int) else None


def final_status(error: BaseException) -> int | None:
    """The HTTP status of an error that asking again would only repeat, else None."""
    code = status_of(error)
    final = code is not None and 400 <= code < 500 and (code not in RETRYABLE or bool(SPENT.search(_words_of(error))))
    return code if final else None


def of_request(error: BaseException) -> bool:
    """Does this error refuse one request, as against a wrong key, model or address, which every request would meet?"""
    return held_back(error) or (final_status(error) in OF_REQUEST and not OF_ALL.search(_words_of(error)))


def held_back(error: BaseException) -> bool:
    """Does a content filter refuse the prompt? Gateways say so with 403, too."""
    words = re.sub(r"https?://\S+", "", _words_of(error))
    of_account = re.search(r"(?i)account|organi[sz]ation|api[_ ]key", words)
    return final_status(error) in (*OF_REQUEST, 403) and bool(FILTERED.search(words)) and not of_account


def _words_of(error: BaseException) -> str:
    """The server's own words, without what some servers quote of the request."""

    def words(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list):
            return [w for v in value for w in words(v)]
        keys = ("error", "errors", "detail", "details", "message", "msg", "code", "type", "reason", "title", "innererror")
        return [w for k in keys if k in _fields(value) for w in words(value[k])]

    return " ".join(words(getattr(error, "body", None)))


def sentence(error: BaseException) -> str:
    """What went wrong, in one line: the kind of error, the status, and the server's own words, shortened and without secrets."""
    said: Any = getattr(error, "body", None)
    for key in ("error", "errors", "message", "detail", "msg", "title"):
        said = said[0] if isinstance(said, list) and said else said
        said = said.get(key, said) if isinstance(said, dict) else said
    said = str(error) if said is None and status_of(error) is None else said
    text = " ".join(said.split()) if isinstance(said, str) else ""
    name = " ".join(map(str, filter(None, (type(error).__name__, status_of(error)))))
    text = "" if text.startswith("<") else without_secrets(text)  # a page of a proxy
    return f"{name}: {text[:197] + '...' if len(text) > 200 else text}" if text else name


def without_secrets(text: str) -> str:
    """`text` without the key, without anything that looks like one, and without the user of an address."""
    if key := os.environ.get("OPENAI_API_KEY", ""):
        text = text.replace(key, "***")
    text = re.sub(r"(?i)\b((?:sk|key|pk|rk)-|(?:gsk|hf)_|AIza|bearer\s+)[\w.*-]{6,}", r"\1***", text)
    text = re.sub(r"(?i)([?&](?:api[-_]?key|key|token|access_token)=)[^&\s]+", r"\1***", text)
    return re.sub(r"(?i)\b(https?://)[^\s/]+@", r"\1", text)


def asked_wait(headers: Mapping[str, str], now: float) -> float:
    """Seconds that the headers of a refusal ask to wait at the time `now` (seconds since 1970); 0 where they ask for nothing.

    Retry-After (RFC 9110) or retry-after-ms count first, else the reset times of the limits that are used up.
    """
    values = {k.lower(): v.strip() for k, v in headers.items()}
    for name, unit in (("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (wait := _seconds(values.get(name, ""), now)) is not None:
            return max(0.0, wait * unit)
    waits = [0.0]
    for name in (n for n in values if re.fullmatch(r"(x-|anthropic-)?ratelimit-([a-z-]+-)?reset(-[a-z-]+)?", n)):
        left = values.get(name.replace("reset", "remaining"), "")
        if not re.fullmatch(r"[0-9.]*[1-9][0-9.]*", left):  # else that limit is not the one
            waits.append(_seconds(values[name], now) or 0.0)
    return max(waits)


def _seconds(text: str, now: float) -> float | None:
    """Seconds from `now` to the time that a header names: seconds, a time since 1970 (in ms, too), units as in "1m30s", or a date."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        number = float(text) / (1000 if float(text) > 1e11 else 1)
        return number - now if number > 1e9 else number
    if re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", text):
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        return sum(float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text))
    for read_date in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, TypeError):
            return read_date(text).timestamp() - now
    return None


ALIKE = 4  # refusals alike in a row after which a server is asked whether it refuses everything
# What differs between refusals of one kind: the request's number, other numbers, and what is quoted of the prompt.
ITS_OWN = re.compile(r"""(?i)request[ _-]?id\W*[\w-]+|'[^']*'|"[^"]*"|\d+""")


class Refusals(Generic[T]):
    """Refused requests, held back until it is known whose fault it was.

    An answer in between, or to a probe, says that it was theirs.
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, T]] = []
        self._enough = ALIKE

    def hold(self, reason: str, item: T) -> bool:
        """Hold one back; whether the last ones are so many and so alike that the server should be probed."""
        self._held.append((ITS_OWN.sub("", reason), item))
        last = [reason for reason, _ in self._held[-self._enough :]]
        return len(last) == self._enough and len(set(last)) == 1

    def release(self, probed: bool = False) -> list[T]:
        """The held requests, whose own fault it was. After a probe the next one takes twice as many refusals."""
        self._enough *= 2 if probed else 1
        held, self._held = self._held, []
        return [item for _, item in held]

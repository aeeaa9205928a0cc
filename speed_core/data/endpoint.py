"""One OpenAI-compatible server, asked by the teacher (`speed_core.data.teacher`) and by generation (`speed_core.generation.generate`).

The `openai` client in its async form, on an event loop of its own thread, so that a notebook (which has a loop of its own) and a
script use it alike. Every reply becomes one of three things here: an answer (`read`), a fault that passes (transport errors, 408, 409,
425, 429, 5xx, a body that is none) and is tried again, or a refusal: of this one request (`of_request`), or of whoever asks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential_jitter

from speed_core.data.limits import Gate, Pace
from speed_core.files import UserError, with_user

RETRYABLE = (408, 409, 425, 429)  # of the 4xx; 5xx are all tried again
OF_REQUEST = (400, 413, 414, 415, 422)  # this request is refused; other 4xx refuse the key, the model or the address
ATTEMPTS = 8  # while the server does not say how long to wait
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


def status_of(error: BaseException) -> int | None:
    code = getattr(error, "status_code", None)
    return code if isinstance(code, int) else None


def final_status(error: BaseException) -> int | None:
    """The HTTP status of an error that asking again would only repeat, else None."""
    code = status_of(error)
    final = code is not None and 400 <= code < 500 and (code not in RETRYABLE or bool(SPENT.search(_said(error))))
    return code if final else None


def of_request(error: BaseException) -> bool:
    """Does this error refuse one request, as against a wrong key, model or address, which every request would meet?"""
    return held_back(error) or (final_status(error) in OF_REQUEST and not OF_ALL.search(_said(error)))


def held_back(error: BaseException) -> bool:
    """Is it a filter of contents that refuses the prompt? Gateways say so with 403, too."""
    said = re.sub(r"https?://\S+", "", _said(error))
    whose = re.search(r"(?i)account|organi[sz]ation|api[_ ]key", said)
    return final_status(error) in (*OF_REQUEST, 403) and bool(FILTERED.search(said)) and not whose


def _said(error: BaseException) -> str:
    """The server's own words, without what some servers quote of the request."""

    def words(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list):
            return [w for v in value for w in words(v)]
        keys = ("error", "errors", "detail", "details", "message", "msg", "code", "type", "reason", "title", "innererror")
        return [w for k in keys for w in words(value.get(k))] if isinstance(value, dict) else []

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


@dataclass(frozen=True)
class Answer:
    """One answer: `finish_reason` is stop, length, or the server's own word. A recorded answer has no tokens and cost nothing."""

    text: str
    finish_reason: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


def read(reply: Any, prompt_tokens: float) -> Answer:
    """What a completion of any shape says; never raises. Tokens that the server does not count are estimated, 4 characters each.

    Half of a surrogate pair, which no file can hold, is read as U+FFFD. No choice at all is the finish reason "no_choices".
    """
    choice = reply.choices[0] if reply.choices else None
    message = getattr(choice, "message", None)
    refusal = getattr(message, "refusal", None) or _refusal(getattr(message, "content", None))
    text = _text(refusal or (getattr(message, "content", None) if message is not None else getattr(choice, "text", None)))
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    word = str(getattr(choice, "finish_reason", None) or ("none" if choice else "no_choices")).lower()
    word = "stop" if word in WHOLE else "length" if word in CUT else "server_error" if word == "error" else word
    usage = getattr(reply, "usage", None)
    tokens = []
    for name, guess in (("prompt_tokens", math.ceil(prompt_tokens)), ("completion_tokens", math.ceil(len(text) / 4))):
        counted = getattr(usage, name, None)
        tokens.append(counted if isinstance(counted, int) and (counted > 0 or not guess) else guess)
    return Answer(text, "refusal" if refusal else word, *tokens)


def _refusal(content: Any) -> str:
    """What the parts of a message say of a refusal."""
    parts = content if isinstance(content, (list, tuple)) else ()
    fields = [part if isinstance(part, dict) else getattr(part, "__dict__", {}) for part in parts]
    return " ".join(str(f.get("refusal") or "") for f in fields if f.get("type") == "refusal").strip()


def _text(content: Any) -> str:
    """The text of a message: a string, or the parts of a list that are text."""
    if isinstance(content, str):
        return content
    out = []
    for part in content if isinstance(content, (list, tuple)) else ():
        fields = {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, dict) else None
        fields = getattr(part, "__dict__", {}) if fields is None else fields
        if fields.get("type") in ("text", "output_text") and isinstance(fields.get("text"), str):
            out.append(fields["text"])
    return "".join(out)


def asked_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the headers of a refusal ask to wait at the time `now` (seconds since 1970), or None.

    Retry-After as seconds or as a date (RFC 9110), retry-after-ms, else the reset times of the limits that are used up: seconds, a
    time since 1970, a date, or units as in "1m30s".
    """
    values = {k.lower(): v.strip() for k, v in headers.items()}
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (ms := _number(values.get(name, ""))) is not None:
            return ms / 1000
    if after := values.get("retry-after", ""):
        if (seconds := _number(after)) is not None:
            return seconds
        with suppress(ValueError, TypeError):
            return max(0.0, parsedate_to_datetime(after).timestamp() - now)
    waits = []
    for name in (n for n in values if re.fullmatch(r"(x-|anthropic-)?ratelimit-([a-z-]+-)?reset(-[a-z-]+)?", n)):
        text, left = values.get(name, ""), _number(values.get(name.replace("reset", "remaining"), ""))
        if left:  # that limit is not the one
            continue
        if (seconds := _number(text)) is not None:
            seconds = seconds / 1000 if seconds > 1e11 else seconds
            waits.append(seconds - now if seconds > 1e9 else seconds)
        elif re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", text):
            units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
            waits.append(sum(float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)))
        else:
            with suppress(ValueError):
                waits.append(datetime.fromisoformat(text).timestamp() - now)
    return max(0.0, *waits) if waits else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


class Endpoint:
    """`base_url` empty means the OpenAI API. The key comes from $OPENAI_API_KEY and is never logged.

    At most `concurrency` calls at once, fewer after a 429; caps on requests and tokens a minute (0: none). For as long as
    `longest_wait` seconds a server may ask to wait.
    """

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        timeout_seconds: float = 120.0,
        longest_wait: float = 3600.0,
    ):
        import openai

        self._openai, self.where = openai, without_secrets(base_url) or "the OpenAI API"
        self._longest_wait = longest_wait
        self._gate, self._pace = Gate(concurrency), Pace(requests_per_minute, tokens_per_minute)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        key = os.environ.get("OPENAI_API_KEY", "") or "none"
        self.client = openai.AsyncOpenAI(
            api_key=key, base_url=with_user(base_url) or None, max_retries=0, timeout=timeout_seconds
        )

    def submit(self, call: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Start a coroutine on this endpoint's loop; the future is the ordinary, thread-safe kind."""
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def served(self) -> list[str]:
        """Names of the models that the server lists; empty where it lists none. One line with the remedy if it does not answer."""

        async def ask() -> Any:
            for attempt in range(3):
                try:
                    return await self.client.models.list()
                except self._openai.InternalServerError:
                    await asyncio.sleep(0.5 * (attempt + 1))
            return None

        try:
            listed = self.submit(ask()).result()
            return [m.id for m in getattr(listed, "data", None) or () if isinstance(getattr(m, "id", None), str)]
        except self._openai.APIConnectionError as error:
            raise UserError(
                f"endpoint {self.where}: not reachable ({type(error).__name__}); start the server, or correct its base_url"
            ) from None
        except Exception:  # a gateway without a list, with another one, or a key that may not see it: the first request will tell
            return []

    def fault(self, error: BaseException, model: str, listed: Sequence[str]) -> UserError:
        """The one line for a refusal that every request would meet."""
        other = [m for m in listed if m != model]
        serves = f"; it lists {', '.join(other[:5])}" if other and status_of(error) == 404 else ""
        remedy = "set OPENAI_API_KEY to a valid one" if status_of(error) in (401, 403) else "mend it"
        return UserError(
            f"endpoint {self.where}: it refuses every request ({sentence(error)}){serves}; {remedy} and run again: what was answered is kept"
        )

    def _retryable(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return final_status(error) is None
        # A body that ends too early or is no JSON is the connection's fault, not the request's.
        broken = (
            self._openai.APIConnectionError,
            self._openai.APIResponseValidationError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            RecursionError,
            httpx.TransportError,
        )
        return isinstance(error, broken)

    def _told(self, state: Any) -> float | None:
        """Seconds that the server asked to wait after this try, or None. Only a refusal for being busy asks: others carry such headers, too."""
        error = state.outcome.exception()
        response = getattr(error, "response", None)
        wait = asked_wait(response.headers, time.time()) if response is not None and status_of(error) in (429, 503) else None
        return None if wait is None else min(wait, self._longest_wait)

    def _wait(self, state: Any) -> float:
        """Jittered back-off, but never sooner than the server asked for."""
        back_off: float = wait_exponential_jitter(initial=0.5, max=30)(state)
        told = self._told(state) or 0.0
        if told > 60:
            print(f"the endpoint asks to wait {told / 60:.0f} minutes", flush=True)
        return max(back_off, told)

    async def call(
        self,
        send: Callable[[], Awaitable[Any]],
        tokens: float,
        before: Callable[[], Awaitable[None]] | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> Any:
        """The reply of `send()`, tried again where the fault may pass; `tokens`: an estimate for the pace.

        `ATTEMPTS` tries; one after which the server asks to wait a second or more does not count, until the longest wait is over. `before`
        runs before each try, when it may begin; it may wait for something more, and may refuse it by raising. `failed` runs after a try that
        gave no answer: while the next one waits, it must hold nothing that others wait for.
        """
        counted, waited = 0, 0.0

        def enough(state: Any) -> bool:
            nonlocal counted, waited
            told = self._told(state) or 0.0
            counted, waited = counted + (told < 1), waited + told
            return counted >= ATTEMPTS or waited > self._longest_wait

        tries = AsyncRetrying(retry=retry_if_exception(self._retryable), stop=enough, wait=self._wait, reraise=True)
        async for attempt in tries:
            with attempt:
                try:
                    return await self._once(send, tokens, before)
                except BaseException:
                    failed()
                    raise

    async def _once(self, send: Callable[[], Awaitable[Any]], tokens: float, before: Callable[[], Awaitable[None]] | None) -> Any:
        async with self._gate.slot():
            if before is not None:
                await before()
            taken = await self._pace.enter(tokens)
            try:
                reply = await send()
            except self._openai.RateLimitError:
                self._gate.was_refused()
                raise
            choices = getattr(reply, "choices", None)
            failed = getattr(reply, "error", None)
            if failed or not isinstance(choices, list) or None in choices[:1]:  # a gateway's fault, a page of HTML, null
                said = failed.get("message", failed) if isinstance(failed, dict) else failed
                raise httpx.RemoteProtocolError(f"an answer without choices{f': {said}' if said else ''}")
            self._gate.went_well()
            if isinstance(total := getattr(getattr(reply, "usage", None), "total_tokens", None), int):
                self._pace.settle(taken, total)
            return reply

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._loop.is_running():
            self.submit(self.client.close()).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)


ALIKE = 4  # refusals alike in a row after which a server is asked whether it refuses everything
PROBE = "Answer with one word: yes."
# What differs between refusals of one kind: the request's number, other numbers, and what is quoted of the prompt.
ITS_OWN = re.compile(r"""(?i)request[ _-]?id\W*[\w-]+|'[^']*'|"[^"]*"|\d+""")


class Refusals:
    """Refused requests, held back until it is known whose fault it was. An answer in between says that it was theirs. After several
    alike in a row `suspicious` is true: then `answers` says whether the server answers a short prompt of no record."""

    def __init__(self) -> None:
        self._held: list[tuple[str, Any]] = []
        self._enough = ALIKE

    def add(self, reason: str, item: Any) -> None:
        self._held.append((ITS_OWN.sub("", reason), item))

    @property
    def suspicious(self) -> bool:
        last = [said for said, _ in self._held[-self._enough :]]
        return len(last) == self._enough and len(set(last)) == 1

    def acquitted(self) -> list[Any]:
        """The held requests, whose own fault it was, since the server answered a probe. The next one takes twice as many."""
        self._enough *= 2
        return self.rest()

    def rest(self) -> list[Any]:
        """The held requests; none is held any more."""
        held, self._held = self._held, []
        return [item for _, item in held]


def answers(create: Callable[[], Coroutine[Any, Any, Any]], endpoint: Endpoint) -> bool:
    """Whether a server answers `create()`, a request that asks for little. A fault that may pass leaves it in favour of the server."""
    try:
        endpoint.submit(create()).result(timeout=120)
    except Exception as error:
        return final_status(error) is None
    return True


class Deadline:
    """Minutes that a whole stage may take, counted from its making."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

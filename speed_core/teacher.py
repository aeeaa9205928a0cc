"""Who stands where GPT-4o stood: recorded answers, or any OpenAI-compatible endpoint; and the judges.

The recorded answers were written for this repository by its authors, with the help of an AI writing
assistant. They are not GPT-4o output and are labelled as ours wherever they appear.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential_jitter

from speed_core import prompts, records
from speed_core.artifacts import AppendLog, UserError, digest, read_jsonl
from speed_core.limits import Gate, Pace
from speed_core.profile import Teacher as TeacherSettings

RECORDED = Path(__file__).parent / "assets" / "recorded"
RETRYABLE = (408, 409, 425, 429)  # of the 4xx; 5xx are all tried again
LABEL = "recorded answers, written by this repository's authors"


@dataclass(frozen=True)
class Answer:
    """One answer. Token counts are those of the endpoint; a recorded answer has none and cost nothing."""

    text: str
    finish_reason: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Ledger:
    """Calls, tokens and money spent, per purpose (seed, judge, revise ...)."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, purpose: str, answer: Answer, usd: float) -> None:
        row = self.rows.setdefault(purpose, {"calls": 0, "input_tokens": 0, "output_tokens": 0, "usd": 0.0})
        row["calls"] += 1
        row["input_tokens"] += answer.input_tokens
        row["output_tokens"] += answer.output_tokens
        row["usd"] += usd

    def total(self, key: str) -> float:
        return sum(row[key] for row in self.rows.values())


class BudgetReached(Exception):
    """The cap on calls, money or minutes is reached; what was answered so far is kept."""


class Teacher(Protocol):
    label: str
    ledger: Ledger

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer: ...


@lru_cache(maxsize=8)
def recorded_rows(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of `assets/recorded/NAME.jsonl` ({prompt_digest, answer, ...})."""
    path = RECORDED / f"{name}.jsonl"
    return tuple(read_jsonl(path)) if path.is_file() else ()


class RecordedTeacher:
    """Answers a prompt that was recorded, found by the digest of its text; anything else is an error."""

    label = LABEL

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._answers = {
            row["prompt_digest"]: row["answer"] for name in ("tasks", "seeds", "revisions") for row in recorded_rows(name)
        }

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        key = prompts.text_digest(prompt)
        if key not in self._answers:
            raise KeyError(key)
        answer = Answer(self._answers[key])
        self.ledger.add(purpose, answer, 0.0)
        return answer


class EndpointTeacher:
    """GPT-4o, a self-hosted `vllm serve`, or anything else that speaks the same protocol.

    Transport errors, 408, 409, 425, 429 and 5xx are tried again with jitter, not before the answer's
    Retry-After; other 4xx are remembered, since the same request would fail again. Concurrency adapts,
    calls and tokens a minute are capped, and the budget (calls, tokens, money, minutes) is checked before
    each call. The key comes from $OPENAI_API_KEY and is never logged.
    """

    def __init__(self, settings: TeacherSettings):
        import openai

        if not settings.model:
            raise UserError("teacher.model: empty; name the model that the endpoint serves")
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key and not settings.base_url:
            raise UserError(
                "OPENAI_API_KEY: not set; export it, set teacher.base_url to a server of yours, "
                "or use the recorded teacher (teacher.kind=recorded)"
            )
        self.settings = settings
        self.label = f"{settings.model} at {settings.base_url or 'the OpenAI API'}"
        self.ledger = Ledger()
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._openai = openai
        self._gate = Gate(settings.concurrency)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=settings.base_url or None, max_retries=0, timeout=settings.timeout_seconds
        )

    def check(self) -> None:
        """Reach the endpoint once; one line with the remedy if it does not answer."""
        try:
            served = [m.id for m in self._client.models.list().data]
        except self._openai.AuthenticationError:
            raise UserError(f"teacher {self.label}: the key was refused; set OPENAI_API_KEY to a valid one") from None
        except self._openai.OpenAIError as error:
            raise UserError(
                f"teacher {self.label}: not reachable ({type(error).__name__}); "
                "start the server, correct teacher.base_url, or use teacher.kind=recorded"
            ) from None
        if served and self.settings.model not in served:
            raise UserError(f"teacher.model {self.settings.model!r}: not served there; it serves {', '.join(served[:5])}")

    def _budget(self) -> None:
        s, minutes = self.settings, (time.monotonic() - self._started) / 60
        tokens = self.ledger.total("input_tokens") + self.ledger.total("output_tokens")
        reached = [
            (self.ledger.total("calls") >= s.max_calls, f"max_calls {s.max_calls}"),
            (tokens >= s.max_tokens > 0, f"max_tokens {s.max_tokens}"),
            (self.ledger.total("usd") >= s.max_usd > 0, f"max_usd {s.max_usd}"),
            (minutes >= s.max_minutes, f"max_minutes {s.max_minutes}"),
        ]
        for hit, name in reached:
            if hit:
                raise BudgetReached(f"teacher.{name} reached; raise it and run again to go on from here")

    def _retryable(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code in RETRYABLE or error.status_code >= 500
        # A body that ends too early or is no JSON is the connection's fault, not the request's.
        broken = (
            self._openai.APIConnectionError,
            self._openai.APIResponseValidationError,
            json.JSONDecodeError,
            httpx.TransportError,
        )
        return isinstance(error, broken)

    def _wait(self, state: Any) -> float:
        """Jittered back-off, but never sooner than the endpoint asked for; at most two minutes."""
        error = state.outcome.exception()
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        wait = wait_exponential_jitter(initial=0.5, max=30)(state)
        return min(120.0, max(wait, float(asked))) if asked.replace(".", "", 1).isdigit() else wait

    def _call(self, prompt: str, temperature: float) -> Any:
        """One try: through the gate and the pace, with the budget checked last, when the wait is over."""
        with self._gate.slot():
            taken = self._pace.enter(len(prompt) / 4 + 300)
            with self._lock:
                self._budget()
            try:
                reply = self._client.chat.completions.create(
                    model=self.settings.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=temperature,
                    top_p=self.settings.top_p,
                )
            except self._openai.RateLimitError:
                self._gate.was_refused()
                raise
            if not reply.choices:
                raise httpx.RemoteProtocolError("an answer without choices")
            self._gate.went_well()
            if reply.usage:
                self._pace.settle(taken, reply.usage.total_tokens)
            return reply

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        temperature = self.settings.temperature if temperature is None else temperature
        left = 60 * self.settings.max_minutes - (time.monotonic() - self._started)
        for attempt in Retrying(
            retry=retry_if_exception(self._retryable),
            stop=stop_after_attempt(8) | stop_after_delay(max(1.0, left)),
            wait=self._wait,
            reraise=True,
        ):
            with attempt:
                reply = self._call(prompt, temperature)
        choice, usage = reply.choices[0], reply.usage
        answer = Answer(
            choice.message.content or "",
            "length" if choice.finish_reason == "length" else "stop",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )
        usd = (
            answer.input_tokens * self.settings.usd_per_million_input
            + answer.output_tokens * self.settings.usd_per_million_output
        ) / 1e6
        with self._lock:
            self.ledger.add(purpose, answer, usd)
        return answer


def open_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher that a profile names; an endpoint is reached once, so that a wrong one is refused before any work."""
    if settings.kind == "recorded":
        return RecordedTeacher()
    endpoint = EndpointTeacher(settings)
    endpoint.check()
    return endpoint


def ask(
    teacher: Teacher,
    items: Sequence[prompts.Prompt],
    *,
    purpose: str,
    log: Path,
    concurrency: int = 8,
    parse: Any = None,
) -> list[dict[str, Any]]:
    """Ask the teacher every prompt once; log each answer as it comes; return entries in order.

    Every entry has a status: ok, invalid, refused, truncated, or error (no recorded answer, a
    refused request, a budget that ran out). The counts add up to the prompts. An `error` is asked again
    the next time unless the endpoint refused the request itself (a 4xx other than a rate limit): then
    `retryable` is false and it is remembered.
    """
    keys = {p.id: digest({"prompt": p.text, "teacher": teacher.label, "record": p.id})[:24] for p in items}

    def one(p: prompts.Prompt) -> dict[str, Any]:
        entry = {"id": keys[p.id], "record": p.id, "kind": p.kind, "topic": p.topic, "task": p.task, "prompt_digest": p.digest}
        try:
            a = teacher.answer(p.text, purpose)
        except KeyError:
            return entry | {"status": "error", "reason": "no recorded answer to this prompt", "raw": "", "finish_reason": "stop"}
        except BudgetReached as stop:
            return entry | {"status": "error", "reason": str(stop), "raw": "", "finish_reason": "stop"}
        except Exception as error:  # the client raises many types; each ends as a logged outcome
            code = getattr(error, "status_code", None)
            final = code is not None and 400 <= code < 500 and code not in RETRYABLE
            why = f"{type(error).__name__}{f' {code}' if code else ''}"
            return entry | {"status": "error", "reason": why, "raw": "", "finish_reason": "stop", "retryable": not final}
        outcome = (parse or records.parse)(a.text, p.kind, a.finish_reason)
        return entry | {
            "status": outcome.status,
            "reason": outcome.reason,
            "raw": a.text,
            "finish_reason": a.finish_reason,
            "prompt_tokens": a.input_tokens,
            "new_tokens": a.output_tokens,
        }

    with AppendLog(log) as entries:
        known = {p.id: entries.entries.get(keys[p.id], {"status": "error"}) for p in items}
        todo = [p for p in items if known[p.id]["status"] == "error" and known[p.id].get("retryable", True)]
        with ThreadPoolExecutor(concurrency) as pool:
            for done in as_completed([pool.submit(one, p) for p in todo]):
                entries.append(done.result())
        return [entries.entries[keys[p.id]] for p in items]


def parse_tasks(raw: str, kind: str, finish_reason: str) -> records.Outcome:
    """Outcome of a brainstorm answer: a list of strings."""
    tasks, why = records.parse_string_list(raw, finish_reason)
    if why == "length":
        return records.Outcome("truncated", why, raw=raw)
    return (
        records.Outcome("invalid", why, raw=raw) if why else records.Outcome("ok", record={"tasks": json.dumps(tasks)}, raw=raw)
    )


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """A seeded shuffle that leaves its input alone."""
    out = list(items)
    random.Random(seed).shuffle(out)
    return out

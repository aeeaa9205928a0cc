"""Who stands where GPT-4o stood: recorded answers, or any OpenAI-compatible endpoint; and the judges.

The recorded answers were written for this repository by its authors, with the help of an AI writing
assistant. They are not GPT-4o output and are labelled as ours wherever they appear.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from speed_core.data import prompts, records
from speed_core.data.endpoint import (
    PROBE,
    Answer,
    Deadline,
    Endpoint,
    Refusals,
    answers,
    final_status,
    held_back,
    of_request,
    read,
    sentence,
    status_of,
    without_secrets,
)
from speed_core.files import ASSETS, AppendLog, UserError, digest, read_jsonl
from speed_core.profile import Teacher as TeacherSettings

RECORDED = ASSETS / "recorded"
LOGGED = ("record", "prompt_digest", "status", "raw", "reason", "finish_reason")  # what every entry of a log has
UNSENT = ("ConnectTimeout", "PoolTimeout")  # of httpx: no request went out
UNRECORDED = "no recorded answer to this prompt"
LABEL = "recorded answers, written by this repository's authors"


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

    def add_entry(self, purpose: str, entry: Mapping[str, Any], settings: TeacherSettings) -> None:
        """Count an answer that a log holds."""
        tokens = entry.get("prompt_tokens", 0), entry.get("new_tokens", 0)
        self.add(purpose, Answer("", "", *tokens), settings.cost(*tokens))

    def total(self, key: str) -> float:
        return sum(row[key] for row in self.rows.values())


class Unrecorded(KeyError):
    """Nobody wrote an answer to this prompt."""


class BudgetReached(Exception):
    """The cap on calls, money or minutes is reached; what was answered so far is kept."""


class Teacher(Protocol):
    label: str
    ledger: Ledger

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer: ...

    def submit(self, prompt: str, purpose: str, temperature: float | None = None) -> Future[Answer]: ...

    def decides(self, temperature: float | None) -> dict[str, Any]: ...


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
            row["prompt_digest"]: row["answer"]
            for name in ("tasks", "tasks_five", "seeds", "revisions")
            for row in recorded_rows(name)
        }

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        key = prompts.text_digest(prompt)
        if key not in self._answers:
            raise Unrecorded(key)
        answer = Answer(self._answers[key])
        self.ledger.add(purpose, answer, 0.0)
        return answer

    def submit(self, prompt: str, purpose: str, temperature: float | None = None) -> Future[Answer]:
        future: Future[Answer] = Future()
        try:
            future.set_result(self.answer(prompt, purpose, temperature))
        except Unrecorded as error:
            future.set_exception(error)
        return future

    def decides(self, temperature: float | None) -> dict[str, Any]:
        return {}  # an answer that is written down depends on the prompt alone


def endpoint_label(settings: TeacherSettings) -> str:
    """How an endpoint is named in logs and figures."""
    return f"{settings.model} at {without_secrets(settings.base_url) or 'the OpenAI API'}"


def endpoint_decides(settings: TeacherSettings, temperature: float | None) -> dict[str, Any]:
    """What decides an answer beside the prompt and the model: part of every request's digest."""
    t = settings.temperature if temperature is None else temperature
    return {"temperature": t, "top_p": settings.top_p, "max_output_tokens": settings.max_output_tokens}


class LoggedTeacher:
    """An endpoint that is not there any more: what its log lacks is an error (replay)."""

    def __init__(self, settings: TeacherSettings):
        self.settings, self.label, self.ledger = settings, endpoint_label(settings), Ledger()

    def decides(self, temperature: float | None) -> dict[str, Any]:
        return endpoint_decides(self.settings, temperature)

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        raise UserError(f"replay: the log holds no {purpose} answer to one of these prompts; use the profile of the export")

    def submit(self, prompt: str, purpose: str, temperature: float | None = None) -> Future[Answer]:
        raise UserError(f"replay: the log holds no {purpose} answer to one of these prompts; use the profile of the export")


class EndpointTeacher:
    """GPT-4o, a self-hosted `vllm serve`, or anything else that speaks the same protocol (see `speed_core.data.endpoint`).

    The budget of a stage (calls, tokens, money, minutes) is hard. Before each call there has to be room for all that it can take: its
    prompt, and an answer as long as `max_output_tokens` allows (without that limit: as the longest so far, at least 300 tokens).
    A call waits while others in flight may leave room. What the stage's log holds already counts, minutes aside.
    """

    def __init__(self, settings: TeacherSettings):
        if not settings.model:
            raise UserError("teacher.model: empty; name the model that the endpoint serves")
        if not os.environ.get("OPENAI_API_KEY") and not settings.base_url:
            raise UserError(
                "OPENAI_API_KEY: not set; export it, set teacher.base_url to a server of yours, "
                "or use the recorded teacher (teacher.kind=recorded)"
            )
        self.settings = settings
        self.label = endpoint_label(settings)
        self.ledger = Ledger()
        self._in_flight: dict[int, str] = {}  # prompts of the calls that run
        self._settled = asyncio.Event()
        self._numbers = itertools.count()
        self._per_character, self._longest = 0.0, float(settings.max_output_tokens or OUTPUT_TOKENS)
        self.counted: set[str] = set()  # entries of a log that are in the ledger
        self._listed: list[str] = []
        self.stopped: UserError | None = None  # why no further call is sent
        self._deadline = Deadline(settings.max_minutes)
        self.endpoint = Endpoint(
            settings.base_url,
            concurrency=settings.concurrency,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            timeout_seconds=settings.timeout_seconds,
            longest_wait=60 * settings.max_minutes,
        )

    def check(self) -> None:
        """Reach the endpoint once; one line with the remedy if it does not answer. A model that it does not list is tried, too:
        gateways list others, or none."""
        self._listed = self.endpoint.served()
        if self._listed and self.settings.model not in self._listed:
            print(
                f"teacher.model {self.settings.model!r}: not among those that the endpoint lists ({', '.join(self._listed[:5])})"
            )

    def decides(self, temperature: float | None) -> dict[str, Any]:
        return endpoint_decides(self.settings, temperature)

    def _most(self, prompt: str) -> tuple[float, float]:
        """(tokens, USD) that one call can take."""
        tokens_in = len(prompt) * (self._per_character or 0.25)
        return tokens_in + self._longest, self.settings.cost(tokens_in, self._longest)

    def _left(self, call: int) -> None:
        """Give the room of a call back."""
        self._in_flight.pop(call, None)
        self._settled.set()

    async def _room(self, call: int, prompt: str) -> None:
        """Take room in the budget for one call, or raise BudgetReached that names the cap."""
        s = self.settings
        self._left(call)
        while True:
            if self.stopped:
                raise self.stopped
            tokens, usd = self._most(prompt)
            others = [self._most(p) for p in self._in_flight.values()]
            spent = self.ledger.total("input_tokens") + self.ledger.total("output_tokens")
            over = [
                (self.ledger.total("calls") + len(others) + 1, s.max_calls, f"max_calls {s.max_calls}"),
                (spent + sum(v[0] for v in others) + tokens, s.max_tokens, f"max_tokens {s.max_tokens}"),
                (self.ledger.total("usd") + sum(v[1] for v in others) + usd, s.max_usd, f"max_usd {s.max_usd:g}"),
            ]
            # Only max_calls has no way to say "no cap".
            reached = [n for after, cap, n in over if after > cap * (1 + 1e-9) and (cap or n.startswith("max_calls"))]
            # How many tokens a prompt has, and how long an answer may be, is not known before there is one.
            known = self._per_character or not others
            if not reached and known:
                self._in_flight[call] = prompt
                return
            if not others:
                raise BudgetReached(
                    f"teacher.{reached[0]} reached: the next call may take {tokens:.0f} tokens; raise it and run again to go on from here"
                )
            self._settled.clear()
            await self._settled.wait()

    async def reply(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        """The answer to one prompt, counted in the ledger. Raises UserError where the server would refuse every request."""
        import openai

        s, call = self.settings, next(self._numbers)

        async def send() -> Any:
            try:
                if self.stopped:
                    raise self.stopped
                return await self._create(prompt, temperature)
            except BaseException as error:
                if isinstance(error, openai.APITimeoutError) and type(error.__cause__).__name__ not in UNSENT:
                    # The server may have written an answer, and count it.
                    tokens, usd = self._most(prompt)
                    self.ledger.add(purpose, Answer("", "", math.ceil(tokens - self._longest), math.ceil(self._longest)), usd)
                raise

        try:
            async with asyncio.timeout(self._deadline.left):
                found = await self.endpoint.call(
                    send, self._most(prompt)[0], lambda: self._room(call, prompt), lambda: self._left(call)
                )
            said = read(found, len(prompt) / 4)
            self.ledger.add(purpose, said, s.cost(said.input_tokens, said.output_tokens))
            self._per_character = max(self._per_character, said.input_tokens / max(1, len(prompt)))
            self._longest = max(self._longest, said.output_tokens)
        except TimeoutError:
            raise BudgetReached(
                f"teacher.max_minutes {s.max_minutes:g} reached; raise it and run again to go on from here"
            ) from None
        except Exception as error:
            if final_status(error) is None or of_request(error):
                raise
            raise self.fault(error) from None
        finally:
            self._left(call)
        return said

    async def _create(self, prompt: str, temperature: float | None) -> Any:
        s, decides = self.settings, self.decides(temperature)
        more: dict[str, Any] = {"max_tokens": s.max_output_tokens} if s.max_output_tokens else {}
        said: Any = [{"role": "user", "content": prompt}]
        return await self.endpoint.client.chat.completions.create(
            model=s.model, messages=said, temperature=decides["temperature"], top_p=s.top_p, **more
        )

    def answers_a_probe(self, purpose: str, temperature: float | None) -> bool:
        """Whether the endpoint answers a short prompt that is asked like all others. It counts as a call, and is left out where the
        budget has no room for one."""
        if self.ledger.total("calls") + len(self._in_flight) >= self.settings.max_calls:
            return True
        tokens, usd = self._most(PROBE)
        self.ledger.add(purpose, Answer("", "", math.ceil(tokens - self._longest), math.ceil(self._longest)), usd)
        return answers(lambda: self._create(PROBE, temperature), self.endpoint)

    def fault(self, error: BaseException) -> UserError:
        """The one line for a refusal that every request would meet."""
        self.stopped = self.endpoint.fault(error, self.settings.model, self._listed)
        return self.stopped

    def remember(self, entries: Iterable[Mapping[str, Any]], purpose: str) -> None:
        """Count answers of a log that this object did not ask for: a budget lasts over stops of a stage."""
        for e in entries:
            if e["status"] != "error" and e["id"] not in self.counted:
                self.counted.add(e["id"])
                self.ledger.add_entry(purpose, e, self.settings)

    def submit(self, prompt: str, purpose: str, temperature: float | None = None) -> Future[Answer]:
        """Begin asking; the future gives the answer."""
        return self.endpoint.submit(self.reply(prompt, purpose, temperature))

    def answer(self, prompt: str, purpose: str, temperature: float | None = None) -> Answer:
        return self.submit(prompt, purpose, temperature).result()


def open_teacher(settings: TeacherSettings, replay: bool = False) -> Teacher:
    """The teacher that a profile names; an endpoint is reached once, so that a wrong one is refused before any work."""
    if settings.kind == "recorded":
        return RecordedTeacher()
    if replay:
        return LoggedTeacher(settings)
    teacher = EndpointTeacher(settings)
    teacher.check()
    return teacher


OUTPUT_TOKENS = 300  # of an answer without a limit: the mean of the paper's seed calls is near it (Table 5)
CALL_SECONDS = 5.0  # of one call: a guess, replaced by the caps on a minute where they are set


def estimate(settings: TeacherSettings, texts: Sequence[str]) -> str:
    """What asking these prompts takes (calls, tokens, money, minutes), and each cap that it breaks, in one line.

    Input tokens are characters / 4; output tokens `max_output_tokens`, or 300.
    """
    calls, output = len(texts), settings.max_output_tokens or OUTPUT_TOKENS
    tokens_in, tokens_out = sum(map(len, texts)) / 4, float(len(texts) * output)
    usd = settings.cost(tokens_in, tokens_out)
    minutes = [calls * CALL_SECONDS / settings.concurrency / 60]
    minutes += [calls / settings.requests_per_minute] if settings.requests_per_minute else []
    minutes += [(tokens_in + tokens_out) / settings.tokens_per_minute] if settings.tokens_per_minute else []
    unknown = f"no price known for {settings.model!r} (add it to teacher.prices; without it max_usd stops nothing)"
    money = f"{usd:.2f} USD" if any(settings.price()) else unknown
    line = f"{calls:,} calls, about {tokens_in + tokens_out:,.0f} tokens, {money}, {max(minutes):.1f} min"
    caps = [
        ("max_calls", calls, settings.max_calls),
        ("max_tokens", tokens_in + tokens_out, settings.max_tokens or math.inf),
        ("max_usd", usd, settings.max_usd or math.inf),
        ("max_minutes", max(minutes), settings.max_minutes),
    ]
    return line + "".join(f"; more than teacher.{name} {cap:g}" for name, value, cap in caps if value > cap)


def ask(
    teacher: Teacher,
    items: Sequence[prompts.Prompt],
    *,
    purpose: str,
    log: Path,
    parse: Any = None,
    temperature: float | None = None,
    attempts: int = 1,
) -> list[dict[str, Any]]:
    """Ask the teacher every prompt; log each answer as it comes; return one entry a prompt, in order.

    Every entry has a status: ok, invalid, refused, truncated, or error (no recorded answer, a refused request, a budget that ran
    out). The counts add up to the prompts. An `error` is asked again the next time unless the endpoint refused the request itself
    (`endpoint.of_request`): then `retryable` is false and it is remembered. Where the endpoint refuses every request (a key that has
    expired), UserError says so at once, and nothing is remembered. An answer that is not ok is asked for again, up to `attempts`
    times in all; each attempt has its own entry in the log, and the last one is returned.
    """
    decides = teacher.decides(temperature)
    tried: dict[str, int] = {p.id: 1 for p in items}

    def key(p: prompts.Prompt, which: int = 0) -> str:
        """Digest of all that decides the answer to this attempt, or to the one that is named."""
        attempt = {"attempt": n} if (n := which or tried[p.id]) > 1 else {}
        return digest({"prompt": p.text, "teacher": teacher.label, "record": p.id, **decides, **attempt})[:24]

    def outcome(p: prompts.Prompt, future: Future[Answer]) -> dict[str, Any]:
        entry = {"id": key(p), "record": p.id, "kind": p.kind, "topic": p.topic, "task": p.task, "prompt_digest": p.digest}
        failed = entry | {"status": "error", "raw": "", "finish_reason": "stop"}
        try:
            a = future.result()
        except Unrecorded:
            return failed | {"reason": UNRECORDED}
        except BudgetReached as stop:
            return failed | {"reason": str(stop)}
        except UserError:
            raise
        except Exception as error:  # the client raises many types; each ends as a logged outcome
            if held_back(error):
                said = {"reason": sentence(error), "finish_reason": "content_filter", "prompt_tokens": 0, "new_tokens": 0}
                return failed | {"status": "refused", **said}
            again = {"retryable": False, "code": status_of(error)} if of_request(error) else {"retryable": True}
            return failed | {"reason": sentence(error), **again}
        found = (parse or records.parse)(a.text, p.kind, a.finish_reason)
        more = {"attempt": tried[p.id]} if tried[p.id] > 1 else {}
        return entry | more | {
            "status": found.status,
            "reason": found.reason,
            "raw": a.text,
            "finish_reason": a.finish_reason,
            "prompt_tokens": a.input_tokens,
            "new_tokens": a.output_tokens,
        }  # fmt: skip

    def open_again(entry: dict[str, Any]) -> bool:
        # An earlier version remembered also what was no fault of the request, and no code.
        ours = not entry.get("retryable", True) and "code" in entry
        return entry["status"] == "error" and not ours and not isinstance(teacher, LoggedTeacher)

    refusals = Refusals()

    def keep(entry: dict[str, Any], future: Future[Answer]) -> None:
        """Log an entry, a refused request once it is known to be its own fault; UserError where the server refuses all."""
        if "code" in entry:
            refusals.add(entry["reason"], entry)
            if refusals.suspicious and isinstance(teacher, EndpointTeacher):
                if not teacher.answers_a_probe(purpose, temperature):
                    raise teacher.fault(future.exception() or RuntimeError())
                settle(refusals.acquitted())
            return
        entries.append(entry)
        if entry["status"] != "error":
            settle(refusals.rest())

    def settle(held: Iterable[dict[str, Any]]) -> None:
        for entry in held:
            entries.append(entry)

    with AppendLog(log, LOGGED) as entries:
        todo = list(items)
        if isinstance(teacher, EndpointTeacher):
            mine = (entries.entries.get(key(p, n)) for p in items for n in range(1, attempts + 1))
            teacher.remember([e for e in mine if e], purpose)
        while todo:
            open_ = [p for p in todo if key(p) not in entries.entries or open_again(entries.entries[key(p)])]
            if open_ and isinstance(teacher, EndpointTeacher):
                teacher.stopped = None
                print(f"{purpose}: {estimate(teacher.settings, [p.text for p in open_])}", flush=True)
            asked = {teacher.submit(p.text, purpose, temperature): p for p in open_}
            try:
                for future in as_completed(list(asked)):
                    keep(outcome(asked.pop(future), future), future)
            except UserError:  # no further call is sent; what is on its way may be an answer, and paid for
                wait(asked, timeout=10)
                raise
            finally:  # Ctrl-C, or a server that refuses: nothing more is paid for, and what has come is kept
                for future, p in asked.items():
                    if not future.cancel() and future.done() and not future.exception():
                        entries.append(outcome(p, future))
                if isinstance(teacher, EndpointTeacher):
                    teacher.counted.update(map(key, open_))
            settle(refusals.rest())
            weak = ("invalid", "truncated", "refused")
            todo = [p for p in todo if entries.entries[key(p)]["status"] in weak and tried[p.id] < attempts]
            for p in todo:
                tried[p.id] += 1
        return [entries.entries[key(p)] for p in items]


def spent(log: Path, items: Sequence[prompts.Prompt], purpose: str, settings: TeacherSettings) -> dict[str, dict[str, float]]:
    """{purpose: calls, tokens, money} of every answer to these prompts in a log: all attempts, of all runs that wrote it."""
    wanted, ledger = {(p.id, p.digest) for p in items}, Ledger()
    with AppendLog(log, LOGGED) as entries:
        for e in entries.entries.values():
            if e["status"] != "error" and (e["record"], e["prompt_digest"]) in wanted:
                ledger.add_entry(purpose, e, settings)
    return ledger.rows


def unanswered(entries: Sequence[dict[str, Any]]) -> str:
    """Why a data set is only a part of what was asked for ("12 of 400 unanswered: REASON"), or nothing.

    A request that the endpoint refuses for good, or a prompt that nobody recorded, is an outcome, not a gap.
    """
    gaps = [e["reason"] for e in entries if e["status"] == "error" and e.get("retryable", True) and e["reason"] != UNRECORDED]
    return f"{len(gaps)} of {len(entries)} unanswered: {gaps[0]}" if gaps else ""


def parse_tasks(raw: str, kind: str, finish_reason: str) -> records.Outcome:
    """Outcome of a brainstorm answer: a list of strings."""
    if cut := records.unfinished(raw, finish_reason):
        return cut
    tasks, why = records.parse_string_list(raw, finish_reason)
    return (
        records.Outcome("invalid", why, raw=raw) if why else records.Outcome("ok", record={"tasks": json.dumps(tasks)}, raw=raw)
    )


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """A seeded shuffle that leaves its input alone."""
    out = list(items)
    random.Random(seed).shuffle(out)
    return out

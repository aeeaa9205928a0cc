"""What a stage may take from an endpoint (calls, tokens, money), and what it has taken."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from speed_core.data.records import Status
from speed_core.profile import Teacher

OUTPUT_TOKENS = 300  # of an answer without a limit: the mean of the paper's seed calls is near it (Table 5)
CALL_SECONDS = 5.0  # of one call: a guess, replaced by the caps on a minute where they are set
SLACK = 1 + 1e-9  # for sums of floats


class BudgetReached(Exception):
    """The cap on calls, money or minutes is reached; what was answered so far is kept."""


class Ledger:
    """Calls, tokens and money spent, per purpose (seed, judge, revise ...)."""

    def __init__(self, settings: Teacher):
        self.settings = settings
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, purpose: str, input_tokens: float, output_tokens: float) -> None:
        """Count one call."""
        usd = self.settings.cost(input_tokens, output_tokens)
        row = self.rows.setdefault(purpose, {"calls": 0, "input_tokens": 0, "output_tokens": 0, "usd": 0.0})
        for name, value in (("calls", 1), ("input_tokens", input_tokens), ("output_tokens", output_tokens), ("usd", usd)):
            row[name] += value

    def add_entries(self, purpose: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Count the answers among the entries of a log."""
        for e in entries:
            if e["status"] != Status.ERROR:
                self.add(purpose, e.get("prompt_tokens", 0), e.get("new_tokens", 0))

    def total(self, key: str) -> float:
        return sum(row[key] for row in self.rows.values())


class Budget:
    """The caps of a stage on calls, tokens and money. They are hard: before each call there has to be room for all that it can take.

    That is its prompt, and an answer as long as `max_output_tokens` allows (without that limit: as the longest so far, at least
    300 tokens). A call waits while others in flight may leave room.
    """

    def __init__(self, settings: Teacher):
        self.settings, self.ledger = settings, Ledger(settings)
        self._in_flight: list[str] = []  # prompts
        self._released = asyncio.Event()
        self._tokens_per_character = 0.0  # the most so far; 0 before the first answer
        self._longest_answer = float(settings.max_output_tokens or OUTPUT_TOKENS)

    def _most(self, prompt: str) -> tuple[float, float]:
        """(input, output) tokens that one call can take."""
        return len(prompt) * (self._tokens_per_character or 0.25), self._longest_answer

    def most_tokens(self, prompt: str) -> float:
        return sum(self._most(prompt))

    def count(self, purpose: str, prompt: str, input_tokens: int, output_tokens: int) -> None:
        """Count a call that was answered."""
        self.ledger.add(purpose, input_tokens, output_tokens)
        self._tokens_per_character = max(self._tokens_per_character, input_tokens / max(1, len(prompt)))
        self._longest_answer = max(self._longest_answer, output_tokens)

    def count_most(self, purpose: str, prompt: str) -> None:
        """Count a call that may have been answered, with the most that it can have taken."""
        self.ledger.add(purpose, *self._most(prompt))

    @property
    def calls_left(self) -> float:
        return self.settings.max_calls - self.ledger.total("calls") - len(self._in_flight)

    def _reached(self, prompt: str) -> str:
        """The cap that one more call might break, or ""."""
        s, total, calls = self.settings, self.ledger.total, [self._most(p) for p in (*self._in_flight, prompt)]
        tokens = total("input_tokens") + total("output_tokens") + sum(map(sum, calls))
        usd = total("usd") + sum(s.cost(*c) for c in calls)
        if self.calls_left < 1:
            return f"max_calls {s.max_calls}"
        if s.max_tokens and tokens > s.max_tokens * SLACK:
            return f"max_tokens {s.max_tokens}"
        return f"max_usd {s.max_usd:g}" if s.max_usd and usd > s.max_usd * SLACK else ""

    @asynccontextmanager
    async def hold(self, prompt: str) -> AsyncIterator[None]:
        """Room for one call, while it runs. Raises BudgetReached that names the cap when no call in flight may leave any."""
        # How many tokens a prompt has, and how long an answer may be, is not known before there is one: the first call runs alone.
        while (reached := self._reached(prompt)) or (self._in_flight and not self._tokens_per_character):
            if not self._in_flight:
                raise BudgetReached(
                    f"teacher.{reached} reached: the next call may take {self.most_tokens(prompt):.0f} tokens; "
                    "raise it and run again to go on from here"
                )
            self._released.clear()
            await self._released.wait()
        self._in_flight.append(prompt)
        try:
            yield
        finally:
            self._in_flight.remove(prompt)
            self._released.set()


def estimate(settings: Teacher, texts: Sequence[str]) -> str:
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

"""How fast an endpoint is asked: concurrency that adapts, and caps on requests and tokens a minute.

Both live on one event loop, so they need no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Gate:
    """At most `limit` calls at once. Halved when the endpoint says 429, grown by one after as many successes as it has.

    Additive increase, multiplicative decrease, as in TCP: the right number is found without being told.
    """

    def __init__(self, most: int):
        self.most, self.limit, self._active = most, float(most), 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        while self._active >= max(1, int(self.limit)):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            # One for the slot that is free now, one more in case the limit has grown; who finds none waits again.
            self._wake(2)

    def _wake(self, count: int) -> None:
        while count and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def went_well(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / max(1.0, self.limit))

    def was_refused(self) -> None:
        self.limit = max(1.0, self.limit / 2)


class Pace:
    """Waits until one more call fits into the last `window` seconds; 0 means no cap."""

    def __init__(
        self, requests: int, tokens: int, window: float = 60.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self.requests, self.tokens, self.window, self._clock, self._sleep = requests, tokens, window, clock, sleep
        self._past: deque[list[float]] = deque()  # [when, tokens]

    async def enter(self, tokens: float) -> list[float]:
        """Wait for room and take it with an estimate of the call's tokens; `settle` corrects the estimate."""
        while True:
            now = self._clock()
            while self._past and now - self._past[0][0] >= self.window:
                self._past.popleft()
            full = 0 < self.requests <= len(self._past)
            # A call larger than the whole cap still has to go some time: alone.
            full = full or bool(self.tokens and self._past and sum(t for _, t in self._past) + tokens > self.tokens)
            if not full:
                entry = [now, float(tokens)]
                self._past.append(entry)
                return entry
            await self._sleep(max(self.window - (now - self._past[0][0]), 0.01))

    def settle(self, entry: list[float], tokens: float) -> None:
        entry[1] = float(tokens)

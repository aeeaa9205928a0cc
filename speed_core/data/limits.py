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
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the places, while the call runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < max(1, int(self.limit)))
            self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            async with self._changed:
                self._changed.notify(2)  # one for the place that is free now, one more in case the limit has grown

    def went_well(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / max(1.0, self.limit))

    def was_refused(self) -> None:
        self.limit = max(1.0, self.limit / 2)


class Pace:
    """Waits until one more call fits into the last `window` seconds; 0 means no cap.

    aiolimiter's leaky bucket would let nearly twice the cap through in the first window, and cannot correct an estimate.
    """

    def __init__(
        self, requests: int, tokens: int, window: float = 60.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self.requests, self.tokens, self.window, self._clock, self._sleep = requests, tokens, window, clock, sleep
        self._past: deque[list[float]] = deque()  # [when, tokens]

    async def enter(self, tokens: float) -> list[float]:
        """Wait for room and take it with an estimate of the call's tokens; [when, tokens], whose second number may be corrected."""
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

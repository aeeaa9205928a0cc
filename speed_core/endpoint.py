"""One OpenAI-compatible server, asked by the teacher (`speed_core.teacher`) and by generation (`speed_core.generate`).

The `openai` client in its async form, on an event loop of its own thread, so that a notebook (which has a loop of its
own) and a script use it alike. Transport errors, 408, 409, 425, 429 and 5xx are tried again with jitter and not before
the answer's Retry-After; other 4xx end at once, since the same request would fail again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from speed_core.artifacts import UserError
from speed_core.limits import Gate, Pace

RETRYABLE = (408, 409, 425, 429)  # of the 4xx; 5xx are all tried again
ATTEMPTS = 8


def final_status(error: BaseException) -> int | None:
    """The HTTP status of an error that asking again would only repeat, else None."""
    code = getattr(error, "status_code", None)
    return code if code is not None and 400 <= code < 500 and code not in RETRYABLE else None


class Endpoint:
    """`base_url` empty means the OpenAI API. The key comes from $OPENAI_API_KEY and is never logged.

    At most `concurrency` calls at once, fewer after a 429; caps on requests and tokens a minute (0: none).
    """

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        timeout_seconds: float = 120.0,
    ):
        import openai

        self._openai, self.where = openai, base_url or "the OpenAI API"
        self._gate, self._pace = Gate(concurrency), Pace(requests_per_minute, tokens_per_minute)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        key = os.environ.get("OPENAI_API_KEY", "") or "none"
        self.client = openai.AsyncOpenAI(api_key=key, base_url=base_url or None, max_retries=0, timeout=timeout_seconds)

    def submit(self, call: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Start a coroutine on this endpoint's loop; the future is the ordinary, thread-safe kind."""
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def served(self) -> list[str]:
        """Names of the models served there; one line with the remedy if it does not answer."""

        async def ask() -> Any:
            return await self.client.models.list()

        try:
            return [m.id for m in self.submit(ask()).result().data]
        except self._openai.AuthenticationError:
            raise UserError(f"endpoint {self.where}: the key was refused; set OPENAI_API_KEY to a valid one") from None
        except self._openai.OpenAIError as error:
            raise UserError(
                f"endpoint {self.where}: not reachable ({type(error).__name__}); start the server, or correct its base_url"
            ) from None

    def _retryable(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return final_status(error) is None
        # A body that ends too early or is no JSON is the connection's fault, not the request's.
        broken = (
            self._openai.APIConnectionError,
            self._openai.APIResponseValidationError,
            json.JSONDecodeError,
            httpx.TransportError,
        )
        return isinstance(error, broken)

    @staticmethod
    def _wait(state: Any) -> float:
        """Jittered back-off, but never sooner than the endpoint asked for; at most two minutes."""
        error = state.outcome.exception()
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        wait = wait_exponential_jitter(initial=0.5, max=30)(state)
        return min(120.0, max(wait, float(asked))) if asked.replace(".", "", 1).isdigit() else wait

    async def call(self, send: Callable[[], Awaitable[Any]], tokens: float, before: Callable[[], None] = lambda: None) -> Any:
        """The reply of `send()`, tried again as said above. `tokens`: an estimate for the pace.

        `before` runs when all waiting is over, just before each try, and may refuse it by raising.
        """
        tries = AsyncRetrying(
            retry=retry_if_exception(self._retryable), stop=stop_after_attempt(ATTEMPTS), wait=self._wait, reraise=True
        )
        async for attempt in tries:
            with attempt:
                return await self._once(send, tokens, before)

    async def _once(self, send: Callable[[], Awaitable[Any]], tokens: float, before: Callable[[], None]) -> Any:
        async with self._gate.slot():
            taken = await self._pace.enter(tokens)
            before()
            try:
                reply = await send()
            except self._openai.RateLimitError:
                self._gate.was_refused()
                raise
            if not reply.choices:
                raise httpx.RemoteProtocolError("an answer without choices")
            self._gate.went_well()
            if reply.usage:
                self._pace.settle(taken, reply.usage.total_tokens)
            return reply

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._loop.is_running():
            self.submit(self.client.close()).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)


class Deadline:
    """Minutes that a whole stage may take, counted from its making."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

"""One OpenAI-compatible server, asked by the teacher (`speed_core.data.endpoint_teacher`) and by generation
(`speed_core.generation.server_engine`).

The `openai` client in its async form, on an event loop of its own thread, so that a notebook (which has a loop of its own) and a
script use it alike. A call ends in an answer, in a refusal of this one request (`replies.of_request`), or in a refusal of whoever
asks. Faults that pass (transport errors, 408, 409, 425, 429, 5xx, a body that is no answer) are tried again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar

import openai

from speed_core.data.limits import Gate, Pace
from speed_core.data.replies import Completion, NoAnswer, asked_wait, final_status, sentence, status_of, without_secrets
from speed_core.files import UserError, with_user

T = TypeVar("T")
PROBE = "Answer with one word: yes."
ATTEMPTS = 8  # while the server does not say how long to wait
# A body that ends too early or is no JSON is the connection's fault, not the request's.
BROKEN = (openai.APIConnectionError, NoAnswer, json.JSONDecodeError, UnicodeDecodeError, RecursionError)


class Endpoint:
    """`base_url` empty means the OpenAI API. The key comes from $OPENAI_API_KEY and is never logged.

    At most `concurrency` calls at once, fewer after a 429; caps on requests and tokens a minute (0: none). A server may ask to wait
    for as long as `longest_wait` seconds. The client's own retries are off: they would hold a place and its budget while they wait,
    and give up where a server asks for more than two minutes.
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
        self.where = without_secrets(base_url) or "the OpenAI API"
        self._longest_wait = longest_wait
        self._gate, self._pace = Gate(concurrency), Pace(requests_per_minute, tokens_per_minute)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        key = os.environ.get("OPENAI_API_KEY", "") or "none"
        self.client = openai.AsyncOpenAI(
            api_key=key, base_url=with_user(base_url) or None, max_retries=0, timeout=timeout_seconds
        )

    def submit(self, call: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on this endpoint's loop; the future is the ordinary, thread-safe kind."""
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def served(self) -> list[str]:
        """Names of the models that the server lists; empty where it lists none. One line with the remedy if it does not answer."""

        async def ask() -> Any:
            for pause in (0.5, 1.0, 1.5):
                try:
                    return await self.client.models.list()
                except openai.InternalServerError:
                    await asyncio.sleep(pause)
            return None

        try:
            listed = self.submit(ask()).result()
            return [m.id for m in getattr(listed, "data", None) or () if isinstance(getattr(m, "id", None), str)]
        except openai.APIConnectionError as error:
            raise UserError(
                f"endpoint {self.where}: not reachable ({type(error).__name__}); start the server, or correct its base_url"
            ) from None
        except Exception:  # a gateway without a list, with another one, or a key that may not see it: the first request will tell
            return []

    def refuses_all(self, error: BaseException, model: str, listed: Sequence[str]) -> UserError:
        """The one line for a refusal that every request would meet."""
        other = [m for m in listed if m != model]
        serves = f"; it lists {', '.join(other[:5])}" if other and status_of(error) == 404 else ""
        remedy = "set OPENAI_API_KEY to a valid one" if status_of(error) in (401, 403) else "correct it"
        return UserError(
            f"endpoint {self.where}: it refuses every request ({sentence(error)}){serves}; {remedy} and run again: what was answered is kept"
        )

    def answers(self, probe: Coroutine[Any, Any, Any]) -> bool:
        """Whether the server answers a request that asks for little. A fault that may pass counts for the server."""
        try:
            self.submit(probe).result(timeout=120)
        except Exception as error:
            return final_status(error) is None
        return True

    async def call(
        self,
        send: Callable[[], Awaitable[Completion]],
        tokens: float,
        admission: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> Completion:
        """The answer of `send()`, tried again where the fault may pass; `tokens`: an estimate for the pace.

        `ATTEMPTS` tries; one after which the server asks to wait a second or more does not count, until the longest wait is over.
        Each try runs inside of `admission()`, which may make it wait, or refuse it by raising. It is left before the wait for the
        next try, which holds nothing that others wait for.
        """
        number, counted, waited = 0, 0, 0.0
        while True:
            try:
                async with self._gate.slot(), admission():
                    paced = await self._pace.enter(tokens)
                    answer = await send()
                self._gate.went_well()
                if answer.counted:
                    paced[1] = answer.prompt_tokens + answer.new_tokens
                return answer
            except Exception as error:
                if isinstance(error, openai.RateLimitError):
                    self._gate.was_refused()
                passes = final_status(error) is None if isinstance(error, openai.APIStatusError) else isinstance(error, BROKEN)
                asked = self._asked_wait(error)
                counted, waited = counted + (asked < 1), waited + asked
                if not passes or counted >= ATTEMPTS or waited > self._longest_wait:
                    raise
            await asyncio.sleep(self._wait(number, asked))
            number += 1

    def _asked_wait(self, error: BaseException) -> float:
        """Seconds that the server asks to wait. Only a refusal for being busy asks: others carry such headers, too."""
        response = getattr(error, "response", None)
        if response is None or status_of(error) not in (429, 503):
            return 0.0
        return min(asked_wait(response.headers, time.time()), self._longest_wait)

    def _wait(self, number: int, asked: float) -> float:
        """Seconds before the next try: jittered back-off, but never sooner than the server asked for."""
        if asked > 60:
            print(f"the endpoint asks to wait {asked / 60:.0f} minutes", flush=True)
        return max(back_off(number), asked)

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._loop.is_running():
            self.submit(self.client.close()).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)


def back_off(number: int) -> float:
    """Seconds to wait after try `number` (from 0): doubling, with jitter, at most 30."""
    return min(30.0, 0.5 * 2**number + random.random())

"""The teacher behind an OpenAI-compatible endpoint: GPT-4o, a self-hosted `vllm serve`, or anything else that speaks the protocol."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import openai

from speed_core.data.budget import Budget, BudgetReached, estimate
from speed_core.data.endpoint import PROBE, Endpoint
from speed_core.data.prompts import Prompt
from speed_core.data.replies import Completion, final_status, of_request, read
from speed_core.data.teacher import ModelTeacher
from speed_core.files import UserError
from speed_core.profile import Teacher as TeacherSettings

UNSENT = ("ConnectTimeout", "PoolTimeout")  # of httpx: no request went out


class EndpointTeacher(ModelTeacher):
    """Asks `settings.model` at `settings.base_url`, within a `Budget`; what a stage's log holds already counts, minutes aside."""

    def __init__(self, settings: TeacherSettings):
        if not settings.model:
            raise UserError("teacher.model: empty; name the model that the endpoint serves")
        if not os.environ.get("OPENAI_API_KEY") and not settings.base_url:
            raise UserError(
                "OPENAI_API_KEY: not set; export it, set teacher.base_url to a server of yours, "
                "or use the recorded teacher (teacher.kind=recorded)"
            )
        super().__init__(settings)
        self.budget = Budget(settings)
        self.ledger = self.budget.ledger
        self._counted: set[str] = set()  # entries of a log that are in the ledger
        self._listed: list[str] = []
        self._stopped: UserError | None = None  # why no further call is sent
        self._end = time.monotonic() + 60 * settings.max_minutes
        limits = settings.model_dump(include={"concurrency", "requests_per_minute", "tokens_per_minute", "timeout_seconds"})
        self.endpoint = Endpoint(settings.base_url, **limits, longest_wait=60 * settings.max_minutes)

    def check(self) -> None:
        """Reach the endpoint once; one line with the remedy if it does not answer. A model that it does not list is tried, too:
        gateways list others, or none."""
        self._listed = self.endpoint.served()
        if self._listed and self.settings.model not in self._listed:
            print(
                f"teacher.model {self.settings.model!r}: not among those that the endpoint lists ({', '.join(self._listed[:5])})"
            )

    def remember(self, entries: Iterable[Mapping[str, Any]], purpose: str) -> None:
        new = [e for e in entries if e["id"] not in self._counted]
        self._counted.update(e["id"] for e in new if e["status"] != "error")
        self.ledger.add_entries(purpose, new)

    def begin(self, items: Sequence[Prompt], keys: Iterable[str], purpose: str) -> None:
        self._stopped = None
        self._counted.update(keys)
        print(f"{purpose}: {estimate(self.settings, [p.text for p in items])}", flush=True)

    def submit(self, prompt: Prompt, purpose: str, temperature: float | None = None) -> Future[Completion]:
        return self.endpoint.submit(self._answer(prompt, purpose, temperature))

    async def _answer(self, prompt: Prompt, purpose: str, temperature: float | None) -> Completion:
        """The answer to one prompt, counted in the ledger. Raises UserError where the server would refuse every request."""
        text, budget = prompt.text, self.budget

        @asynccontextmanager
        async def admitted() -> AsyncIterator[None]:
            async with budget.hold(text):
                if self._stopped:
                    raise self._stopped
                yield

        async def send() -> Completion:
            if self._stopped:
                raise self._stopped
            try:
                done = read(await self._create(text, temperature), prompt.id, len(text) / 4)
            except openai.APITimeoutError as error:
                if type(error.__cause__).__name__ not in UNSENT:  # the server may have written an answer, and count it
                    budget.count_most(purpose, text)
                raise
            budget.count(purpose, text, done.prompt_tokens, done.new_tokens)
            return done

        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())):
                return await self.endpoint.call(send, budget.most_tokens(text), admitted)
        except TimeoutError:
            minutes = self.settings.max_minutes
            raise BudgetReached(f"teacher.max_minutes {minutes:g} reached; raise it and run again to go on from here") from None
        except Exception as error:
            if final_status(error) is None or of_request(error):
                raise
            raise self._refuses_all(error) from None

    async def _create(self, text: str, temperature: float | None) -> bytes:
        how = self.sampling_params(temperature)
        if most := how.pop("max_output_tokens"):
            how["max_tokens"] = most
        create = self.endpoint.client.chat.completions.with_raw_response.create
        reply = await create(model=self.settings.model, messages=[{"role": "user", "content": text}], **how)
        return reply.content

    def refuses_all(self, error: BaseException, purpose: str, temperature: float | None) -> UserError | None:
        # The probe counts as a call, and is left out where the budget has no room for one.
        if self.budget.calls_left < 1:
            return None
        self.budget.count_most(purpose, PROBE)
        return None if self.endpoint.answers(self._create(PROBE, temperature)) else self._refuses_all(error)

    def _refuses_all(self, error: BaseException) -> UserError:
        self._stopped = self.endpoint.refuses_all(error, self.settings.model, self._listed)
        return self._stopped

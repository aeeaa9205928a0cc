"""Generation through any OpenAI-compatible server, for instance a `vllm serve` on another machine.

    vllm serve MODEL --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' \\
        --enable-lora --lora-modules junior=FOLDER revisor=FOLDER

The completions interface is used with token ids, so that the server adds no template and no second <bos>. The JSON schema
goes along as `structured_outputs`, vLLM's name for it; a server that ignores it still ends in logged outcomes, only fewer
of them valid.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import as_completed
from typing import Any

from speed_core.data.endpoint import PROBE, Endpoint
from speed_core.data.replies import Completion, Refusals, of_request, read, sentence
from speed_core.files import UserError
from speed_core.generation.engines import Decoding, Engine, Request, grammar_schema
from speed_core.models import loading


class ServerEngine(Engine):
    """Asks the served model `name` at `base_url`; `tokenizer` is the name or folder that its prompts are encoded with."""

    name = "server"

    def __init__(self, base_url: str, served: str, tokenizer: str, *, concurrency: int = 64, timeout_seconds: float = 600.0):
        if not base_url:
            raise UserError("generation.base_url: empty; engine 'server' needs the address of one, like http://HOST:8000/v1")
        self._endpoint = Endpoint(base_url, concurrency=concurrency, timeout_seconds=timeout_seconds)
        self._served = served
        try:
            self._listed = self._endpoint.served()
        except UserError:
            self._endpoint.close()
            raise
        self._tokenizer = loading.load_tokenizer(tokenizer)

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        futures = [self._endpoint.submit(self._complete(r, decoding)) for r in requests]
        refusals: Refusals[Completion] = Refusals()
        waiting = set(futures)
        try:
            for future in as_completed(futures):
                waiting.discard(future)
                try:
                    done = future.result()
                except Exception as error:  # the client raises many types; none of them loses what is logged already
                    name = self._served
                    lists = f"; it lists {', '.join(self._listed[:5])}" if self._listed and name not in self._listed else ""
                    start = f"; start it with --lora-modules {name}=FOLDER, or --served-model-name {name}" if lists else ""
                    raise UserError(
                        f"generation.base_url: the server failed for model {name!r} ({sentence(error)}){lists}{start}; finished "
                        "requests are logged, correct that and run again to go on"
                    ) from None
                if done.finish_reason != "error":
                    yield done
                    yield from refusals.release()
                    continue
                if not refusals.hold(done.text, done):
                    continue
                kind = next(r.kind for r in requests if r.id == done.id)
                if self._endpoint.answers(self._create(PROBE, kind, decoding, 0)):
                    yield from refusals.release(probed=True)
                    continue
                for other in [f for f in waiting if f.done() and not f.exception()]:
                    if other.result().finish_reason != "error":
                        yield other.result()
                raise UserError(
                    f"generation.base_url: every request is {done.text}; finished requests are logged, correct the server's "
                    "settings and run again to go on"
                )
            yield from refusals.release()
        finally:
            for future in futures:
                future.cancel()

    async def _create(self, text: str, kind: str, decoding: Decoding, seed: int) -> bytes:
        extra: dict[str, Any] = {}
        if kind and decoding.constrained:
            extra["structured_outputs"] = {"json": grammar_schema(kind)}
        how: dict[str, Any] = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
        }
        create, ids = self._endpoint.client.completions.with_raw_response.create, loading.encode_prompt(self._tokenizer, text)
        reply = await create(model=self._served, prompt=ids, **how, seed=seed, extra_body=extra)
        return reply.content

    async def _complete(self, r: Request, decoding: Decoding) -> Completion:
        ids = loading.encode_prompt(self._tokenizer, r.text)

        async def send() -> Completion:
            return read(await self._create(r.text, r.kind, decoding, r.seed), r.id, len(ids))

        try:
            return await self._endpoint.call(send, len(ids) + decoding.max_new_tokens)
        except Exception as error:
            if of_request(error):
                return Completion(r.id, f"refused by the server ({sentence(error)})", "error", len(ids), 0)
            raise

    def close(self) -> None:
        self._endpoint.close()

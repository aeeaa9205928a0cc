"""What every engine takes and gives, and which engine is opened.

Each engine has a file: `vllm_engine` (a child process), `transformers_engine` (this process), `server_engine` (any
OpenAI-compatible server) and `ray_engine` (several processes or machines). With `constrained` decoding a grammar holds the
text to the JSON schema of its kind. A grammar guarantees a prefix of a valid object, not its end.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from speed_core import machine
from speed_core.data import records
from speed_core.data.replies import Completion
from speed_core.files import Lazy, UserError, digest
from speed_core.models import loading

# Measured on 2 cores (gemma-3-270m, 32 to 64 requests with a grammar): vLLM starts in 24 s without graph
# compilation and then writes 150 to 200 tokens a second, `generate` about 30. Below this many tokens the
# start costs more than it saves.
VLLM_WORTH_TOKENS = 1000


class EngineName(StrEnum):
    """The engines that this package starts itself, and `auto`, which chooses between them."""

    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened. `workers`: 0 for one engine here, else that many over the Ray at `ray_address`."""

    name: str = EngineName.AUTO
    dtype: str = "auto"
    max_length: int = 1024
    batch_size: int = 32
    workers: int = 0
    ray_address: str = ""


@dataclass(frozen=True)
class Decoding:
    """How text is sampled. Temperature and top_p as in SPEED appendix B (1.0 and 1.0)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 200
    constrained: bool = True


@dataclass(frozen=True)
class Request:
    """One text to be written: `id` names it, `kind` decides the schema (empty: free text), `attempt` counts from 1."""

    id: str
    text: str
    kind: str = ""
    seed: int = 0
    attempt: int = 1

    def again(self) -> Request:
        """The next attempt: the same prompt with a seed of its own."""
        seed = int(digest([self.seed, self.attempt])[:8], 16) & 0x7FFFFFFF
        return replace(self, seed=seed, attempt=self.attempt + 1)


class Engine(ABC):
    """Streams one completion per request, in any order."""

    name: str

    @abstractmethod
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        """Yield one completion for each of `requests`."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory, processes and connections."""

    def rest(self) -> None:
        """Close when every request was answered. An engine whose start is slow may stay warm for the next one."""
        self.close()


def by_length(requests: Sequence[Request], tokenizer: Any) -> Lazy[Request]:
    """Requests from the shortest prompt to the longest, in tokens, so that the padding of a batch stays small."""
    lengths = [len(loading.encode_prompt(tokenizer, r.text)) for r in requests]
    return Lazy(requests.__getitem__, sorted(range(len(lengths)), key=lengths.__getitem__))


def grammar_schema(kind: str) -> dict[str, Any]:
    """Schema handed to the grammar: without a largest length of a string, which `records.parse` checks.

    With one, xgrammar 0.2.8 takes 13 s to compile the first schema for 262,144 words, and 0.2 s without. The token limit ends a
    text that does not end by itself.
    """
    schema = records.schema(kind)
    for value in schema["properties"].values():
        del value["maxLength"]
    return schema


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(name: str, requests: int, max_new_tokens: int) -> str:
    """Resolve `auto`: Transformers for little work and where vLLM is not installed, else vLLM.

    A server is never chosen here: it needs an address (`server_engine.ServerEngine`).
    """
    if name not in list(EngineName):
        raise UserError(f"generation.engine {name!r}: unknown; use auto, vllm, transformers or server")
    if name == EngineName.VLLM and not vllm_installed():
        raise UserError("generation.engine 'vllm': not installed; run make setup, or use transformers")
    if name != EngineName.AUTO:
        return name
    # Half of the token limit is a fair guess of what a record takes.
    worth = requests * max_new_tokens / 2 >= VLLM_WORTH_TOKENS
    return EngineName.VLLM if worth and vllm_installed() else EngineName.TRANSFORMERS


def open_engine(options: EngineOptions, model: str, adapter: Path | None = None) -> Engine:
    """Start the engine `options.name` ("vllm" or "transformers") on base weights, with an adapter if given."""
    # An engine is imported when it is chosen: torch alone takes seconds.
    if options.workers:
        from speed_core.generation.ray_engine import RayEngine

        return RayEngine(options, model, adapter)
    if adapter is not None:
        loading.check_adapter(adapter, model)
    if options.name == EngineName.VLLM:
        from speed_core.generation.vllm_engine import VllmEngine

        return VllmEngine(model, adapter, options.dtype, options.max_length)
    machine.end_idle()
    from speed_core.generation.transformers_engine import TransformersEngine

    return TransformersEngine(model, adapter, options.dtype, options.batch_size)

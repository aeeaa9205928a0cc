"""Engines: what turns requests into completions.

They share one small interface: vLLM in a process of its own (its memory is really back after `close`), Transformers in
this process (padded batches here, continuous batching in `speed_core.generation.continuous_engine`), and any OpenAI-compatible server
(`speed_core.generation.server_engine`). With `constrained` decoding the text is held to the JSON schema of its kind by a grammar; a
grammar guarantees a prefix of a valid object, not its end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from speed_core import machine
from speed_core.data import records
from speed_core.data.replies import Completion
from speed_core.files import PACKAGE, UserError, digest
from speed_core.models import compute_type, loading

# Measured on 2 cores (gemma-3-270m, 32 to 64 requests with a grammar): vLLM starts in 24 s without graph
# compilation and then writes 150 to 200 tokens a second, `generate` about 30; below this many tokens the
# start costs more than it saves.
VLLM_WORTH_TOKENS = 1000
REST_SECONDS = 300  # that a vLLM waits for other weights of the same architecture
# For glibc: keep what was freed. By default each tensor of 64 x 262,144 logits is new memory, whose first touch costs more
# than the step that fills it (with the nucleus in place: 127 -> 206 tokens a second).
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


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


class Engine(Protocol):
    """Anything that streams one completion per request, in any order."""

    name: str

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]: ...

    def close(self) -> None: ...


def grammar_schema(kind: str) -> dict[str, Any]:
    """Schema handed to the grammar: without a largest length of a string, which `records.parse` checks.

    With one, xgrammar 0.2.8 takes 13 s to compile the first schema for 262,144 words, and 0.2 s without. The token limit ends a
    text that does not end by itself.
    """
    schema = records.schema(kind)
    for value in schema["properties"].values():
        del value["maxLength"]
    return schema


class TransformersEngine:
    """`model.generate` in this process, requests sorted by length so that padding stays small."""

    name = "transformers"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "auto", batch_size: int = 32):
        self.tokenizer = loading.load_tokenizer(model)
        self.model = loading.prepack(loading.load_causal_lm(model, adapter, dtype).to(machine.device()))
        self.batch_size = batch_size
        self._compiler: Any = None

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        import torch

        encoded = {r.id: loading.encode_prompt(self.tokenizer, r.text) for r in requests}
        order = sorted(requests, key=lambda r: len(encoded[r.id]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [encoded[r.id] for r in batch]
            width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
            device = self.model.device
            ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
            with torch.no_grad():
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=decoding.max_new_tokens,
                    pad_token_id=pad,
                    logits_processor=self._processors(batch, decoding),
                    do_sample=False,  # `_processors` sample; the model's own sampling defaults are not used
                )
            for request, row, full in zip(batch, rows, out[:, width:].tolist(), strict=True):
                eos = self.tokenizer.eos_token_id
                ended = eos in full
                new = full[: full.index(eos)] if ended else full
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                yield Completion(request.id, text, "stop" if ended else "length", len(row), len(new))

    def _processors(self, batch: Sequence[Request], decoding: Decoding) -> list[Any]:
        """Grammar, temperature, nucleus, noise, in this order: the nucleus is taken of the tokens that the grammar allows."""
        from transformers import TemperatureLogitsWarper

        from speed_core.generation import top_p

        out = self._grammars(batch) if decoding.constrained and any(r.kind for r in batch) else []
        if decoding.temperature > 0:
            out += [TemperatureLogitsWarper(decoding.temperature), top_p.hf_processor(decoding.top_p)]
            out.append(top_p.hf_noise([r.seed for r in batch]))
        return out

    def _grammars(self, batch: Sequence[Request]) -> list[Any]:
        from xgrammar.contrib.hf import LogitsProcessor

        return [LogitsProcessor([self._compiled(r.kind) for r in batch])]

    def _compiled(self, kind: str) -> Any:
        """The grammar of a kind, compiled once: reading a vocabulary of 262,144 words takes longer than a step."""
        import xgrammar

        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.model.config.vocab_size)
            self._compiler = xgrammar.GrammarCompiler(info)
        # The compiler keeps what it has compiled.
        schema = json.dumps(grammar_schema(kind))
        return self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))

    def close(self) -> None:
        del self.model


class _Worker:
    """The child process of a `VllmEngine`: JSON lines in and out, and what it said on its way down."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+b")
        read_end, write_end = os.pipe()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "speed_core.generation.vllm_worker", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[write_end],
            env={**KEPT_MEMORY, **os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])},
        )
        os.close(write_end)
        self._out = os.fdopen(read_end, encoding="utf-8")

    def send(self, message: Any) -> None:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write((json.dumps(message) + "\n").encode())
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # the reader reports the dead child with its own error

    def read(self) -> Any:
        """Its next line; None when it is dead."""
        line = self._out.readline()
        return json.loads(line) if line else None

    def last_error(self) -> str:
        self.child.wait()
        self._errors.seek(0)
        lines = [s for s in self._errors.read().decode(errors="replace").splitlines() if "Error" in s]
        return lines[-1].strip()[:300] if lines else f"exit code {self.child.returncode}"

    def end(self) -> None:
        if self.child.stdin and not self.child.stdin.closed:
            try:
                self.child.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._out.close()
        self._errors.close()


class _Resting:
    """At most one vLLM that was let go of a moment ago, and ends by itself soon if nobody takes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[Any, _Worker, threading.Timer] | None = None

    def put(self, sizes: Any, worker: _Worker) -> None:
        self.end()
        timer = threading.Timer(REST_SECONDS, self._end, [worker])
        timer.daemon = True
        with self._lock:
            self._held = sizes, worker, timer
        timer.start()

    def take(self, sizes: Any) -> _Worker | None:
        """The worker if it has these sizes; one of other sizes ends."""
        with self._lock:
            held, self._held = self._held, None
        if held is None:
            return None
        held[2].cancel()
        if held[0] == sizes and held[1].child.poll() is None:
            return held[1]
        held[1].end()
        return None

    def end(self) -> None:
        self.take(None)

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            mine = self._held is not None and self._held[1] is worker
            self._held = None if mine else self._held
        if mine:
            worker.end()


_resting = _Resting()


def end_resting() -> None:
    """End a vLLM that rests, where something else is about to need the memory: another engine, or models that are trained side by side."""
    _resting.end()


machine.IDLE.append(end_resting)


class VllmEngine:
    """vLLM in a child process. The parent never touches the accelerator; memory is back after `close`.

    After `rest` the child stays for `REST_SECONDS`. An engine of the same architecture that is opened in that time reads its
    weights into it, which writes the same texts and takes a few seconds where a start takes half a minute.
    """

    name = "vllm"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "auto", max_length: int = 1024):
        dtype = compute_type.choose(dtype, folder=loading.resolve(model)).name
        self._sizes = dtype, max_length, loading.architecture(model)
        rested = _resting.take(self._sizes)
        self._worker = rested or _Worker()
        try:  # while a new child imports
            folder = str(loading.merged_folder(model, adapter)) if adapter else loading.resolve(model)
            first = {"model": folder, "dtype": dtype, "max_length": max_length}
            self._worker.send(first)
            self._tokenizer = loading.load_tokenizer(folder)
            ready = self._worker.read()
            if ready is None and rested:  # it could not take these weights
                self._worker.end()
                self._worker = _Worker()
                self._worker.send(first)
                ready = self._worker.read()
            if ready is None:
                why = self._worker.last_error()
                raise UserError(f"vllm: the engine did not start ({why}); use generation.engine=transformers")
        except BaseException:
            self._worker.child.kill()
            self.close()
            raise

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        job = {
            "decoding": asdict(decoding),
            "schemas": {k: grammar_schema(k) for k in {r.kind for r in requests} if k},
            "requests": [
                {
                    "id": r.id,
                    "ids": loading.encode_prompt(self._tokenizer, r.text),
                    "kind": r.kind if decoding.constrained else "",
                    "seed": r.seed,
                }
                for r in requests
            ],
        }
        # A thread writes, so that a large job cannot block while the child's answers fill the pipe.
        writer = threading.Thread(target=self._worker.send, args=(job,), daemon=True)
        writer.start()
        for _ in requests:
            answer = self._worker.read()
            if answer is None:
                why = self._worker.last_error()
                raise UserError(f"vllm: the engine ended in the middle ({why}); finished requests are logged, run again to go on")
            yield Completion(**answer)
        writer.join()

    def close(self) -> None:
        self._worker.end()

    def rest(self) -> None:
        """Close, but for an engine that is opened at once. To be called only when every request was answered."""
        _resting.put(self._sizes, self._worker)


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(name: str, requests: int, max_new_tokens: int) -> str:
    """Resolve `auto`: for little work Transformers; else vLLM, or Transformers' continuous batching where that is missing.

    A server is never chosen by itself: it needs an address (`server_engine.ServerEngine`).
    """
    if name not in ("auto", "vllm", "transformers", "continuous"):
        raise UserError(f"generation.engine {name!r}: unknown; use auto, vllm, transformers, continuous or server")
    if name == "vllm" and not vllm_installed():
        raise UserError("generation.engine 'vllm': not installed; run make setup, or use transformers")
    if name != "auto":
        return name
    # Half of the token limit is a fair guess of what a record takes.
    worth = requests * max_new_tokens / 2 >= VLLM_WORTH_TOKENS
    if not worth:
        return "transformers"
    return "vllm" if vllm_installed() else "continuous"


def open_engine(
    name: str,
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str = "auto",
    max_length: int = 1024,
    batch_size: int = 32,
    workers: int = 0,
    ray_address: str = "",
) -> Engine:
    """Start the engine `name` ("vllm" or "transformers") on base weights, with an adapter if given.

    `workers`: 0 for one engine of this process, else that many over the Ray at `ray_address` (`speed_core.generation.ray_engine`).
    """
    if workers:
        from speed_core.generation.ray_engine import RayEngine

        sizes: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "batch_size": batch_size}
        return RayEngine(name, model, adapter, workers=workers, address=ray_address, **sizes)
    if adapter is not None:
        loading.check_adapter(adapter, model)
    if name == "vllm":
        return VllmEngine(model, adapter, dtype, max_length)
    end_resting()
    if name == "continuous":
        from speed_core.generation.continuous_engine import ContinuousEngine

        return ContinuousEngine(model, adapter, dtype)
    return TransformersEngine(model, adapter, dtype, batch_size)

"""vLLM in a child process (`vllm_worker`), so that its memory is really back when it ends.

The two talk through a pipe of `multiprocessing`, in pickled dataclasses. The child is started as a module of its own and not by
multiprocessing's "spawn": that would run a user's script again in the child, and cannot send what vLLM prints to a file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_core import machine
from speed_core.files import PACKAGE, UserError
from speed_core.generation.engines import Completion, Decoding, Engine, Request, grammar_schema
from speed_core.models import compute_type, loading

REST_SECONDS = 300  # that a vLLM waits for other weights of the same architecture
JOB = 2**14  # prompts sent at a time: more of them, as lists of token ids, would take more memory than the engine saves by them
# For glibc: keep what was freed. By default each tensor of 64 x 262,144 logits is new memory, whose first touch costs more
# than the step that fills it (with the nucleus in place: 127 -> 206 tokens a second).
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass(frozen=True)
class LoadWeights:
    """To the child: read these weights. The first message starts the engine; the answer is None."""

    folder: str
    dtype: str
    max_length: int


@dataclass(frozen=True)
class Job:
    """To the child: answer each prompt (a request and its token ids) with a `Completion`. `schemas`: JSON schema of each kind."""

    decoding: Decoding
    schemas: dict[str, dict[str, Any]]
    prompts: list[tuple[Request, list[int]]]


@dataclass(frozen=True)
class Rest:
    """To the child: end yourself when no message comes for so many seconds."""

    seconds: float


class WorkerDied(Exception):
    """The child process ended; the text says why."""


class Worker:
    """The child process, the pipe to it, and a file with what it prints."""

    def __init__(self) -> None:
        self._printed = tempfile.TemporaryFile("w+b")
        self._pipe, other_end = multiprocessing.Pipe()
        with other_end:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "speed_core.generation.vllm_worker", str(other_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=[other_end.fileno()],
                env={**KEPT_MEMORY, **os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])},
            )

    def send(self, message: LoadWeights | Job | Rest) -> None:
        with contextlib.suppress(OSError):  # `receive` reports a dead child
            self._pipe.send(message)

    def receive(self) -> Any:
        """Its next message: a `Completion`, or None once it has read weights. Raises WorkerDied."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerDied(self._last_error()) from None

    def _last_error(self) -> str:
        self.child.wait()
        self._printed.seek(0)
        lines = [s for s in self._printed.read().decode(errors="replace").splitlines() if "Error" in s]
        return lines[-1].strip()[:300] if lines else f"exit code {self.child.returncode}"

    def end(self) -> None:
        self._pipe.close()  # the child ends when it reads the end of the pipe
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._printed.close()


Sizes = tuple[dict[str, Any], str, int]  # architecture, dtype, max_length: what a worker cannot change
_resting: tuple[Sizes, Worker] | None = None  # the worker that `VllmEngine.rest` left


def end_resting() -> None:
    """End a vLLM that rests, because something else needs the memory: another engine, or models that are trained."""
    _take_resting(None)


def _take_resting(sizes: Sizes | None) -> Worker | None:
    """The resting worker if it has these sizes and is alive; any other one ends."""
    global _resting
    held, _resting = _resting, None
    if held is None:
        return None
    if held[0] == sizes and held[1].child.poll() is None:
        return held[1]
    held[1].end()
    return None


machine.IDLE.append(end_resting)


class VllmEngine(Engine):
    """vLLM in a child process. The parent never touches the accelerator; memory is back after `close`.

    After `rest` the child stays for `REST_SECONDS`. An engine of the same architecture that is opened in that time reads its
    weights into it, which writes the same texts and takes a few seconds where a start takes half a minute.
    """

    name = "vllm"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "auto", max_length: int = 1024):
        dtype = compute_type.choose(dtype, folder=loading.resolve(model)).name
        self._sizes: Sizes = loading.architecture(model), dtype, max_length
        rested = _take_resting(self._sizes)
        self._worker = rested or Worker()
        try:  # while a new child imports
            folder = str(loading.merged_folder(model, adapter)) if adapter else loading.resolve(model)
            weights = LoadWeights(folder, dtype, max_length)
            self._worker.send(weights)
            self._tokenizer = loading.load_tokenizer(model)
            try:
                self._worker.receive()
            except WorkerDied:
                if rested is None:
                    raise
                self._worker.end()  # it could not take these weights
                self._worker = Worker()
                self._worker.send(weights)
                self._worker.receive()
        except BaseException as error:
            self._worker.child.kill()
            self.close()
            if isinstance(error, WorkerDied):
                raise UserError(f"vllm: the engine did not start ({error}); use generation.engine=transformers") from None
            raise

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        try:
            for start in range(0, len(requests), JOB):
                prompts = [(r, loading.encode_prompt(self._tokenizer, r.text)) for r in requests[start : start + JOB]]
                schemas = {k: grammar_schema(k) for k in {r.kind for r, _ in prompts} if k} if decoding.constrained else {}
                self._worker.send(Job(decoding, schemas, prompts))
                for _ in prompts:
                    yield self._worker.receive()
        except WorkerDied as error:
            raise UserError(
                f"vllm: the engine ended in the middle ({error}); finished requests are logged, run again to go on"
            ) from None

    def close(self) -> None:
        self._worker.end()

    def rest(self) -> None:
        """Let the child stay for an engine that is opened soon. To be called only when every request was answered."""
        global _resting
        end_resting()
        self._worker.send(Rest(REST_SECONDS))
        _resting = self._sizes, self._worker

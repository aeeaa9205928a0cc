"""The same generation stage on several processes or machines: Ray actors around the engines of `generate`.

Each actor holds one engine; chunks of requests go to whichever actor is free, so a fast machine takes more.
The request log is written by the caller alone (`generate.generate_all`), so ids, log and resume are those of one
process. With Transformers the chunks are the very batches of one process: where the machines compute alike,
the texts are the same too.

What every machine needs: this package with the same lock (`make setup`), and the weights under the same
name, that is `package:NAME`, a hub id, or a folder that all machines share (base and adapter; a run's own
adapters lie under $SPEED_RUNS). A worker that would load other weights than the caller's is refused.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed_core.files import UserError
from speed_core.generation.engines import Completion, Decoding, Engine, EngineName, EngineOptions, Request, open_engine
from speed_core.models import loading

RESTARTS = 3  # fresh actors a worker may cost, over the life of the engine
# vLLM batches by itself and drains at the end of a chunk; this many chunks a worker keep the drains rare
# and the last chunks short. The cap bounds what a killed worker has to write again.
VLLM_CHUNKS, VLLM_CHUNK = 4, 1024
WAIT_SECONDS = 60.0  # after this long without any worker the user is told what is missing
RUN_AGAIN = "finished requests are logged, run again to go on"


def _ray() -> Any:
    """The ray module. Raises UserError where it is not installed."""
    # Children of a killed actor (vLLM's process) must give the GPU back; read when a Ray starts here.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a notice at every start without GPU
    try:
        import ray
    except ImportError:
        raise UserError(
            "generation.executor 'ray': not installed; run make setup (or pip install ray), or use generation.executor=process"
        ) from None
    return ray


START_TRIES = 3


def connect(address: str = "") -> bool:
    """Connect this process to a Ray; True when `ray.shutdown` is then the caller's job.

    `address`: "HOST:PORT" of a running Ray; "local" starts one here; empty takes $RAY_ADDRESS or the Ray that
    `ray start` began on this machine, and starts a local one where there is neither. A connection that this
    process has already is reused. Raises UserError when nothing answers at `address`.
    """
    ray = _ray()
    if ray.is_initialized():
        return False
    given = address or os.environ.get("RAY_ADDRESS", "")
    if given not in ("", "local", "auto"):
        _must_answer(given)
    for left in reversed(range(START_TRIES)):
        try:
            # Without an address Ray itself looks for the one that `ray start` noted, and starts one where there is none.
            ray.init(address=address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            break
        except Exception as error:  # a bare Exception: its node took more than half a minute to start, as on a busy machine
            if left and type(error) is Exception:
                ray.shutdown()
                continue
            raise UserError(
                f"generation.ray_address {given!r}: no Ray to work with ({_first_line(error)}); start one with "
                "`ray start --head` and give its HOST:PORT, or use ray_address=local"
            ) from error
    return True


def _must_answer(address: str) -> None:
    """Refuse an address that nobody listens at; Ray itself would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host or "/" in host:
        raise UserError(f"generation.ray_address {address!r}: no HOST:PORT; give what `ray start --head` printed")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"generation.ray_address {address!r}: nothing answers there ({_first_line(error)}); "
            "start a Ray with `ray start --head`, or leave the address empty"
        ) from None


def _first_line(error: BaseException) -> str:
    return next((s.strip() for s in str(error).splitlines() if s.strip()), type(error).__name__)[:200]


@dataclass(frozen=True)
class WorkerSpec:
    """What an actor opens: the arguments of `engines.open_engine`, and the digests that its weights must have."""

    options: EngineOptions
    model: str
    adapter: Path | None
    weights: tuple[str, ...]
    environment: dict[str, str]
    opener: Callable[..., Engine]


def weights_of(model: str, adapter: Path | None) -> tuple[str, ...]:
    """Digests of base and adapter as they lie on this machine."""
    return tuple(loading.weights_id(w) for w in (loading.resolve(model), adapter) if w is not None)


class _Worker:
    """The actor: one engine, one chunk at a time. `__init__` does nothing, so that a start that fails is an
    error with its own message and not a dead actor."""

    def start(self, spec: WorkerSpec) -> tuple[str, int]:
        """Open the engine; (host, process id) of this worker."""
        os.environ.update(spec.environment)
        if "OMP_NUM_THREADS" in spec.environment:
            import torch

            torch.set_num_threads(int(spec.environment["OMP_NUM_THREADS"]))  # torch is there already, and read the old value
        found = weights_of(spec.model, spec.adapter)
        if found != spec.weights:
            raise UserError(
                f"worker on {socket.gethostname()}: weights {'+'.join(found)} of {spec.model!r}, the caller has "
                f"{'+'.join(spec.weights)}; give all machines the same folder or package"
            )
        self._engine = spec.opener(spec.options, spec.model, spec.adapter)
        return socket.gethostname(), os.getpid()

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        return list(self._engine.generate(requests, decoding))

    def close(self) -> None:
        self._engine.close()


class RayEngine(Engine):
    """`options.workers` engines `options.name` on the machines of a Ray, as one engine.

    Workers start with the first requests. One that dies (killed, out of memory, machine gone) is replaced
    up to `restarts` times a worker, and its chunk is done again; an exception of an engine ends the
    generation, because it would come again.

    Where the machines have GPUs a worker takes one; else a worker gets an equal share of the cores.
    `opener` opens the engine on a worker, by default as in one process.
    """

    def __init__(
        self,
        options: EngineOptions,
        model: str,
        adapter: Path | None = None,
        *,
        restarts: int = RESTARTS,
        opener: Callable[..., Engine] | None = None,
    ):
        if adapter is not None:
            loading.check_adapter(adapter, model)
        self.name = options.name  # who wrote a text, as in one process: artifacts do not depend on the executor
        self.workers, self.batch_size = options.workers, options.batch_size
        self.pids: dict[Any, tuple[str, int]] = {}
        self.running: dict[Any, tuple[Any, list[Request]]] = {}  # pending chunk -> (worker, chunk)
        self._actors: set[Any] = set()
        self._tokenizer: Any = None
        self._model = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
        folder = adapter.resolve() if adapter else None
        names = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM")
        self._restarts_left = restarts * options.workers
        self._ray = _ray()
        self._owned = connect(options.ray_address)
        try:
            share, threads = self._share()
        except UserError:
            self.close()
            raise
        self._actor = self._ray.remote(**share)(_Worker)
        self._spec = WorkerSpec(
            replace(options, workers=0),
            self._model,
            folder,
            weights_of(self._model, folder),
            {n: os.environ[n] for n in names if n in os.environ} | threads,
            opener or open_engine,
        )

    def _share(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Ray options and environment of one worker. Raises UserError when the machines cannot hold the workers."""
        nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        gpus, cores = (int(sum(n.get(r, 0) for n in nodes)) for r in ("GPU", "CPU"))
        if self.workers > (gpus or cores):
            have = f"{gpus} GPUs" if gpus else f"{cores} cores"
            raise UserError(
                f"generation.workers {self.workers}: Ray has {have} on {len(nodes)} machines; "
                f"lower it to {gpus or cores}, or add machines with `ray start --address`"
            )
        if gpus:
            return {"num_gpus": 1, "num_cpus": 0, "max_restarts": 0}, {}
        # The largest whole number of cores that every worker can have.
        share = next(c for c in range(cores, 0, -1) if sum(int(n.get("CPU", 0)) // c for n in nodes) >= self.workers)
        threads = {"OMP_NUM_THREADS": str(share)}
        if self.workers > len(nodes):
            threads["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every vLLM of a machine binds to the same cores
        return {"num_cpus": share, "max_restarts": 0}, threads

    def _chunks(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests in the order and size in which workers take them."""
        if self.name == EngineName.TRANSFORMERS:
            # The batches of TransformersEngine: the padding, and with it the texts, are those of one process.
            self._tokenizer = self._tokenizer or loading.load_tokenizer(self._model)
            requests = sorted(requests, key=lambda r: len(loading.encode_prompt(self._tokenizer, r.text)))
            size = self.batch_size
        else:
            fair = -(-len(requests) // (VLLM_CHUNKS * self.workers))
            size = max(self.batch_size, min(VLLM_CHUNK, fair))
        return [list(requests[i : i + size]) for i in range(0, len(requests), size)]

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        """One completion per request, a chunk at a time, in the order in which chunks finish.

        Raises UserError in one line when an engine fails or too many workers died.
        """
        ray = self._ray
        queue = deque(self._chunks(requests))
        idle: list[Any] = list(self.pids)
        starting: dict[Any, Any] = {}  # pending start -> actor
        running = self.running
        try:
            while queue or running:
                while queue and idle:
                    actor, chunk = idle.pop(), queue.popleft()
                    running[actor.generate.remote(chunk, decoding)] = actor, chunk
                up = len(running) + len(starting)
                for _ in range(min(len(queue) - len(starting), self.workers - up)):
                    actor = self._actor.remote()
                    self._actors.add(actor)
                    starting[actor.start.remote(self._spec)] = actor
                ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=WAIT_SECONDS)
                if not ready and not running:
                    print(f"generation.workers: waiting for {len(starting)}; free in Ray: {self._free()}", flush=True)
                for ref in ready:
                    actor, work = running.pop(ref) if ref in running else (starting.pop(ref), None)  # None: a start
                    try:
                        value = self._get(ref)
                    except UserError:
                        if work is None:
                            self._drop(actor)
                        raise
                    if value is None:  # the actor is dead
                        self._drop(actor)
                        if work:
                            queue.appendleft(work)
                        self._restarts_left -= 1
                        if self._restarts_left < 0:
                            raise UserError(f"generation over Ray: workers died too often, the last one {self._why}; {RUN_AGAIN}")
                        continue
                    idle.append(actor)
                    if work is None:
                        self.pids[actor] = value
                    else:
                        yield from value
        finally:
            # Only after an error, or when the caller stopped reading: nobody waits for these any more.
            for actor in [*starting.values(), *(a for a, _ in running.values())]:
                self._drop(actor)
            running.clear()

    def _get(self, ref: Any) -> Any:
        """The value of a finished call, None when its worker died. Raises UserError when the engine raised."""
        gone = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except gone.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            text = f"{type(cause).__name__}: {_first_line(cause)}"
            raise UserError(f"generation over Ray: the engine failed on a worker ({text}); {RUN_AGAIN}") from error
        except gone.ActorDiedError as error:
            self._why = f"({' '.join(line for line in str(error).splitlines() if line[:1] != chr(9))[:300]})"
            if error.actor_init_failed:  # its `__init__` does nothing: this package could not be imported there
                last = str(error).strip().splitlines()[-1].strip()
                raise UserError(
                    f"generation over Ray: a worker cannot start ({last}); run make setup on every machine"
                ) from error
            return None
        except (gone.RayActorError, gone.ObjectLostError, gone.OutOfMemoryError, gone.NodeDiedError) as error:
            self._why = f"({type(error).__name__}: {_first_line(error)})"
            return None

    def _drop(self, actor: Any) -> None:
        # Only once: after `close` a call of Ray would start a new one.
        if actor in self._actors:
            self._actors.remove(actor)
            self.pids.pop(actor, None)
            self._ray.kill(actor)

    def _free(self) -> str:
        left = self._ray.available_resources()
        return f"{left.get('CPU', 0):g} cores, {left.get('GPU', 0):g} GPUs"

    def close(self) -> None:
        """End the workers, and the Ray too when this engine started it."""
        busy = {actor for actor, _ in self.running.values()}
        asked = [a.close.remote() for a in self.pids if a not in busy]
        if asked:
            self._ray.wait(asked, num_returns=len(asked), timeout=30)
        for actor in list(self._actors):
            self._drop(actor)
        if self._owned:
            self._ray.shutdown()

"""The same generation stage on several processes or machines: Ray Data's `map_batches` over a pool of engines.

Each actor of the pool holds one engine; chunks of requests go to whichever actor is free, so a fast machine takes more.
Ray Data starts a fresh actor for one that dies and does its chunk again. The request log is written by the caller alone
(`generate.generate_all`), so ids, log and resume are those of one process. With Transformers the chunks are the very
batches of one process: where the machines compute alike, the texts are the same too.

What every machine needs: this package with the same lock (`make setup`), and the weights under the same
name, that is `package:NAME`, a hub id, or a folder that all machines share (base and adapter; a run's own
adapters lie under $SPEED_RUNS). A worker that would load other weights than the caller's is refused.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from speed_core.files import UserError
from speed_core.generation.engines import Completion, Decoding, Engine, EngineName, EngineOptions, Request, by_length, open_engine
from speed_core.models import loading

RESTARTS = 3  # fresh actors that each worker may cost
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
        import ray.data
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


def weights_of(model: str, adapter: Path | None) -> tuple[str, ...]:
    """Digests of base and adapter as they lie on this machine."""
    return tuple(loading.weights_id(w) for w in (loading.resolve(model), adapter) if w is not None)


def open_here(
    opener: Callable[..., Engine],
    options: EngineOptions,
    model: str,
    adapter: Path | None,
    weights: tuple[str, ...],
    environment: dict[str, str],
) -> Engine:
    """`opener(options, model, adapter)` on a worker. Raises UserError where the weights of the same name have other digests."""
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch is there already, and read the old value
    if (found := weights_of(model, adapter)) != weights:
        raise UserError(
            f"worker on {socket.gethostname()}: weights {'+'.join(found)} of {model!r}, the caller has "
            f"{'+'.join(weights)}; give all machines the same folder or package"
        )
    return opener(options, model, adapter)


class _Worker:
    """An actor of the pool: one engine, which its first chunk opens. What the engine raises is an answer, so that it ends the
    generation with its own message; only a worker that dies is replaced."""

    def __init__(self, opened: Callable[[], Engine], decoding: Decoding):
        self._opened, self._decoding = opened, decoding
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """{"chunk": [requests]} -> {"answer": [completions, or UserError]}, both packed."""
        try:
            self._engine = self._engine or self._opened()
            answer: Any = list(self._engine.generate(_unpack(batch["chunk"][0]), self._decoding))
        except UserError as error:
            answer = UserError(str(error))
        except Exception as error:
            text = f"{type(error).__name__}: {_first_line(error)}"
            answer = UserError(f"generation over Ray: the engine failed on a worker ({text}); {RUN_AGAIN}")
        return {"answer": [_pack(answer)]}

    def __del__(self) -> None:  # Ray Data lets go of it when the pool ends
        if self._engine:
            self._engine.close()


def _pack(value: Any) -> bytes:
    return zlib.compress(pickle.dumps(value), 1)  # prompts of one template: a tenth of the size


def _unpack(data: bytes) -> Any:
    return pickle.loads(zlib.decompress(data))


class RayEngine(Engine):
    """`options.workers` engines `options.name` on the machines of a Ray, as one engine.

    Workers start with the requests and end with them. One that dies (killed, out of memory, machine gone) is
    replaced up to `restarts` times, and its chunk is done again; an exception of an engine ends the generation,
    because it would come again.

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
        self._model = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
        folder = adapter.resolve() if adapter else None
        names = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM")
        self._restarts = restarts
        self._ray = _ray()
        self._owned = connect(options.ray_address)
        try:
            self._resources, threads = self._share()
        except UserError:
            self.close()
            raise
        environment = {n: os.environ[n] for n in names if n in os.environ} | threads
        weights, options = weights_of(self._model, folder), replace(options, workers=0)
        self._opened = partial(open_here, opener or open_engine, options, self._model, folder, weights, environment)

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
            return {"num_gpus": 1, "num_cpus": 0}, {}
        # The largest whole number of cores that every worker can have.
        share = next(c for c in range(cores, 0, -1) if sum(int(n.get("CPU", 0)) // c for n in nodes) >= self.workers)
        threads = {"OMP_NUM_THREADS": str(share)}
        if self.workers > len(nodes):
            threads["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every vLLM of a machine binds to the same cores
        return {"num_cpus": share}, threads

    def _chunks(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """Requests in the order and size in which workers take them."""
        if self.name == EngineName.TRANSFORMERS:
            # The batches of TransformersEngine: the padding, and with it the texts, are those of one process.
            requests, size = by_length(requests, loading.load_tokenizer(self._model)), self.batch_size
        else:
            fair = -(-len(requests) // (VLLM_CHUNKS * self.workers))
            size = max(self.batch_size, min(VLLM_CHUNK, fair))
        return [requests[i : i + size] for i in range(0, len(requests), size)]

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        """One completion per request, a chunk at a time, in the order in which chunks finish.

        Raises UserError in one line when an engine fails or a worker died too often.
        """
        data, chunks = self._ray.data, self._chunks(requests)
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is said here, in one line
        # One chunk a block: what Ray Data hands out, retries and gives back.
        asked = data.from_items([{"chunk": _pack(list(c))} for c in chunks], override_num_blocks=len(chunks))
        pool = asked.map_batches(
            _Worker,
            fn_constructor_args=(self._opened, decoding),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(self.workers, len(chunks)), max_tasks_in_flight_per_actor=2),
            max_restarts=self._restarts,
            **self._resources,
        )
        answers = iter(pool.iter_batches(batch_size=None, prefetch_batches=0))
        late = threading.Timer(WAIT_SECONDS, self._say_late)
        late.start()
        try:
            for batch in answers:
                late.cancel()
                for answer in map(_unpack, batch["answer"]):
                    if isinstance(answer, UserError):
                        raise answer
                    yield from answer
        except self._ray.exceptions.RayError as error:
            raise UserError(_why(error)) from error
        finally:
            late.cancel()
            answers.close()  # ends the pool, also when the caller stopped reading

    def _say_late(self) -> None:
        left = self._ray.available_resources()
        free = f"{left.get('CPU', 0):g} cores, {left.get('GPU', 0):g} GPUs"
        print(f"generation.workers: no answer yet after {WAIT_SECONDS:.0f} s; free in Ray: {free}", flush=True)

    def close(self) -> None:
        """End the Ray when this engine started it."""
        if self._owned:
            self._ray.shutdown()


def _why(error: Exception) -> str:
    """One line for an error of Ray: a worker that cannot start, or one that died too often."""
    if getattr(error, "actor_init_failed", False):  # its `__init__` does nothing: this package could not be imported there
        last = str(error).strip().splitlines()[-1].strip()
        return f"generation over Ray: a worker cannot start ({last}); run make setup on every machine"
    why = " ".join(line for line in str(error).splitlines() if line[:1] != "\t")[:300]
    return f"generation over Ray: workers died too often, the last one ({why}); {RUN_AGAIN}"

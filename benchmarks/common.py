"""What every benchmark shares: machine, versions, timing, peak memory of a call, the result file."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing as mp
import os
import platform
import queue
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS, CLEAR = Path(__file__).parent / "results", Path("/proc/self/clear_refs")
sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a clone, nothing installed

import speed_core.machine  # noqa: E402
import speed_core.models.compute_type  # noqa: E402


def arguments(description: str, options: dict[str, str] | None = None, **switches: str) -> argparse.Namespace:
    """`--device cpu|cuda` and `--quick` (ends within five minutes on 2 cores, writes no file); more switches by name.

    `options` take a value: name to help text.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, no result file")
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, text in (options or {}).items():
        parser.add_argument(f"--{name}", default="", help=text)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    return args


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory, and the GPU where one is used."""
    out: dict[str, Any] = {"cpu": speed_core.machine.cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    out["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    out["compute_type"] = speed_core.models.compute_type.choose().name
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 2**30)}
    return out


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; a package that is missing says so."""
    out = {"python": platform.python_version()}
    for name in ("torch", *packages):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str, least: float = 0.3, most: int = 20) -> float:
    """Median of repeated calls after one warm-up: at least 3 calls, until `least` seconds or `most` calls."""
    call()
    synchronize(device)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < most):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved(calls: dict[str, Callable[[], Any]], device: str, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round, so that a slow minute hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds + 1):  # the first round warms up
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if r:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def step_clock(device: str) -> tuple[Any, list[float]]:
    """A Trainer callback and its list: when the first step began, then when each step ended."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    return Clock(), ends


def _child(out: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        out.put(("ok", function(*arguments)))
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
        out.put(("error", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))


def in_process(function: Callable[..., Any], *arguments: Any, limit_s: float = 300) -> dict[str, Any]:
    """Run in a fresh process, which has its own peak of memory. {"status": ok|error|timeout|killed, ...}."""
    context = mp.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_child, args=(out, function, arguments))
    child.start()
    deadline, answer = time.monotonic() + limit_s, None
    while answer is None:
        try:
            answer = out.get(timeout=1)
        except queue.Empty:
            if not child.is_alive():
                return {"status": "killed", "why": f"exit code {child.exitcode}"}
            if time.monotonic() > deadline:
                child.kill()
                child.join()
                return {"status": "timeout", "why": f"not done in {limit_s:.0f} s"}
    child.join()
    return {"status": "ok", **answer[1]} if answer[0] == "ok" else {"status": "error", "why": answer[1]}


def reset_peak(device: str) -> float:
    """Forget earlier peaks (of loading a model, of making the data); returns the memory in use now, in MB, as `peak_mb` counts it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    if CLEAR.exists():
        CLEAR.write_text("5")  # the high-water mark falls to what is resident; on macOS it stays, and earlier peaks count
    return peak_mb(device)


def peak_mb(device: str) -> float:
    """Highest memory since the start or `reset_peak`: resident set of this process, or the allocator's on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if not CLEAR.exists():
        return speed_core.machine.peak_mb()
    lines = CLEAR.with_name("status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def finish(
    name: str, args: argparse.Namespace, rows: list[dict[str, Any]], ratios: dict[str, Any], packages: tuple[str, ...]
) -> None:
    """Print the result as one JSON object, the last line; write it unless `--quick`."""
    result = {"benchmark": name, "device": args.device, "written": time.strftime("%Y-%m-%d"), "machine": machine(args.device)}
    result |= {"versions": versions(*packages), "rows": rows, "ratios": ratios}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.{args.device}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))

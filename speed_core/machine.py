"""What this machine is: processor, memory, GPU and driver, and how fast it computes."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import psutil

if TYPE_CHECKING:
    import torch

TRAINING_GB = 9  # of free memory that training a generator may need; an engine that is kept warm ends where less is free
IDLE: list[Callable[[], None]] = []  # each ends an engine that is kept warm to save its next start
CGROUP, CPUINFO = Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")


def cpu() -> str:
    """Name of the processor, else its architecture."""
    found = re.search(r"^model name\s*: *(.*)", _cpuinfo(), re.MULTILINE)
    name = found[1] if found else "" if _cpuinfo() else _first_line("sysctl", "-n", "machdep.cpu.brand_string")
    return name.strip() or platform.machine()


def _cpuinfo() -> str:
    """What Linux tells about the processors; empty elsewhere."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware, as far as Linux tells."""
    return bool(re.search(r"^flags\s*:.* amx_bf16\b", _cpuinfo(), re.MULTILINE))


def instructions() -> str:
    """The instructions that products use here: a GPU's architecture, or "AVX512", "AVX2", ... as torch has chosen them."""
    import torch

    if torch.cuda.is_available():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return torch.backends.cpu.get_cpu_capability()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float:
    """Physical memory that is available now, in GB: the machine's, or what a container's limit leaves of it."""
    free = psutil.virtual_memory().available / 2**30
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no Linux, no container, or one without a limit ("max")
        return free
    return min(free, (most - used + int(kept.get("inactive_file", 0))) / 2**30)


def peak_mb() -> float:
    """The most memory that this process ever had resident, in MB. The system counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@lru_cache(maxsize=4)
def layer_seconds(kind: str) -> float:
    """Seconds that this machine takes for a decoder layer of gemma-3-270m's sizes, forward and backward over 512 tokens.

    `kind` names the type that is computed in. The best of a second's tries counts. A matrix product alone would make a processor
    look too fast: norms, activations and attention wait for memory, and are half of a run.
    """
    import torch
    from torch.nn import functional

    dtype, tokens, width, inner = getattr(torch, kind), 512, 640, 2048
    shapes = ((1024, width), (512, width), (width, 1024), (inner, width), (inner, width), (width, inner))
    weights = [torch.ones(shape, dtype=dtype) / 1000 for shape in shapes]

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, kv, out, gate, up, down = weights
        h = functional.rms_norm(x, (width,))
        heads = (h @ q.T).view(1, tokens, 4, 256).transpose(1, 2)
        key, value = ((h @ kv.T).view(1, tokens, 2, 256)[:, :, k : k + 1].transpose(1, 2).expand(heads.shape) for k in (0, 1))
        mixed = functional.scaled_dot_product_attention(heads, key, value, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(1, tokens, 1024) @ out.T
        h = functional.rms_norm(x, (width,))
        return x + (functional.gelu(h @ gate.T, approximate="tanh") * (h @ up.T)) @ down.T

    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1:
        started = time.perf_counter()
        layer(torch.ones(1, tokens, width, dtype=dtype, requires_grad=True)).sum().backward()
        best = min(best, time.perf_counter() - started)
    return best


def device() -> torch.device:
    """cuda when there is one, else cpu."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu() -> tuple[str, str]:
    """(name, memory and driver of the GPU, or what stands in its place; a remedy when a GPU is there but PyTorch cannot use it)."""
    import torch

    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        return f"{p.name} x{torch.cuda.device_count()}, {p.total_memory / 2**30:.0f} GB, driver {driver or 'unknown'}", ""
    if not driver:
        return "none (CPU)", ""
    if torch.version.cuda is None:
        return f"driver {driver}, but this PyTorch is a CPU build", "export SPEED_LOCK=cuda and run `make setup`"
    cuda = f"CUDA {torch.version.cuda}"
    return f"driver {driver}, but {cuda} cannot use it", f"install an NVIDIA driver for {cuda}"


def _first_line(*command: str) -> str:
    """The first line that a command prints, empty where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Does anything accept a connection at this address? Sends nothing."""
    parts = urlparse(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False


def end_idle() -> None:
    """End the engines that are kept warm: something else is about to need their memory."""
    for end in IDLE:
        end()


def make_room() -> None:
    """`end_idle` before a generator is trained, unless there is memory for both. A start of vLLM takes half a minute."""
    if device().type != "cpu" or memory_gb() < TRAINING_GB:
        end_idle()

"""The floating-point type of a model's products: chosen for the machine, or as the profile says.

`auto` takes the type that is fast on this machine. A processor computes in float32, because most multiply bfloat16 in
a plain loop; one with AMX takes bfloat16 where a product shows it at least twice as fast. A GPU computes in bfloat16 where
its hardware has that type. An older one generates in float16, and trains float32 weights under float16 autocast.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from speed_core import machine
from speed_core.files import UserError, cache_dir, file_lock, write_json

TYPES = ("auto", "float32", "bfloat16", "float16")
FASTER = 2.0  # bfloat16 has to be this many times as fast as float32 on a processor
OVERFLOWING = ("gemma2", "gemma3", "gemma3_text", "glm4")  # vLLM 0.32.0 refuses float16 for these
# What these say decides which kernels multiply, so a measurement holds only as long as they stay.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


@dataclass(frozen=True)
class ComputeType:
    """`name` is torch's name of the type of the products, `weights` that of the weights in memory, `why` a phrase."""

    name: str
    weights: str
    why: str


def choose(asked: str = "auto", *, training: bool = False, folder: str = "") -> ComputeType:
    """The type to compute in when a profile asks for `asked` (one of `TYPES`); `folder` (or hub id) of the model, where it is known.

    Raises UserError for an unknown type, and for one that this machine cannot use.
    """
    if asked not in TYPES:
        raise UserError(f"dtype {asked!r}: unknown; use one of {', '.join(TYPES)}")
    cuda = machine.device().type == "cuda"
    gpu, native = _gpu() if cuda else ("", False)
    if asked == "bfloat16" and cuda and not native:
        raise UserError(f"dtype 'bfloat16': {gpu} does not compute in it; use float16, float32 or auto")
    if asked == "float16" and training and not cuda:
        raise UserError("dtype 'float16': training in it needs an NVIDIA GPU; use float32, bfloat16 or auto")
    if asked != "auto":
        name, why = asked, "as the profile says"
    elif cuda:
        name, why = ("bfloat16", "this GPU computes in it") if native else ("float16", "this GPU has no bfloat16")
        if name == "float16" and folder and (kind := _model_type(folder)) in OVERFLOWING:
            name, why = "float32", f"this GPU has no bfloat16, and {kind} overflows in float16"
    else:
        name, why = _for_processor()
    # Small updates of float16 weights would be rounded away.
    return ComputeType(name, "float32" if training and name == "float16" else name, why)


def _model_type(folder: str) -> str:
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(folder).model_type)


def torch_type(name: str) -> Any:
    """torch's type of that name."""
    import torch

    return getattr(torch, name)


def facts(name: str) -> dict[str, str]:
    """What the manifest of an artifact says of how it was computed; `name` of the type that was used."""
    amx = name == "bfloat16" and machine.device().type == "cpu" and machine.has_amx()
    return {"compute_type": name, "instructions": "AMX" if amx else machine.instructions()}


def _gpu() -> tuple[str, bool]:
    """(name of the GPU, whether it computes in bfloat16)."""
    import torch

    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0] >= 8


def _for_processor() -> tuple[str, str]:
    """(type, why) for this processor."""
    if not machine.has_amx():
        return "float32", "this processor has no AMX"
    ratio = remembered_speedup()
    said = f"with AMX bfloat16 products are {ratio:.1f} times as fast as float32 here"
    return ("bfloat16", said) if ratio >= FASTER else ("float32", f"{said}, less than {FASTER:g}")


@lru_cache(maxsize=1)
def remembered_speedup() -> float:
    """`speedup`, measured once a machine and kept in the cache, so that every process of every run decides the same."""
    import torch

    key = " | ".join([machine.cpu(), torch.__version__, *(f"{n}={os.environ.get(n, '')}" for n in LIMITS)])
    path = cache_dir() / "compute_type.json"
    with file_lock(path.with_suffix(".lock")):  # processes that start together decide alike
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged
            known = {}
        if key not in known:
            known[key] = round(speedup(), 2)
            write_json(path, known)
    return float(known[key])


def speedup() -> float:
    """How many times as fast as float32 a bfloat16 product is, at a size of this package's models."""
    import torch

    best: dict[Any, float] = {}
    pairs = {t: (torch.ones(1024, 640, dtype=t), torch.ones(640, 2048, dtype=t)) for t in (torch.float32, torch.bfloat16)}
    began = time.perf_counter()
    while time.perf_counter() - began < 0.5:  # in turns, so that another process slows both
        for t, (a, b) in pairs.items():
            started = time.perf_counter()
            a @ b
            best[t] = min(best.get(t, float("inf")), time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]

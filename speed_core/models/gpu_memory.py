"""Memory of a training step by formula, from a model's configuration alone.

Bytes that a layer keeps of each token for the backward pass, with frozen weights and LoRA; e bytes a value, 2 in bfloat16:

    4 h a norm        RMSNorm's input in float32 (LayerNorm: e h), h the hidden size
    e (2 q + 2 k)     attention's queries, keys, values and output; where texts are padded, keys and values are repeated for every
                      query head, and e T more for a row of the mask, T the length
    3 e i             gate, activation and up projection (e i without a gate), i the intermediate size
    (e + 1) w         input of each adapted layer, w wide, behind its dropout, and the dropout's mask; without dropout e w

With gradient checkpointing each layer keeps e h, and one at a time all of that. On its way back a layer needs 8 i for the gradients of
its MLP. The head takes (8 + e) h, and the logits of 128 tokens (`token_logprobs`). tests/models/test_gpu_memory.py measures
whole steps of small models against this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from speed_core.files import UserError
from speed_core.models import loading
from speed_core.profile import Lora

# The models of profile paper. Their shapes were written from memory, and a test holds them to the published numbers of parameters only;
# a configuration in the hub's cache goes before these.
_LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Meta-Llama-3-8B": ("llama", _LARGE | {"num_key_value_heads": 8, "vocab_size": 128256}),
    "mistralai/Mistral-7B-v0.1": ("mistral", _LARGE | {"num_key_value_heads": 8, "vocab_size": 32000}),
    "WhereIsAI/UAE-Large-V1": ("bert", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model's shape. `multiplied`: parameters that each token is multiplied with. `query` and `key`: width of all heads. `linear`:
    (name, inputs, outputs) of each linear layer of one block."""

    config: Any
    query: int
    key: int
    parameters: int
    multiplied: int
    linear: tuple[tuple[str, int, int], ...]
    norms: int
    rms: bool

    def adapted(self, lora: Lora) -> list[tuple[str, int, int]]:
        return [one for one in self.linear if one[0] in lora.targets] or list(self.linear)

    def trained(self, lora: Lora | None) -> int:
        """How many parameters are trained."""
        wide = sum(a + b for _, a, b in self.adapted(lora)) if lora else 0
        return int(self.config.num_hidden_layers * lora.rank * wide) if lora else self.parameters

    def kept(self, length: int, lora: Lora | None, e: int, padded: bool, noise: int) -> float:
        """Bytes that one layer keeps of each token (see above); `noise`: bytes of a value of the dropout's mask."""
        h, i, key = self.config.hidden_size, self.config.intermediate_size, self.query if padded else self.key
        gated = any("gate" in name for name, _, _ in self.linear)
        norms, mlp = self.norms * h * (4 if self.rms else e), e * i * (3 if gated else 1)
        out = norms + e * (2 * self.query + 2 * key + padded * length) + mlp
        # Layers with one input keep it once; attention's output is kept already.
        if lora is None or (e == 4 and not lora.dropout):
            return out + e * (h * (1 + gated) + i)
        return out + sum(w * (e + noise * (lora.dropout > 0)) + e * lora.rank for _, w, _ in self.adapted(lora))


@lru_cache(maxsize=16)
def architecture(name: str, head: bool = False, layers: int = 0) -> Architecture:
    """The shape of a model by its name in a profile, with or without its language-model head, cut to `layers`. Raises UserError where
    it is not known."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    where = loading.resolve(name)
    try:
        c: Any = AutoConfig.from_pretrained(where).get_text_config()
    except (OSError, ValueError):
        if where not in KNOWN:
            raise UserError(f"model {name}: its size is not known here; set SPEED_ONLINE=1, or name a folder") from None
        c = AutoConfig.for_model(KNOWN[where][0], **KNOWN[where][1])
    c.num_hidden_layers = layers or c.num_hidden_layers
    c.intermediate_size = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    with torch.device("meta"):
        model: Any = (AutoModelForCausalLM if head else AutoModel).from_config(c)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == c.num_hidden_layers]
    norms = [m for m in stacks[0][0].modules() if "Norm" in type(m).__name__ and m.weight.shape == (c.hidden_size,)]
    linear = [(n.rpartition(".")[2], m) for n, m in stacks[0][0].named_modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    words = 0 if head and c.tie_word_embeddings else c.vocab_size * c.hidden_size
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    key = size * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    return Architecture(
        c, size * c.num_attention_heads, key, parameters, parameters - words,
        tuple((n, m.in_features, m.out_features) for n, m in linear), len(norms), "RMS" in str(norms),
    )  # fmt: skip


def step_bytes(
    a: Architecture, rows: int, length: int, lora: Lora | None, e: int, *,
    checkpointing: bool = False, padded: bool = True, head: bool = True, noise: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Bytes of a training step of `rows` x `length` tokens at its peak, beside weights, their gradients and the optimizer."""
    tokens, layers, h = rows * length, a.config.num_hidden_layers, a.config.hidden_size
    block = a.kept(length, lora, e, padded, noise)
    kept = layers * e * h + block if checkpointing else layers * block
    logits = 128 * a.config.vocab_size * (4 + e % 4) if head else 0  # in float32, and in the head's own type
    return {"activations": tokens * (kept + 8 * a.config.intermediate_size), "head": tokens * h * (8 + e * head) + logits}

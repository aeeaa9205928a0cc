"""The memory of a training step by formula, against all that small real models allocate in one."""

import contextlib
import weakref

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from speed_core.files import UserError
from speed_core.models import gpu_memory, token_logprobs, training
from speed_core.profile import Lora

ROWS, LENGTH = 4, 128


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made inside, those of `given` left out; `peak`: the most that there were at a time."""

    def __init__(self, given):
        super().__init__()
        self.known, self.now, self.peak = weakref.WeakSet(t.untyped_storage() for t in given), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size):
        self.now -= size


def peak(model, loss_of, dtype=torch.float32):
    """Bytes of a step, forward and backward, and of the gradients that it leaves."""
    ids = torch.randint(3, 1000, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    cast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with Allocated([*model.parameters(), *model.buffers(), ids, mask]) as allocated:
        with cast:
            loss = loss_of(ids, mask)
        loss.backward()
    return allocated.peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "dropout", "checkpointing"),
    [(torch.float32, 0.0, False), (torch.float32, 0.1, True), (torch.bfloat16, 0.1, False), (torch.bfloat16, 0.0, True)],
)
def test_a_step_of_a_llama_with_lora_takes_what_the_formula_says_within_a_fifth(tmp_path, dtype, dropout, checkpointing):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=896, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
    )
    config.save_pretrained(tmp_path)
    lora = Lora(rank=8, alpha=16, dropout=dropout)
    model = LlamaForCausalLM(config).to(dtype)
    model = get_peft_model(model, training.lora_config(lora, model)).train()
    token_logprobs.hidden_states_only(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = gpu_memory.architecture(str(tmp_path), head=True)
    assert shape.parameters + shape.trained(lora) == sum(p.numel() for p in model.parameters())
    took, _ = peak(model, lambda ids, mask: -token_logprobs.token_log_probs(model, ids, mask, mask).sum(), dtype)
    # A processor keeps the dropout's mask as float32, a GPU as bytes.
    said = gpu_memory.step_bytes(shape, ROWS, LENGTH, lora, dtype.itemsize, checkpointing=checkpointing, noise=4)
    assert sum(said.values()) == pytest.approx(took, rel=0.2)


def test_a_step_of_an_encoder_of_which_all_is_trained_does_too(tmp_path):
    # Where attention drops weights, a processor keeps all of them; a GPU does not.
    config = BertConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = BertModel(config).train()
    took, _ = peak(model, lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].sum())
    said = gpu_memory.step_bytes(gpu_memory.architecture(str(tmp_path)), ROWS, LENGTH, None, 4, head=False)
    assert sum(said.values()) == pytest.approx(took, rel=0.2)


def test_the_papers_models_have_their_size_and_a_model_that_nobody_has_is_refused():
    sizes = {name: gpu_memory.architecture(name, head=kind != "bert").parameters for name, (kind, _) in gpu_memory.KNOWN.items()}
    assert [round(n / 1e9, 2) for n in sizes.values()] == [8.03, 7.24, 0.34]
    with pytest.raises(UserError, match="nobody/nothing: its size is not known here; set SPEED_ONLINE=1"):
        gpu_memory.architecture("nobody/nothing")

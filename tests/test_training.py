"""SFT and embedding training on small random models of the families that the large profiles use."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from speed_core import embed, lm_head, models, profile, sft
from speed_core.artifacts import UserError
from speed_core.profile import Lora

FAMILIES = ("gemma3", "llama", "mistral", "qwen2")
PAIRS = [("Write one.", '{"S1":"a b c","S2":"d e"}'), ("Write another one.", '{"S1":"f g","S2":"h i j k"}')] * 2


def settings(kind, **more):
    base = getattr(profile.load("smoke"), kind)
    values = {"batch": 2, "micro_batch": 2, "epochs": 1, "dtype": "float32", "lora": Lora(rank=2, alpha=4)} | more
    return base.model_copy(update=values)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_the_plain_softmax_in_value_and_gradient(family, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    ids = torch.randint(5, 1000, (2, 9))
    scored = torch.zeros_like(ids).bool()
    scored[0, 4:], scored[1, 6:] = True, True
    mask = torch.ones_like(ids)
    ours = lm_head.token_log_probs(model, ids, mask, scored)
    ours.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    logits = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
    plain = torch.zeros_like(ours)
    plain[:, 1:] = logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]
    assert torch.allclose(ours, plain, atol=1e-4)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_the_gradient_through_the_head_equals_autograds():
    torch.manual_seed(0)
    h = torch.randn(5, 4, requires_grad=True)
    w, t, up = torch.randn(11, 4), torch.tensor([0, 3, 10, 2, 2]), torch.randn(5)
    for cap in (None, 2.0):
        (lm_head._TokenLogProbs.apply(h, w, t, cap) * up).sum().backward()
        ours, h.grad = h.grad.clone(), None
        z = h @ w.T
        z = cap * torch.tanh(z / cap) if cap else z
        (z.log_softmax(1)[torch.arange(5), t] * up).sum().backward()
        assert torch.allclose(ours, h.grad, atol=1e-5)
        h.grad = None


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trains_and_its_adapter_belongs_to_its_base(family, tiny_model, tmp_path):
    base = tiny_model(family)
    facts = sft.train(base, PAIRS, settings("junior", lr=1e-2, epochs=4), seed=0, output=tmp_path / "a")
    assert facts["history"][-1]["loss"] < facts["history"][0]["loss"]
    models.check_adapter(tmp_path / "a", base)
    other = tiny_model("gemma3" if family != "gemma3" else "llama")
    with pytest.raises(UserError, match="trained on weights"):
        models.check_adapter(tmp_path / "a", other)


def test_too_long_examples_are_counted_and_none_left_is_an_error(tiny_model, tmp_path):
    with pytest.raises(UserError, match="max_length"):
        sft.train(tiny_model("llama"), [("x " * 100, "y")], settings("junior", max_length=32), seed=0, output=tmp_path)


def records(n):
    return [
        {
            "id": str(i),
            "kind": "sts",
            "instruction": "Find it",
            "query": f"q {i}",
            "positive": f"p {i}",
            "negative": f"n {i}" if i % 4 else None,
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("family", ("mistral", "gemma3", "bert"))
@pytest.mark.parametrize("guided", (True, False))
def test_an_embedder_trains_saves_and_loads_alone(family, guided, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    base = "package:all-MiniLM-L6-v2" if family == "bert" else tiny_model(family)
    targets = ("query", "value") if family == "bert" else ("q_proj", "v_proj")
    s = settings("embedding", batch=4, micro_batch=4, examples=8, guided=guided, lora=Lora(rank=2, alpha=4, targets=targets))
    facts = embed.train(
        base, records(8), s, guide="package:all-MiniLM-L6-v2", guide_cache=tmp_path / "g", seed=0, output=tmp_path / "m"
    )
    assert facts["rows"] == 8 and len(facts["history"]) == 2
    model = SentenceTransformer(str(tmp_path / "m"), device="cpu")
    short, long = model.encode(["a b"]), model.encode(["a b", "a much longer text that forces padding on the first"])[:1]
    assert abs(short - long).max() < 1e-2, "padding changes the vector"
    if family != "bert":
        ids = model.tokenizer("a b")["input_ids"]
        assert ids[0] == model.tokenizer.bos_token_id and ids[-1] == model.tokenizer.eos_token_id


def test_the_guide_reads_the_bare_text():
    assert embed.bare(embed.instruct("Find it", "what\nis this")) == "what\nis this"
    assert embed.bare("plain") == "plain"

"""SFT, DPO and embedding training on small random models of the families that the large profiles use."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from speed_core import dpo, embed, lm_head, models, profile, sft
from speed_core.artifacts import UserError
from speed_core.profile import Lora

FAMILIES = ("gemma3", "llama", "mistral", "qwen2")
PAIRS = [("Write one.", '{"S1":"a b c","S2":"d e"}'), ("Write another one.", '{"S1":"f g","S2":"h i j k"}')] * 2
PREFERENCES = [{"prompt": p, "chosen": c, "rejected": c[: len(c) // 2] + " no no"} for p, c in PAIRS]


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


def test_the_dpo_step_equals_trls_in_loss_and_gradient(tiny_model, tmp_path):
    from datasets import Dataset
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer

    base = tiny_model("llama")
    tokenizer = models.load_tokenizer(base)

    def fresh():
        torch.manual_seed(0)
        return get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft.lora_config(Lora(rank=2, alpha=4))
        )

    def shake(model):  # an adapter starts as the identity: move it, so that policy and reference differ
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name and ".ref." not in name:  # TRL keeps the reference as a second adapter
                p.data.normal_(0, 0.1)

    ours = fresh()
    rows, aside = dpo.check_pairs(tokenizer, PREFERENCES, 256)
    assert len(rows) == 4 and set(aside.values()) == {0}
    dpo.reference_log_probs(ours, rows, tokenizer.pad_token_id, 4, "reference")
    shake(ours)
    batch = dpo.collate(rows, tokenizer.pad_token_id)
    loss, _ = dpo.dpo_loss(dpo.sequence_log_probs(ours, batch), batch["reference"].T, 0.1)
    loss.backward()

    text = [
        {"prompt": "<bos>" + sft.prompt_text(r["prompt"]), "chosen": r["chosen"], "rejected": r["rejected"]} for r in PREFERENCES
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, beta=0.1, report_to=[], use_cpu=True, bf16=False
    )
    theirs = DPOTrainer(model=fresh(), args=arguments, train_dataset=Dataset.from_list(text), processing_class=tokenizer)
    shake(theirs.model)
    wanted = theirs.compute_loss(theirs.model, theirs.data_collator(list(theirs.train_dataset)))
    wanted.backward()
    assert torch.allclose(loss, wanted, atol=1e-5)
    theirs_grads = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, theirs_grads[name], atol=1e-5), name


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_dpo_widens_the_margin_from_the_junior_as_reference(family, tiny_model, tmp_path):
    base = tiny_model(family)
    sft.train(base, PAIRS, settings("junior", lr=1e-2), seed=0, output=tmp_path / "junior")
    facts = dpo.train(
        base, tmp_path / "junior", PREFERENCES, settings("senior", lr=1e-2, epochs=4), seed=0, output=tmp_path / "senior"
    )
    assert abs(facts["history"][0]["loss"] - 0.6931) < 1e-3, "the policy does not start at the reference"
    assert facts["history"][-1]["margin"] > facts["history"][0]["margin"]
    noted = json.loads((tmp_path / "senior" / "base.json").read_text())
    assert noted["weights"] == models.weights_id(dpo.starting_point(base, tmp_path / "junior"))


def test_unusable_pairs_are_set_aside_by_name(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model("llama"))
    bad = [("a", "x", "x"), ("a", "", "x"), ("a", "x " * 300, "y")]
    rows, aside = dpo.check_pairs(tokenizer, [dict(zip(("prompt", "chosen", "rejected"), b, strict=True)) for b in bad], 64)
    assert rows == [] and aside == {"same": 1, "empty": 1, "too_long": 1}


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

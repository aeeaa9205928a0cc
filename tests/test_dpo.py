"""DPO in shared, packed rows: equal to TRL, to plain rows, to itself over any split of the batch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TrainingArguments

from speed_core import dpo, lm_head, models, packing, profile, sft
from speed_core.artifacts import UserError
from speed_core.packing import Group
from speed_core.profile import Lora

FAMILIES = ("gemma3", "llama", "qwen2", "mistral")
PAIRS = [
    {"prompt": f"Write a {a} record about {b}.", "chosen": f'{{"q": "{a} {b * n}"}}', "rejected": '{"q": "%s"}' % (b * m)}
    for (a, b, n, m) in [("short", "bees", 1, 3), ("long", "the red sea", 2, 1), ("plain", "iron", 4, 2), ("odd", "trains and tea", 1, 2)]
]  # fmt: skip


UNEVEN = (0.25, 1.0, 3.0, 0.5)  # equal weights would hide a mean of means


def policy(base, seed=0, window=None):
    """A fresh LoRA policy in float32 that returns hidden states."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if window:
        model.config.sliding_window = window
    return get_peft_model(model, sft.lora_config(Lora(rank=2, alpha=4)))


def shake(model):
    """An adapter starts as the identity: move it, so that policy and reference differ."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name and ".ref." not in name:  # TRL keeps the reference as a second adapter
            p.data.normal_(0, 0.1, generator=g)
    return model


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prepared(base, share=True, window=None):
    tokenizer = models.load_tokenizer(base)
    groups, aside = dpo.check_pairs(tokenizer, PAIRS, 256, share=share)
    assert len(groups) == len(PAIRS) and not any(aside.values())
    model = policy(base, window=window)
    lm_head.hidden_states_only(model)
    dpo.reference_log_probs(model, groups, 0, 4)
    return shake(model), groups


def loss_of(model, groups, capacity=None, share=True, **more):
    model.zero_grad()
    batch = packing.collate(groups, 0, capacity, share=share)
    policy_logp = packing.completion_log_probs(model, batch)
    each, rewards = dpo.pair_losses(policy_logp, batch["reference"], batch["pairs"], batch["lengths"], beta=0.1, **more)
    loss = (each * batch["weights"]).sum() / batch["weights"].sum()
    loss.backward()
    return loss.detach(), rewards, grads(model)


def trl_trainer(base, folder, **more):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = models.load_tokenizer(base)
    text = [{"prompt": "<bos>" + sft.prompt_text(r["prompt"]), "chosen": r["chosen"], "rejected": r["rejected"]} for r in PAIRS]
    given = {
        "per_device_train_batch_size": 4,
        "beta": 0.1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    } | more
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft.lora_config(Lora(rank=2, alpha=4))
    )
    arguments = DPOConfig(output_dir=str(folder), gradient_checkpointing=False, **given)
    return DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(text), processing_class=tokenizer)


@pytest.mark.parametrize(("family", "kind"), [*((f, "sigmoid") for f in FAMILIES), ("gemma3", "ipo")])
def test_loss_rewards_and_gradients_equal_trls(family, kind, tiny_model, tmp_path):
    base = tiny_model(family)
    ours = loss_of(*prepared(base), kind=kind)
    theirs = trl_trainer(base, tmp_path, loss_type=kind)
    shake(theirs.model)
    wanted = theirs.compute_loss(theirs.model, theirs.data_collator(list(theirs.train_dataset)))
    wanted.backward()
    assert torch.allclose(ours[0], wanted, atol=1e-5, rtol=1e-5)
    metrics = theirs._metrics["train"]
    for side, key in enumerate(("rewards/chosen", "rewards/rejected")):
        assert metrics[key][-1] == pytest.approx(float(ours[1][side].mean()), abs=1e-5)
    expected = grads(theirs.model)
    assert len(ours[2]) == len([n for n in expected if ".ref." not in n]) > 0
    for name, g in ours[2].items():
        assert torch.allclose(g, expected[name], atol=1e-5, rtol=1e-3), name


def ours_trainer(base, folder, batch=4, micro=4, steps=20, weights=None, **more):
    model, made = prepared(base)
    for g, w in zip(made, weights or (), strict=False):
        g.pairs = [(a, b, w) for a, b, _ in g.pairs]
    if weights:
        made[0].pairs.append((1, 0, 2.0))
    values = profile.load("smoke").senior.model_copy(update=dict(batch=batch, micro_batch=micro, lr=1e-3, dtype="float32"))
    arguments = sft.trainer_arguments(values, 0, folder, remove_unused_columns=False, max_steps=steps, **more)
    trainer = dpo._trainer_class()(
        model=model, args=TrainingArguments(**arguments), train_dataset=made, data_collator=lambda part: packing.collate(part, 0)
    )  # fmt: skip
    return trainer


def test_the_trajectory_over_20_steps_equals_trls(tiny_model, tmp_path):
    base = tiny_model("gemma3")
    ours = ours_trainer(base, tmp_path / "ours", batch=2, micro=2, save_strategy="no")
    ours.train()
    a = ours.args
    theirs = trl_trainer(
        base, tmp_path / "trl", per_device_train_batch_size=2, max_steps=20, learning_rate=1e-3, seed=0, data_seed=0, logging_steps=1,
        warmup_steps=a.warmup_steps, weight_decay=a.weight_decay, lr_scheduler_type=a.lr_scheduler_type, max_grad_norm=a.max_grad_norm,
        save_strategy="no",
    )  # fmt: skip
    shake(theirs.model)
    theirs.train()
    one, other = ([h["loss"] for h in t.state.log_history if "loss" in h] for t in (ours, theirs))
    assert len(one) == 20 and one == pytest.approx(other, abs=2e-3) and min(one) < one[0] - 0.03
    for (name, p), q in zip(ours.model.named_parameters(), dict(theirs.model.named_parameters()).items(), strict=False):
        if p.requires_grad:
            assert torch.allclose(p, dict(theirs.model.named_parameters())[name], atol=2e-4), (name, q[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", (None, 4))
def test_shared_packed_and_separate_rows_agree(family, window, tiny_model):
    model, groups = prepared(tiny_model(family), window=window)
    plain = loss_of(model, groups, share=False)
    for capacity in (None, 60, 1000):
        packed = loss_of(model, groups, capacity)
        assert torch.allclose(plain[0], packed[0], atol=1e-5)
        assert all(torch.allclose(g, packed[2][n], atol=1e-5, rtol=1e-3) for n, g in plain[2].items())


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_the_block_mask_equals_the_dense_one(family, tiny_model):
    model, groups = prepared(tiny_model(family))
    batch = packing.collate(groups, 0, 1000)
    with torch.no_grad():
        dense = packing.completion_log_probs(model, batch)
        model.get_base_model().set_attn_implementation("flex_attention")
        blocks = packing.completion_log_probs(model, batch)
    assert torch.allclose(dense, blocks, atol=1e-4)


def test_several_pairs_of_one_prompt_cost_one_pass_and_weigh_what_they_should(tiny_model):
    base = tiny_model("llama")
    tokenizer = models.load_tokenizer(base)
    texts = ["a b c", "d e", "f g h i"]
    rows = [
        {"prompt": "same", "chosen": texts[a], "rejected": texts[b], "weight": x}
        for a, b, x in ((0, 1, 1.0), (0, 2, 0.5), (2, 1, 2.0))
    ]
    together, _ = dpo.check_pairs(tokenizer, rows, 256)
    apart, _ = dpo.check_pairs(tokenizer, rows, 256, share=False)
    assert len(together) == 1 and len(together[0].completions) == 3 and len(apart) == 3
    assert len(together[0]) < sum(map(len, apart)) / 2
    model = policy(base)
    lm_head.hidden_states_only(model)
    for groups in (together, apart):
        dpo.reference_log_probs(model, groups, 0, 4)
    shake(model)
    one, other = loss_of(model, together, smoothing=0.1), loss_of(model, apart, smoothing=0.1)
    assert torch.allclose(one[0], other[0], atol=1e-5)
    assert all(torch.allclose(g, other[2][n], atol=1e-5, rtol=1e-3) for n, g in one[2].items())


def test_smoothing_and_ipo_have_their_textbook_values():
    log_probs, pair, lengths = torch.tensor([3.0, 0.0]), torch.tensor([[0, 1]]), torch.tensor([2.0, 4.0])
    each, rewards = dpo.pair_losses(log_probs, torch.zeros(2), pair, lengths, beta=1.0, smoothing=0.1)
    assert float(each) == pytest.approx(0.9 * math.log1p(math.exp(-3)) + 0.1 * math.log1p(math.exp(3)))
    assert rewards.tolist() == [[3.0], [0.0]]
    each, _ = dpo.pair_losses(log_probs, torch.zeros(2), pair, lengths, beta=0.5, kind="ipo")
    assert float(each) == pytest.approx((3 / 2 - 1.0) ** 2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
@settings(deadline=None)
def test_packing_keeps_every_group_once_and_within_the_row(sizes, capacity):
    rows = packing.pack(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= capacity or len(row) == 1 for row in rows)


@pytest.mark.parametrize("micro", (1, 2))
def test_accumulation_does_not_change_the_training(micro, tiny_model, tmp_path):
    base = tiny_model("llama")
    whole, split = (ours_trainer(base, tmp_path / str(m), 4, m, 3, UNEVEN, save_strategy="no") for m in (4, micro))
    whole.train(), split.train()
    a, b = (dict(t.model.named_parameters()) for t in (whole, split))
    assert all(torch.allclose(p, b[n], atol=1e-5) for n, p in a.items())
    assert whole.state.log_history[0]["loss"] == pytest.approx(split.state.log_history[0]["loss"], abs=1e-5)


def test_resumed_from_a_checkpoint_equals_uninterrupted(tiny_model, tmp_path):
    base = tiny_model("llama")
    whole = ours_trainer(base, tmp_path / "a", 2, 2, 6, save_strategy="no")
    whole.train()
    first = ours_trainer(base, tmp_path / "b", 2, 2, 6, save_strategy="steps", save_steps=3)
    first.add_callback(stop_after(3))
    first.train()
    second = ours_trainer(base, tmp_path / "b", 2, 2, 6, save_strategy="steps", save_steps=3)
    assert (tmp_path / "b" / "checkpoint-3").is_dir()
    calls, real = [], second.compute_loss
    second.compute_loss = lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    second.train(resume_from_checkpoint=True)
    assert len(calls) == 3, "it began again instead of going on"
    a, b = (dict(t.model.named_parameters()) for t in (whole, second))
    assert all(torch.allclose(p, b[n], atol=1e-6) for n, p in a.items())


def stop_after(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_two_processes_equal_one_with_the_whole_batch(tiny_model, tmp_path):
    base = tiny_model("llama")
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "import torch, test_dpo\nfrom pathlib import Path\n"
        f"t = test_dpo.ours_trainer({base!r}, Path({str(tmp_path / 'o')!r}), 4, 2, 2, test_dpo.UNEVEN, save_strategy='no', ddp_backend='gloo')\n"
        "t.train()\n"
        f"if t.args.process_index == 0: torch.save(dict(t.model.named_parameters()), {str(tmp_path / 'p.pt')!r})\n"
        "torch.distributed.destroy_process_group()\n"  # left open, gloo's threads may outlive the interpreter and abort
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one = ours_trainer(base, tmp_path / "one", 4, 4, 2, UNEVEN, save_strategy="no")
    one.train()
    two = torch.load(tmp_path / "p.pt", weights_only=False)
    ours = dict(one.model.named_parameters())
    assert all(torch.allclose(ours[n], p, atol=1e-5) for n, p in two.items() if ours[n].requires_grad)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_model, tmp_path):
    base = tiny_model("gemma3")
    more = dict(save_strategy="no", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    plain, saving = (
        ours_trainer(base, tmp_path / "a", 4, 4, 2, save_strategy="no"),
        ours_trainer(base, tmp_path / "b", 4, 4, 2, **more),
    )
    plain.train(), saving.train()
    a, b = (dict(t.model.named_parameters()) for t in (plain, saving))
    assert saving.model.get_base_model().is_gradient_checkpointing
    assert all(torch.allclose(p, b[n], atol=1e-6) for n, p in a.items())


def test_an_impossible_split_says_the_arithmetic(tmp_path):
    values = profile.load("smoke").senior.model_copy(update=dict(batch=8, micro_batch=3))
    with pytest.raises(UserError, match="batch 8: not micro_batch 3 x 1 devices x a whole number"):
        sft.trainer_arguments(values, 0, tmp_path)


def test_the_reference_is_kept_by_digest_and_recomputed_for_other_data(tiny_model, tmp_path):
    model, groups = prepared(tiny_model("llama"))
    wanted = [g.reference for g in groups]
    first = dpo.cached_reference(model, groups, 0, 4, "w", tmp_path)
    for g in groups:
        g.reference = []
    assert dpo.cached_reference(None, groups, 0, 4, "w", tmp_path) == first  # read, not computed: there is no model
    assert all(g.reference == pytest.approx(w, abs=1e-5) for g, w in zip(groups, wanted, strict=True))
    assert dpo.cached_reference(model, groups, 0, 4, "other weights", tmp_path) != first
    groups[0].completions[0] = groups[0].completions[0] + [5]
    assert dpo.cached_reference(model, groups, 0, 4, "w", tmp_path) != first
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_a_loss_that_is_no_number_stops_and_names_step_and_pair(tiny_model, tmp_path):
    base = tiny_model("llama")
    trainer = ours_trainer(base, tmp_path, 2, 2, 4, save_strategy="steps", save_steps=1)
    trainer.train_dataset[2].reference[0] = float("nan")
    with pytest.raises(UserError, match=r"not a number at step \d.*pair 2.*checkpoint"):
        trainer.train()


def test_an_architecture_that_ignores_the_mask_is_refused(tiny_model, monkeypatch):
    model, groups = prepared(tiny_model("llama"))
    packing.verify(model, groups[0], 0)
    monkeypatch.setattr(packing, "attention_mask", lambda config, batch: (batch["group"] >= 0).long())
    with pytest.raises(UserError, match="ignores the mask or the positions"):
        packing.verify(model, groups[0], 0)


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_dpo_widens_the_margin_from_the_junior_as_reference(family, tiny_model, tmp_path):
    base = tiny_model(family)
    values = profile.load("smoke")
    junior = values.junior.model_copy(update=dict(lr=1e-2, dtype="float32", batch=2, micro_batch=2, lora=Lora(rank=2, alpha=4)))
    sft.train(base, [(r["prompt"], r["chosen"]) for r in PAIRS], junior, seed=0, output=tmp_path / "junior")
    changes = dict(lr=1e-2, epochs=4, dtype="float32", batch=2, micro_batch=2, lora=Lora(rank=2, alpha=4), max_length=256)
    senior = values.senior.model_copy(update=changes)
    facts = dpo.train(base, tmp_path / "junior", PAIRS, senior, seed=0, output=tmp_path / "senior", cache=tmp_path / "cache")
    assert abs(facts["history"][0]["loss"] - 0.6931) < 1e-3, "the policy does not start at the reference"
    assert facts["history"][-1]["margin"] > facts["history"][0]["margin"]
    noted = json.loads((tmp_path / "senior" / "base.json").read_text())
    assert noted["weights"] == models.weights_id(dpo.starting_point(base, tmp_path / "junior"))


def test_unusable_pairs_are_set_aside_by_rule_and_row(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model("llama"))
    bad = [("a", "x", "x"), ("a", "", "x"), ("a", "x " * 300, "y"), ("a", "x", "y")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), b, strict=True)) for b in bad]
    groups, aside = dpo.check_pairs(tokenizer, [*rows, rows[3] | {"truncated": True}], 64)
    assert len(groups) == 1 and aside == {"same": [0], "empty": [1], "truncated": [4], "too_long": [2], "joins": []}


def test_a_prompt_that_is_tokenised_differently_when_joined_is_set_aside(tiny_model, monkeypatch):
    tokenizer = models.load_tokenizer(tiny_model("llama"))
    monkeypatch.setattr(sft, "prompt_text", lambda text: text)  # without the line break the words run together
    pair = {"prompt": "the sun", "chosen": "flower grows", "rejected": "is hot"}
    groups, aside = dpo.check_pairs(tokenizer, [pair], 64)
    assert groups == [] and aside["joins"] == [0]


def test_groups_know_their_length():
    assert len(Group([1, 2], [[3], [4, 5]], [(0, 1, 1.0)])) == 5


def test_share_false_trains_where_the_mask_is_ignored(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "attention_mask", lambda config, batch: (batch["group"] >= 0).long())
    base, values = tiny_model("llama"), profile.load("smoke")
    lora = Lora(rank=2, alpha=4)
    junior = values.junior.model_copy(update=dict(lr=1e-2, dtype="float32", batch=2, micro_batch=2, lora=lora))
    sft.train(base, [(r["prompt"], r["chosen"]) for r in PAIRS], junior, seed=0, output=tmp_path / "junior")
    changes = dict(epochs=1, dtype="float32", batch=2, micro_batch=2, lora=lora, max_length=256)
    refused = values.senior.model_copy(update=changes)
    with pytest.raises(UserError, match="set senior.share=false"):
        dpo.train(base, tmp_path / "junior", PAIRS, refused, seed=0, output=tmp_path / "a")
    facts = dpo.train(
        base, tmp_path / "junior", PAIRS, refused.model_copy(update={"share": False}), seed=0, output=tmp_path / "b"
    )
    assert facts["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_bfloat16_outputs_that_come_back_as_float32_are_taken(tiny_model, tmp_path):
    trainer = ours_trainer(tiny_model("llama"), tmp_path, 4, 4, 2, save_strategy="no")
    trainer.model.to(torch.bfloat16)
    trainer.args.bf16 = True
    trainer.accelerator.native_amp = True  # what TrainingArguments(bf16=True) sets on a GPU
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 2 and all(math.isfinite(x) for x in losses)

"""DPO in shared, packed rows: equal to TRL, to plain rows, to itself over any split of the batch."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from speed_core import profile
from speed_core.files import UserError
from speed_core.generation import sft
from speed_core.models import launch, loading, token_logprobs, training
from speed_core.preference import dpo, prompt_sharing
from speed_core.preference.prompt_sharing import PromptGroup
from speed_core.preference.usable_pairs import check_pairs
from speed_core.profile import Lora, Processes, Senior

FAMILIES = ("gemma3", "llama", "qwen2", "mistral")
PAIRS = [
    {"prompt": f"Write a {a} record about {b}.", "chosen": f'{{"q": "{a} {b * n}"}}', "rejected": '{"q": "%s"}' % (b * m)}
    for (a, b, n, m) in [("short", "bees", 1, 3), ("long", "the red sea", 2, 1), ("plain", "iron", 4, 2), ("odd", "trains and tea", 1, 2)]
]  # fmt: skip


UNEVEN = (0.25, 1.0, 3.0, 0.5)  # equal weights would hide a mean of means
MORE = [{**r, "prompt": f"{r['prompt']} Again, {n}."} for n in range(3) for r in PAIRS][:9]  # no whole number of batches


def policy(base, seed=0):
    """A fresh LoRA policy in float32."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, training.lora_config(Lora(rank=2, alpha=4), model))


def shake(model):
    """An adapter starts as the identity: move it, so that policy and reference differ."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name and ".ref." not in name:  # TRL keeps the reference as a second adapter
            p.data.normal_(0, 0.1, generator=g)
    return model


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prepared(base, pairs=PAIRS):
    """A policy that has moved away from its reference, and the groups of `pairs` with that reference."""
    tokenizer = loading.load_tokenizer(base)
    groups, skipped = check_pairs(tokenizer, pairs, 256)
    assert len(groups) == len(pairs) and not any(skipped.values())
    assert max(map(len, groups)) > 2 * 16, "no row is longer than the windows of tiny_config"
    model = policy(base)
    token_logprobs.hidden_states_only(model)
    dpo.reference_log_probs(model, groups, 0, 4)
    return shake(model), groups


def loss_of(model, groups, capacity=None, share=True, **more):
    model.zero_grad()
    batch = prompt_sharing.collate(groups, 0, capacity, share=share)
    policy_logp = prompt_sharing.completion_log_probs(model, batch)
    each = dpo.batch_losses(policy_logp, batch, beta=0.1, **more)
    rewards = (0.1 * (policy_logp - batch["reference"])).detach()[batch["pairs"].T]
    loss = (each * batch["weights"]).sum() / batch["weights"].sum()
    loss.backward()
    return loss.detach(), rewards, grads(model)


def trl_trainer(base, folder, **more):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = loading.load_tokenizer(base)
    text = [
        {"prompt": "<bos>" + training.prompt_text(r["prompt"]), "chosen": r["chosen"], "rejected": r["rejected"]} for r in PAIRS
    ]
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
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, training.lora_config(Lora(rank=2, alpha=4), model))
    arguments = DPOConfig(output_dir=str(folder), gradient_checkpointing=False, **given)
    return DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(text), processing_class=tokenizer)


@pytest.mark.parametrize(("family", "kind"), [*((f, "sigmoid") for f in FAMILIES), ("gemma3", "ipo")])
def test_loss_rewards_and_gradients_equal_trls(family, kind, tiny_model, tmp_path):
    base = tiny_model(family)
    ours = loss_of(*prepared(base), loss=kind)
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


def ours_trainer(base, folder, batch=4, micro=4, steps=20, weights=None, pairs=PAIRS, **more):
    model, made = prepared(base, pairs)
    for g, w in zip(made, itertools.cycle(weights or (1.0,)), strict=False):
        g.pairs = [(a, b, w) for a, b, _ in g.pairs]
    if weights:
        made[0].pairs.append((1, 0, 2.0))
        made[0].rows.append(-1)
    values = profile.load("smoke").senior.model_copy(
        update=dict(examples=8, batch=batch, micro_batch=micro, lr=1e-3, dtype="float32")
    )
    arguments = training.trainer_arguments(values, 0, folder, remove_unused_columns=False, max_steps=steps, **more)
    trainer = dpo.DpoTrainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=made, data_collator=lambda part: prompt_sharing.collate(part, 0),
        beta=0.1, callbacks=[training.bar_callback("dpo", lambda: trainer.step_rows)],
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trajectory_over_20_steps_equals_trls(family, tiny_model, tmp_path):
    base = tiny_model(family)
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
    assert len(one) == 20 and one == pytest.approx(other, abs=5e-4) and min(one) < one[0] - 0.01
    for (name, p), q in zip(ours.model.named_parameters(), dict(theirs.model.named_parameters()).items(), strict=False):
        if p.requires_grad:
            assert torch.allclose(p, dict(theirs.model.named_parameters())[name], atol=2e-4), (name, q[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_packed_and_separate_rows_agree(family, tiny_model):
    model, groups = prepared(tiny_model(family))
    plain = loss_of(model, groups, share=False)
    for capacity in (None, 60, 1000):
        packed = loss_of(model, groups, capacity)
        assert torch.allclose(plain[0], packed[0], atol=1e-5) and torch.allclose(plain[1], packed[1], atol=1e-5)
        assert all(torch.allclose(g, packed[2][n], atol=1e-5, rtol=1e-3) for n, g in plain[2].items())


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_the_block_mask_equals_the_dense_one(family, tiny_model):
    model, groups = prepared(tiny_model(family))
    batch = prompt_sharing.collate(groups, 0, 1000)
    with torch.no_grad():
        dense = prompt_sharing.completion_log_probs(model, batch)
        model.get_base_model().set_attn_implementation("flex_attention")
        blocks = prompt_sharing.completion_log_probs(model, batch)
    assert torch.allclose(dense, blocks, atol=1e-4)


def test_several_pairs_of_one_prompt_cost_one_pass_and_weigh_what_they_should(tiny_model):
    base = tiny_model("llama")
    tokenizer = loading.load_tokenizer(base)
    texts = ["a b c", "d e", "f g h i"]
    rows = [
        {"prompt": "same", "chosen": texts[a], "rejected": texts[b], "weight": x}
        for a, b, x in ((0, 1, 1.0), (0, 2, 0.5), (2, 1, 2.0))
    ]
    together, _ = check_pairs(tokenizer, rows, 256)
    apart, _ = check_pairs(tokenizer, rows, 256, share=False)
    assert len(together) == 1 and len(together[0].completions) == 3 and len(apart) == 3
    assert len(together[0]) < sum(map(len, apart)) / 2
    model = policy(base)
    token_logprobs.hidden_states_only(model)
    for groups in (together, apart):
        dpo.reference_log_probs(model, groups, 0, 4)
    shake(model)
    one, other = loss_of(model, together, label_smoothing=0.1), loss_of(model, apart, label_smoothing=0.1)
    assert torch.allclose(one[0], other[0], atol=1e-5)
    assert all(torch.allclose(g, other[2][n], atol=1e-5, rtol=1e-3) for n, g in one[2].items())


def test_smoothing_and_ipo_have_their_textbook_values():
    log_probs, zero = torch.tensor([3.0, 0.0]), torch.zeros(1)
    batch = {"reference": torch.zeros(2), "pairs": torch.tensor([[0, 1]]), "lengths": torch.tensor([2.0, 4.0])}
    wanted = 0.9 * math.log1p(math.exp(-3)) + 0.1 * math.log1p(math.exp(3))
    assert float(dpo.dpo_loss(zero + 3, zero, zero, zero, beta=1.0, label_smoothing=0.1)) == pytest.approx(wanted)
    assert float(dpo.batch_losses(log_probs, batch, beta=1.0, label_smoothing=0.1)) == pytest.approx(wanted)
    assert float(dpo.batch_losses(log_probs, batch, beta=0.5, loss="ipo")) == pytest.approx((3 / 2 - 1.0) ** 2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
@settings(deadline=None)
def test_packing_keeps_every_group_once_and_within_the_row(sizes, capacity):
    rows = prompt_sharing.pack(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= capacity or len(row) == 1 for row in rows)


@pytest.mark.parametrize("micro", (1, 2, 4))
def test_accumulation_does_not_change_the_training(micro, tiny_model, tmp_path):
    base = tiny_model("llama")
    # Nine prompts in batches of eight: each epoch ends in a batch of one.
    whole, split = (ours_trainer(base, tmp_path / str(m), 8, m, 4, UNEVEN, MORE, save_strategy="no") for m in (8, micro))
    whole.train(), split.train()
    a, b = (dict(t.model.named_parameters()) for t in (whole, split))
    assert all(torch.allclose(p, b[n], atol=1e-5) for n, p in a.items())
    assert losses(whole) == pytest.approx(losses(split), abs=1e-5) and len(losses(whole)) == 4


def losses(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


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


def in_two_processes(folder, body):
    """Run the lines of `body` in two processes of one training, with this module as `test_dpo` and a `rank`."""
    script = folder / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
        "import os, torch, test_dpo\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"
        f"{body}\n"
        "sys.stdout.flush()\nos._exit(0)\n"  # gloo's threads may outlive the interpreter and abort
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes_equal_one_with_the_whole_batch_and_go_on_from_a_checkpoint_in_its_order(tiny_model, tmp_path):
    base = tiny_model("llama")
    in_two_processes(
        tmp_path,
        f"""
def trainer(name, **more):
    folder = Path({str(tmp_path)!r}) / name
    return test_dpo.ours_trainer({base!r}, folder, 4, 1, 4, test_dpo.UNEVEN, test_dpo.MORE[:5], ddp_backend='gloo', **more)
def kept(t):
    return {{'weights': dict(t.model.named_parameters()), 'losses': test_dpo.losses(t)}}
whole = trainer('whole', save_strategy='steps', save_steps=3)
whole.train()
again = trainer('again', save_strategy='no')
again.train(resume_from_checkpoint={str(tmp_path / "whole" / "checkpoint-3")!r})
if rank == 0:
    torch.save([kept(whole), kept(again)], {str(tmp_path / "p.pt")!r})
""",
    )
    # Five prompts: the second batch of an epoch is one prompt, and one of the two processes has none for it.
    one = ours_trainer(base, tmp_path / "one", 4, 4, 4, UNEVEN, MORE[:5], save_strategy="no")
    one.train()
    ours = dict(one.model.named_parameters())
    assert len(losses(one)) == 4
    for two in torch.load(tmp_path / "p.pt", weights_only=False):
        assert two["losses"] == pytest.approx(losses(one), abs=1e-5)
        assert all(torch.allclose(ours[n], p, atol=1e-5) for n, p in two["weights"].items() if ours[n].requires_grad)


def seniors_of(settings: Senior, bases: dict[str, str], output: Path) -> None:
    """A senior of each family, one after the other, from the junior that is there."""
    for family, base in bases.items():
        how = {"seed": 0, "output": output / family / "two", "cache": output / family / "c2"}
        dpo.train(base, output / family / "junior", MORE[:5], settings, **how)


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())


@pytest.mark.slow
def test_two_processes_train_the_seniors_that_one_would_and_share_the_reference(tiny_model, tmp_path):
    bases = {family: tiny_model(family) for family in ("llama", "mistral", "gemma3")}
    how = {"batch": 4, "micro_batch": 1, "epochs": 2, "save_steps": 1}
    settings = [junior_and_senior(base, tmp_path / family, **how) for family, base in bases.items()]
    launch.train(seniors_of, Processes(processes=2), tmp_path / "said", settings=settings[0], bases=bases, output=tmp_path)
    for family, base in bases.items():
        folder = tmp_path / family
        one = dpo.train(base, folder / "junior", MORE[:5], settings[0], seed=0, output=folder / "one", cache=folder / "c1")
        references = [sorted((folder / c).glob("reference-*.npy")) for c in ("c1", "c2")]
        assert len(references[0]) == 1 and [p.name for p in references[0]] == [p.name for p in references[1]]
        assert np.load(references[0][0]) == pytest.approx(np.load(references[1][0]), abs=1e-4)
        two = json.loads((folder / "two" / "training.json").read_text())["history"]
        assert len(two) == 4 and [h["loss"] for h in two] == pytest.approx([h["loss"] for h in one["history"]], abs=1e-5)
        assert close(adapter_of(folder / "one"), adapter_of(folder / "two"))


@pytest.mark.slow
def test_a_senior_whose_processes_were_killed_goes_on_and_ends_in_the_weights_of_one_process(tiny_model, tmp_path, capsys):
    base = tiny_model("llama")
    senior = junior_and_senior(base, tmp_path, batch=4, micro_batch=1, epochs=6, save_steps=1)  # twelve steps
    given = {"base": base, "junior": tmp_path / "junior", "pairs": MORE[:5], "settings": senior, "seed": 0}
    job = {"output": str(tmp_path / "two"), "cache": str(tmp_path / "c2"), "junior": str(tmp_path / "junior"), "pairs": MORE[:5]}
    body = (
        "import json, sys\nfrom pathlib import Path\nfrom speed_core.models import launch\nfrom speed_core.preference import dpo\n"
        "from speed_core.profile import Processes, Senior\n"
        f"paths = {{k: Path(v) if isinstance(v, str) else v for k, v in json.loads({json.dumps(job)!r}).items()}}\n"
        f"settings = Senior.model_validate_json({senior.model_dump_json()!r})\n"
        f"launch.train(dpo.train, Processes(processes=2), Path({str(tmp_path / 'said')!r}), base={base!r}, settings=settings, seed=0, **paths)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", body], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 1200
    while not any((tmp_path / "c2").glob("senior-*/checkpoint-*/trainer_state.json")):
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    processes = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    psutil.wait_procs(processes, timeout=60)
    (where,) = (tmp_path / "c2").glob("senior-*")
    at = int(training.last_checkpoint(where, 2).name.removeprefix("checkpoint-"))
    assert at < 12 and not (tmp_path / "two" / "training.json").exists(), "it had ended before it was killed"
    two = {"output": tmp_path / "two", "cache": tmp_path / "c2"}
    launch.train(dpo.train, Processes(processes=2), tmp_path / "said", **given, **two)
    assert f"{12 - at}/12" in (said := capsys.readouterr().out) and f"{13 - at}/12" not in said, "it began again"
    dpo.train(**given, output=tmp_path / "one", cache=tmp_path / "c1")
    assert close(adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two"))


def test_an_evaluation_gives_the_mean_loss_of_its_pairs_and_leaves_the_training_means_alone(tiny_model, tmp_path):
    base = tiny_model("llama")
    plain, watched = (ours_trainer(base, tmp_path / n, 2, 2, 2, save_strategy="no") for n in "ab")
    watched.eval_dataset = plain.train_dataset
    model, groups = prepared(base)
    assert watched.evaluate()["eval_loss"] == pytest.approx(float(loss_of(model, groups)[0]), abs=1e-5)
    plain.train()
    watched.args.eval_strategy, watched.args.eval_steps = "steps", 1
    watched.train()
    assert losses(watched) == pytest.approx(losses(plain), abs=1e-6)
    assert len([h for h in watched.state.log_history if "eval_loss" in h]) == 2


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
        training.trainer_arguments(values, 0, tmp_path)


def test_the_reference_is_kept_by_digest_and_recomputed_for_other_data(tiny_model, tmp_path):
    model, groups = prepared(tiny_model("llama"))
    wanted = [g.reference for g in groups]
    first = dpo.cached_reference(model, groups, 0, 4, "w", tmp_path)
    for g in groups:
        g.reference = []
    assert dpo.cached_reference(None, groups, 0, 4, "w", tmp_path) == first  # read, not computed: there is no model
    assert all(g.reference == pytest.approx(w, abs=1e-5) for g, w in zip(groups, wanted, strict=True))
    assert dpo.cached_reference(model, groups, 0, 4, "other weights", tmp_path) != first
    assert dpo.cached_reference(model, groups, 0, 4, "w", tmp_path, share=False) != first
    assert dpo.cached_reference(model, groups, 0, 4, "w", tmp_path, row_tokens=1000) != first
    groups[0].completions[0] = groups[0].completions[0] + [5]
    assert dpo.cached_reference(model, groups, 0, 4, "w", tmp_path) != first
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_a_reference_file_that_does_not_fit_is_refused_and_a_reference_that_is_no_number_is_not_kept(tiny_model, tmp_path):
    model, groups = prepared(tiny_model("llama"))
    dpo.cached_reference(model, groups, 0, 4, "w", tmp_path)
    (file,) = tmp_path.glob("*.npy")
    np.save(file, np.load(file)[:-1])
    with pytest.raises(UserError, match="do not fit the data of its digest; delete the file"):
        dpo.cached_reference(model, groups, 0, 4, "w", tmp_path)
    model.get_base_model().model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the junior gives pair 0 the log-probabilities"):
        dpo.cached_reference(model, groups, 0, 4, "damaged", tmp_path)
    assert list(tmp_path.glob("*.npy")) == [file]


def test_a_loss_that_is_no_number_stops_and_names_step_pair_and_checkpoint(tiny_model, tmp_path):
    trainer = ours_trainer(tiny_model("llama"), tmp_path, 2, 2, 4, save_strategy="steps", save_steps=1)
    (at,) = (k for k, step in enumerate(trainer.get_train_dataloader()) if 2 in step["rows"])  # pair 2 comes with another
    trainer.train_dataset[2].reference[0] = float("nan")
    last = f"last good checkpoint: checkpoint-{at}" if at else "there is no checkpoint yet"
    with pytest.raises(UserError, match=f"not a number at step {at + 1} of pair 2; .*{last}"):
        trainer.train()


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(tiny_model, tmp_path):
    trainer = ours_trainer(tiny_model("llama"), tmp_path, 2, 2, 4, save_strategy="steps", save_steps=1)
    name, weight = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    calls: list[int] = []

    def poison(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else gradient

    weight.register_hook(poison)
    said = (
        r"dpo: a gradient is not a number at step 2 of pairs \d, \d; lower the learning rate; last good checkpoint: checkpoint-1"
    )
    with pytest.raises(UserError, match=said) as error:
        trainer.train()
    first, second = trainer.get_train_dataloader()
    assert f"of pairs {', '.join(map(str, second['rows'].tolist()))};" in str(error.value)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_last_checkpoint_is_the_newest_that_was_written_to_its_end(tmp_path):
    assert training.last_checkpoint(tmp_path) is None
    both = ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
    for step, written in ((9, both), (10, both), (11, both[:2]), (12, both[1:])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in written:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    assert training.last_checkpoint(tmp_path, 2).name == "checkpoint-10"
    assert training.last_checkpoint(tmp_path).name == "checkpoint-11", "of one process"


def test_layers_of_another_sort_are_refused(tiny_model):
    model, groups = prepared(tiny_model("gemma3"))
    model.get_base_model().config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(UserError, match="chunked_attention have no mask for packed rows"):
        prompt_sharing.completion_log_probs(model, prompt_sharing.collate(groups, 0))


def test_a_head_that_is_trained_is_refused(tiny_model):
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    model = get_peft_model(model, training.lora_config(Lora(rank=2, alpha=4, targets=("q_proj", "lm_head")), model))
    with pytest.raises(UserError, match="a head with weights that are trained is not supported"):
        token_logprobs.hidden_states_only(model)


def test_ipo_with_smoothing_is_refused():
    with pytest.raises(UserError, match="label_smoothing: has no meaning with loss 'ipo'"):
        profile.load("smoke", {"senior.loss": "ipo", "senior.label_smoothing": 0.1})


def test_an_architecture_that_ignores_the_mask_is_refused(tiny_model, monkeypatch):
    model, groups = prepared(tiny_model("llama"))
    prompt_sharing.verify(model, groups[0], 0)
    monkeypatch.setattr(prompt_sharing, "attention_mask", lambda config, batch: (batch["group"] >= 0).long())
    with pytest.raises(UserError, match="ignores the mask or the positions"):
        prompt_sharing.verify(model, groups[0], 0)


def junior_and_senior(base, folder, **changes):
    """A junior in `folder` and settings of a senior in float32."""
    values, lora = profile.load("smoke"), Lora(rank=2, alpha=4)
    junior = values.junior.model_copy(update=dict(lr=1e-2, dtype="float32", batch=2, micro_batch=2, lora=lora))
    sft.train(base, [(r["prompt"], r["chosen"]) for r in PAIRS], junior, seed=0, output=folder / "junior")
    given = dict(examples=8, lr=1e-2, epochs=4, dtype="float32", batch=2, micro_batch=2, lora=lora, max_length=256) | changes
    return values.senior.model_copy(update=given)


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_dpo_widens_the_margin_from_the_junior_as_reference(family, tiny_model, tmp_path):
    base = tiny_model(family)
    senior = junior_and_senior(base, tmp_path)
    facts = dpo.train(base, tmp_path / "junior", PAIRS, senior, seed=0, output=tmp_path / "senior", cache=tmp_path / "cache")
    assert abs(facts["history"][0]["loss"] - 0.6931) < 1e-3, "the policy does not start at the reference"
    assert facts["history"][-1]["margin"] > facts["history"][0]["margin"]
    noted = json.loads((tmp_path / "senior" / "base.json").read_text())
    assert noted["weights"] == loading.weights_id(dpo.reference_model_path(base, tmp_path / "junior"))


def test_the_settings_of_a_senior_reach_its_training_and_an_interrupted_one_goes_on(tiny_model, tmp_path, monkeypatch):
    base = tiny_model("gemma3")
    # At the start policy and reference agree, so ipo's loss is (1 / (2 beta))^2: 1 at beta 0.5.
    senior = junior_and_senior(base, tmp_path, beta=0.5, loss="ipo", row_tokens=1000, save_steps=1, examples=4)
    rows = [*PAIRS[:1], PAIRS[1] | {"rejected_status": "truncated"}, *PAIRS[1:], {**PAIRS[0], "prompt": "One more."}]

    def train(name, cache):
        return dpo.train(base, tmp_path / "junior", rows, senior, seed=0, output=tmp_path / name, cache=tmp_path / cache)

    whole = train("whole", "a")
    assert whole["history"][0]["loss"] == pytest.approx(1.0, abs=1e-3) and len(whole["history"]) == 8
    assert whole["rows"] == 4 and whole["set_aside_rows"] == {"truncated": [1]}, "it took fewer than the four usable pairs"
    widths: list[int] = []
    real = prompt_sharing.completion_log_probs

    def stopped(model, batch):
        widths.append(batch["input_ids"].shape[0])
        if len(widths) == 2 + 2 + 5:  # verify, the reference, five steps
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(prompt_sharing, "completion_log_probs", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("again", "b")
    assert set(widths[2:]) == {1}, "row_tokens did not pack two prompts into one row"
    widths.clear()
    again = train("again", "b")
    assert len(widths) == 2 + 4, "it began again instead of going on from the fourth step"
    assert [h["loss"] for h in again["history"]] == pytest.approx([h["loss"] for h in whole["history"]], abs=1e-5)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again")]
    assert all(torch.allclose(v, adapters[1][k], atol=1e-6) for k, v in adapters[0].items())


def test_an_impossible_split_and_too_few_pairs_are_refused_before_anything_is_computed(tiny_model, tmp_path, monkeypatch):
    base = tiny_model("llama")
    senior = junior_and_senior(base, tmp_path, batch=4)
    monkeypatch.setattr(prompt_sharing, "completion_log_probs", None)
    train = functools.partial(dpo.train, base, tmp_path / "junior", seed=0, output=tmp_path / "senior")
    with pytest.raises(UserError, match=r"3 usable prompts among 3 pairs .* one batch needs 4; raise senior.prompts"):
        train(PAIRS[:3], senior)
    with pytest.raises(UserError, match="raise senior.examples or lower senior.batch"):
        train(PAIRS, senior.model_copy(update={"examples": 3}))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch 4: not micro_batch 2 x 3 devices x a whole number"):
        train(PAIRS, senior)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, "pair 1: rejected is 'missing', not a text"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "pair 1: chosen is None, not a text"),
        ({"prompt": "a", "chosen": "c", "rejected": "b", "weight": -1}, "pair 1: weight is -1, not a positive number"),
        ({"prompt": "a", "chosen": "c", "rejected": "b", "weight": float("nan")}, "pair 1: weight is nan"),
        ({"prompt": "a", "chosen": "c", "rejected": "b", "weight": True}, "pair 1: weight is True"),
        ({"prompt": "a", "chosen": "c \ud83d", "rejected": "b"}, "row 1: its chosen holds half of a UTF-16 pair"),
    ],
)
def test_a_row_of_another_form_is_named(row, complaint, tiny_model):
    with pytest.raises(UserError, match=complaint):
        check_pairs(loading.load_tokenizer(tiny_model("llama")), [PAIRS[0], row], 256)


def test_unusable_pairs_are_set_aside_by_rule_and_row(tiny_model):
    tokenizer = loading.load_tokenizer(tiny_model("llama"))
    bad = [("a", "x", "x"), ("a", "", "x"), ("a", "x " * 300, "y"), ("a", "x", "y")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), b, strict=True)) for b in bad]
    cut = [rows[3] | {"truncated": True}, rows[3] | {"rejected_status": "truncated"}]  # as a user marks it, as `judge` does
    groups, skipped = check_pairs(tokenizer, [*rows, *cut, {**rows[0], "rejected": "x "}], 64)
    assert len(groups) == 1 and skipped == {"same": [0, 6], "empty": [1], "truncated": [4, 5], "too_long": [2], "joins": []}
    first, none = check_pairs(tokenizer, [rows[3], rows[0]], 64, most=1)
    assert len(first) == 1 and not any(none.values()), "rows behind the last one that is needed were looked at"


def test_a_prompt_that_is_tokenised_differently_when_joined_is_set_aside(tiny_model, monkeypatch):
    tokenizer = loading.load_tokenizer(tiny_model("llama"))
    monkeypatch.setattr(training, "prompt_text", lambda text: text)  # without the line break the words run together
    pair = {"prompt": "there is some", "chosen": "thing new", "rejected": "is hot"}
    groups, skipped = check_pairs(tokenizer, [pair], 64)
    assert groups == [] and skipped["joins"] == [0]


def test_groups_know_their_length():
    assert len(PromptGroup([1, 2], [[3], [4, 5]], [(0, 1, 1.0)])) == 5


def test_share_false_trains_where_the_mask_is_ignored(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sharing, "attention_mask", lambda config, batch: (batch["group"] >= 0).long())
    base = tiny_model("llama")
    refused = junior_and_senior(base, tmp_path, epochs=1)
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

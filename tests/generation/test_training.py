"""SFT and embedding training on small random models of the families that the large profiles use."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speed_core import profile
from speed_core.contrastive import embedder
from speed_core.contrastive.train import embed_by_length, train_embedder
from speed_core.files import UserError
from speed_core.generation import sft
from speed_core.models import adapters, launch, loading, packed, token_logprobs, training
from speed_core.profile import Embedding, Lora, Processes, Training

FAMILIES = ("gemma3", "llama", "mistral", "qwen2")
LARGE = ("llama", "mistral", "gemma3")  # that several processes train
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
    ours = token_logprobs.token_log_probs(model, ids, mask, scored)
    ours.sum().backward()
    # The head is taken as frozen, so what is compared is the gradient of a layer below it.
    inner = model.model.layers[0].mlp.down_proj.weight
    gradient, inner.grad = inner.grad, None
    logits = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
    plain = torch.zeros_like(ours)
    plain[:, 1:] = logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]
    assert torch.allclose(ours, plain, atol=1e-4)
    plain.sum().backward()
    assert gradient.abs().sum() > 0 and torch.allclose(gradient, inner.grad, atol=1e-5, rtol=1e-3)


def test_the_gradient_through_the_head_equals_autograds():
    torch.manual_seed(0)
    h = torch.randn(5, 4, requires_grad=True)
    w, t, up = torch.randn(11, 4), torch.tensor([0, 3, 10, 2, 2]), torch.randn(5)
    head = torch.nn.Linear(4, 11, bias=False)
    head.weight = torch.nn.Parameter(w, requires_grad=False)
    for cap, is_packed in ((None, False), (2.0, False), (None, True), (2.0, True)):
        if is_packed:
            packed.pack(head, training=True)
            head.weight = torch.nn.Parameter(w)
        (token_logprobs.log_probs(h, head, t, cap) * up).sum().backward()
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
    loading.check_adapter(tmp_path / "a", base)
    adapted = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert adapted == sorted(adapted), "the order differs from process to process, and so would the digest"
    other = tiny_model("gemma3" if family != "gemma3" else "llama")
    with pytest.raises(UserError, match="trained on weights"):
        loading.check_adapter(tmp_path / "a", other)


def test_weights_that_are_no_numbers_stop_the_training_and_leave_no_adapter(tiny_model, tmp_path):
    from safetensors.torch import save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model("llama"), damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="sft: a gradient is not a number at step 1; lower the learning rate"):
        sft.train(str(damaged), PAIRS, settings("junior"), seed=0, output=tmp_path / "out")
    assert not list(tmp_path.glob("out/adapter*"))


def lora_model(base):
    """The same LoRA model every time, moved off the identity that an adapter starts as."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, training.lora_config(Lora(rank=2, alpha=4), model))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_half_of_a_pair_in_a_training_row_is_named(tiny_model):
    tokenizer = loading.load_tokenizer(tiny_model("llama"))
    with pytest.raises(UserError, match="training row 1: its completion holds half of a UTF-16 pair"):
        sft.encode_rows(tokenizer, [PAIRS[0], ("a", "b \ud83d")], 256)


UNEVEN = [(p, c + " and so on" * n) for n, (p, c) in enumerate(PAIRS)]  # rows of four lengths


def trl_loss(base, folder):
    """(batch, loss, gradients) of TRL's own SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = loading.load_tokenizer(base)
    rows, _ = sft.encode_rows(tokenizer, UNEVEN, 512)
    arguments = SFTConfig(
        str(folder), completion_only_loss=True, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False
    )
    trainer = SFTTrainer(lora_model(base), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return batch, loss.detach(), gradients(trainer.model)


@pytest.mark.parametrize("family", ("gemma3", "llama"))
def test_loss_and_gradients_equal_trls_however_many_rows_are_read_at_once(family, tiny_model, tmp_path):
    base = tiny_model(family)
    batch, wanted, expected = trl_loss(base, tmp_path)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4 and len(expected) > 0
    model = lora_model(base)
    token_logprobs.hidden_states_only(model)
    for rows in (1, 3, 4):
        model.zero_grad()
        parts = training.by_length(batch, rows)[1]
        assert [len(p["labels"]) for p in parts] == {1: [1, 1, 1, 1], 3: [3, 1], 4: [4]}[rows]
        losses = [sft.completion_loss(model, p, (batch["labels"] != -100).sum()) for p in parts]
        sum(losses).backward()
        assert torch.allclose(sum(losses), wanted, atol=1e-5, rtol=1e-5), rows
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, g in found.items():
            assert torch.allclose(g, expected[name], atol=1e-5, rtol=1e-3), (rows, name)


def trained(base, folder, micro):
    """(losses, adapter) after two steps on the four uneven rows."""
    s = settings("junior", batch=4, micro_batch=micro, epochs=2, lr=1e-2)
    facts = sft.train(base, UNEVEN, s, seed=0, output=folder)
    return [h["loss"] for h in facts["history"]], load_file(folder / "adapter_model.safetensors")


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())


def test_accumulated_micro_batches_equal_one_batch(tiny_model, tmp_path):
    (whole, a), (split, b) = (trained(tiny_model("gemma3"), tmp_path / str(m), m) for m in (4, 1))
    assert split == pytest.approx(whole, rel=1e-4) and len(whole) == 2
    assert close(a, b)


def steps_done(monkeypatch, stop=None):
    """A list of the steps that a training then does; after `stop` of them it is interrupted."""
    done, real = [], training.bar_callback

    def callback(*given):
        made = real(*given)

        def on_train_end(args, state, control, **more):
            if state.global_step == stop:
                raise KeyboardInterrupt

        def on_step_begin(args, state, control, **more):
            on_train_end(args, state, control)
            done.append(state.global_step)

        made.on_step_begin, made.on_train_end = on_step_begin, on_train_end
        return made

    monkeypatch.setattr(training, "bar_callback", callback)
    return done


def started_again(monkeypatch, train, folder, stop, saved):
    """A training that is interrupted after `stop` steps and started again has the facts and weights of one that was not."""
    whole = train(folder / "whole")
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        steps_done(stopped, stop)
        train(folder / "again")
    done = steps_done(monkeypatch)
    assert train(folder / "again") == whole, "other losses, learning rates or gradients"
    assert done == [*range(saved, len(whole["history"]))], "it began again instead of going on"
    (a,), (b,) = ([*(folder / name / "m").rglob("*.safetensors")] for name in ("whole", "again"))
    assert a.read_bytes() == b.read_bytes()
    assert not [*folder.glob("*/c/*")], "checkpoints of a finished training are left"


@pytest.mark.parametrize(("stop", "saved"), [(5, 4), (7, 6), (9, 8)])  # of 9, 4 an epoch
def test_a_generator_that_was_interrupted_ends_in_the_weights_of_one_that_was_not(stop, saved, tiny_model, tmp_path, monkeypatch):
    lora = Lora(rank=2, alpha=4, dropout=0.1)
    s = settings("junior", batch=2, micro_batch=1, epochs=2.25, lr=1e-2, lora=lora, save_steps=2)

    def train(folder):
        return sft.train(tiny_model("llama"), [*UNEVEN, *PAIRS], s, seed=0, output=folder / "m", cache=folder / "c")

    started_again(monkeypatch, train, tmp_path, stop, saved)


def test_a_checkpoint_of_other_settings_or_data_is_not_used(tiny_model, tmp_path, monkeypatch):
    s = settings("junior", epochs=3, save_steps=1)

    def train(pairs=PAIRS, seed=0, **more):
        how = {"seed": seed, "output": tmp_path / "m", "cache": tmp_path / "c"}
        return sft.train(tiny_model("llama"), pairs, s.model_copy(update=more), **how)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        steps_done(stopped, 4)
        train()
    done = steps_done(monkeypatch)
    for changes in ({"lr": 0.02}, {"seed": 1}, {"pairs": PAIRS[::-1]}, {"pairs": UNEVEN}):
        train(**changes)
        assert done == [*range(6)], changes
        done.clear()
    train(save_steps=5)
    assert done == [4, 5], "when a checkpoint is written decides no weight"


TWO = Processes(processes=2)


def sft_of(settings: Training, bases: dict[str, str], output: Path) -> None:
    """A junior of each family, one after the other."""
    for family, base in bases.items():
        sft.train(base, UNEVEN, settings, seed=0, output=output / family)


@pytest.mark.slow
def test_two_processes_train_the_generators_that_one_would_with_the_whole_batch(tiny_model, tmp_path):
    bases = {family: tiny_model(family) for family in LARGE}
    s = settings("junior", batch=4, micro_batch=1, epochs=2, lr=1e-2)
    launch.train(sft_of, TWO, tmp_path / "said", settings=s, bases=bases, output=tmp_path)
    for family, base in bases.items():
        losses, adapter = trained(base, tmp_path / f"one-{family}", 4)
        facts = json.loads((tmp_path / family / "training.json").read_text())
        assert [h["loss"] for h in facts["history"]] == pytest.approx(losses, rel=1e-4)
        assert close(load_file(tmp_path / family / "adapter_model.safetensors"), adapter)


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
    facts = train_embedder(
        base, records(8), s, guide="package:all-MiniLM-L6-v2", guide_cache=tmp_path / "g", seed=0, output=tmp_path / "m"
    )
    assert facts["rows"] == 8 and len(facts["history"]) == 2
    assert sum(p.stat().st_size for p in (tmp_path / "m").rglob("*")) < 1e6, "the adapter alone is kept"
    model = embedder.load_trained(tmp_path / "m")
    whole = SentenceTransformer(str(embedder.merged(tmp_path / "m", tmp_path / "whole")), device="cpu")
    assert (model.encode(["a b"]) == whole.encode(["a b"])).all()
    untrained = embedder.build_embedder(base, s.max_length)
    assert not (model.encode(["a b"]) == untrained.encode(["a b"])).all()
    short, long = model.encode(["a b"]), model.encode(["a b", "a much longer text that forces padding on the first"])[:1]
    assert abs(short - long).max() < 1e-2, "padding changes the vector"
    if family != "bert":
        ids = model.tokenizer("a b")["input_ids"]
        assert ids[0] == model.tokenizer.bos_token_id and ids[-1] == model.tokenizer.eos_token_id


def embedder_trained(base, folder, micro, guided=True, lora=True):
    """(losses, weights by name) after five steps of eight records, `micro` texts at a time."""
    how = {"lora": Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")) if lora else None, "guided": guided}
    s = settings("embedding", batch=8, micro_batch=micro, examples=40, lr=1e-3, **how)
    facts = train_embedder(
        base, records(40), s, guide="package:all-MiniLM-L6-v2", guide_cache=folder / "g", seed=0, output=folder / "m"
    )
    return [h["loss"] for h in facts["history"]], embedder_weights(folder / "m")


def embedder_weights(folder):
    (file,) = folder.rglob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("lora", (True, False))
def test_an_embedder_that_reads_a_few_texts_at_a_time_learns_from_the_whole_batch(guided, lora, tiny_model, tmp_path):
    base = tiny_model("mistral")
    whole, a = embedder_trained(base, tmp_path / "whole", 8, guided, lora)
    parts, b = embedder_trained(base, tmp_path / "parts", 2, guided, lora)
    assert parts == pytest.approx(whole, abs=1e-5) and len(whole) == 5
    assert a.keys() == b.keys() and max(float((v - b[k]).abs().max()) for k, v in a.items()) < 1e-5


@pytest.mark.parametrize(("micro", "lora", "stop", "saved"), [(8, True, 9, 8), (2, True, 3, 2), (2, False, 9, 8)])
def test_an_embedder_that_was_interrupted_ends_in_the_weights_of_one_that_was_not(
    micro, lora, stop, saved, tiny_model, tmp_path, monkeypatch
):
    lora = Lora(rank=2, alpha=4, dropout=0.1, targets=("q_proj", "v_proj")) if lora else None
    s = settings("embedding", batch=8, micro_batch=micro, examples=40, epochs=2, lr=1e-3, guided=True, lora=lora, save_steps=2)
    how = {"guide": "package:all-MiniLM-L6-v2", "guide_cache": tmp_path / "g", "seed": 0}

    def train(folder):
        return train_embedder(tiny_model("mistral"), records(40), s, **how, output=folder / "m", cache=folder / "c")

    started_again(monkeypatch, train, tmp_path, stop, saved)


def split_over_both(settings: Training, base: str) -> None:
    """Log-probabilities, gradients and their norm of a model that FSDP2 has split are those of the whole one."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    found = []
    for split in (False, True):
        model = lora_model(base)
        token_logprobs.hidden_states_only(model)
        inner = token_logprobs.causal_model(model)
        for part in [*inner.model.layers, inner.lm_head, model] if split else []:
            fully_shard(part, mesh=mesh)
        ids = torch.arange(5, 23).view(2, 9)
        logp = token_logprobs.token_log_probs(model, ids, torch.ones_like(ids), ids > 8)
        logp.sum().backward()
        norm = training.whole(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
        found.append({"logp": logp.detach(), "norm": norm} | {n: training.whole(g) for n, g in gradients(model).items()})
    assert len(found[0]) > 2 and close(*found), "the parts do not add up to the whole"


@pytest.mark.slow
def test_a_model_that_is_split_over_processes_has_the_numbers_of_the_whole_one(tiny_model, tmp_path):
    s = settings("junior", batch=2, micro_batch=1)
    launch.train(split_over_both, TWO, tmp_path / "said", settings=s, base=tiny_model("llama"))


def test_a_process_that_sees_several_gpus_trains_on_one():
    assert [training.one_gpu(SimpleNamespace(_n_gpu=n))._n_gpu for n in (0, 1, 4)] == [0, 1, 1]


def embedders_of(settings: Embedding, bases: dict[str, str], output: Path) -> None:
    """An embedding model of each family, one after the other."""
    for family, base in bases.items():
        how = {"guide": "package:all-MiniLM-L6-v2", "guide_cache": output / "g", "seed": 0, "output": output / family}
        train_embedder(base, records(40), settings, **how)


@pytest.mark.slow
def test_two_processes_train_embedders_on_one_anothers_negatives(tiny_model, tmp_path):
    bases = {family: tiny_model(family) for family in LARGE}
    how = {"lora": Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")), "guided": True}
    s = settings("embedding", batch=8, micro_batch=2, examples=40, lr=1e-3, **how)
    launch.train(embedders_of, TWO, tmp_path / "said", settings=s, bases=bases, output=tmp_path)
    for family, base in bases.items():
        losses, wanted = embedder_trained(base, tmp_path / f"one-{family}", 8)
        facts = json.loads((tmp_path / family / "training.json").read_text())
        assert [h["loss"] for h in facts["history"]] == pytest.approx(losses, abs=1e-5)
        assert close(embedder_weights(tmp_path / family), wanted)


def test_a_batch_that_processes_cannot_share_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch 8: not micro_batch 2 x 3 devices"):
        embedder_trained(tiny_model("llama"), tmp_path, 8)


@pytest.mark.parametrize("family", ("gemma3", "bert"))
def test_a_batch_in_parts_of_like_length_has_the_embeddings_and_gradients_of_the_whole(family, tiny_model):
    model = (
        embedder.build_embedder("package:all-MiniLM-L6-v2" if family == "bert" else tiny_model(family), 64, "float32")
        .eval()
        .float()
    )
    texts = [["a", "b c d e f g h i j", "k l"], ["m n o", "p", "q r s t u v w x y z " * 3]]
    columns = [model.preprocess(t) if hasattr(model, "preprocess") else model.tokenize(t) for t in texts]
    found, grads = [], []
    for embedded in (embed_by_length(model, columns, 2), [model(dict(c))["sentence_embedding"] for c in columns]):
        model.zero_grad()
        sum((k + 1) * e.pow(3).sum() for k, e in enumerate(embedded)).backward()
        found.append(torch.cat(embedded).detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-4, rtol=1e-4) and torch.allclose(*grads, atol=1e-3, rtol=1e-3)


def test_pooling_is_kept_with_the_adapter(tiny_model, tmp_path):
    vectors = {}
    for pooling in ("last", "mean"):
        s = settings(
            "embedding", batch=4, micro_batch=4, examples=4, pooling=pooling, lora=Lora(rank=2, alpha=4, targets=("q_proj",))
        )
        out = tmp_path / pooling
        train_embedder(
            tiny_model("gemma3"), records(4), s, guide="package:all-MiniLM-L6-v2", guide_cache=tmp_path / "g", seed=0, output=out
        )
        model = embedder.load_trained(out)
        assert model[1].pooling_mode == {"last": "lasttoken", "mean": "mean"}[pooling]
        vectors[pooling] = model.encode(["a b c"])
    assert not np.allclose(vectors["last"], vectors["mean"], atol=1e-3)


def test_models_built_one_after_the_other_share_neither_weights_nor_length_limit(tiny_model):
    one, two = embedder.build_embedder(tiny_model("gemma3"), 32), embedder.build_embedder(tiny_model("gemma3"), 8)
    assert (one.max_seq_length, two.max_seq_length) == (32, 8)
    before = two.encode(["a b"])
    with torch.no_grad():
        next(one.parameters()).add_(1.0)
    assert (two.encode(["a b"]) == before).all()
    assert (embedder.build_embedder(tiny_model("gemma3"), 8).encode(["a b"]) == before).all()
    assert (one.tokenizer.padding_side, two.tokenizer.padding_side) == ("right", "right")


def test_an_adapter_on_other_weights_is_refused(tiny_model, tmp_path):
    one, other = tiny_model("llama"), tiny_model("gemma3")
    s = settings("embedding", batch=4, micro_batch=4, examples=4, lora=Lora(rank=2, alpha=4, targets=("q_proj",)))
    train_embedder(
        one, records(4), s, guide="package:all-MiniLM-L6-v2", guide_cache=tmp_path / "g", seed=0, output=tmp_path / "m"
    )
    body = tmp_path / "m" / embedder.ADAPTER / "body.json"
    body.write_text(body.read_text().replace(one, other))
    with pytest.raises(UserError, match="trained on weights"):
        embedder.load_trained(tmp_path / "m")


def test_the_guide_reads_the_bare_text():
    assert embedder.strip_instruction(embedder.instruct("Find it", "what\nis this")) == "what\nis this"
    assert embedder.strip_instruction("plain") == "plain"


def test_two_adapters_joined_do_what_one_on_top_of_the_other_does(tiny_model, tmp_path):
    from peft import PeftModel

    base = tiny_model("llama")
    sft.train(base, PAIRS, settings("junior", lr=1e-2, epochs=2), seed=0, output=tmp_path / "junior")
    merged = loading.merged_folder(base, tmp_path / "junior")
    wider = settings("revisor", lr=1e-2, epochs=2, lora=Lora(rank=3, alpha=12))
    sft.train(str(merged), PAIRS, wider, seed=1, output=tmp_path / "senior")
    joined = adapters.joined_adapter(tmp_path / "junior", tmp_path / "senior", tmp_path / "joined")
    ids = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # In float32 all the way: the merged folder itself is rounded to bfloat16.
        below = loading.load_causal_lm(base, tmp_path / "junior", "float32")
        on_top = PeftModel.from_pretrained(below, str(tmp_path / "senior")).merge_and_unload()(ids).logits
        together = loading.load_causal_lm(base, joined, "float32")(ids).logits
        junior = loading.load_causal_lm(base, tmp_path / "junior", "float32")(ids).logits
    assert torch.allclose(on_top, together, atol=1e-5) and not torch.allclose(junior, together, atol=1e-3)

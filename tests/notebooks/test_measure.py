"""Measurements that notebooks show: log-probabilities, score gains, near-duplicates found by comparing every pair."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from speed_core import profile
from speed_core.data import curate
from speed_core.files import UserError
from speed_core.models import adapters, loading, training
from speed_core.study.runs import open_run
from workbook import measure

PAIRS = [
    {"prompt": "Write.", "chosen": "a text", "rejected": "a text"},  # the same: set aside
    {"prompt": "Write one example.", "chosen": "a good text about hens", "rejected": "no"},
]


@pytest.fixture
def senior(tiny_model, tmp_path, monkeypatch):
    """(base, adapter that changes the model) in place of a run's generators."""
    base = tiny_model("gemma3")
    load = loading.load_tokenizer
    monkeypatch.setattr(measure.loading, "load_tokenizer", lambda name: load(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, training.lora_config(profile.Lora(rank=2, alpha=4), model))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapters.save_adapter(model, tmp_path, base)
    monkeypatch.setattr(measure.generator_answers, "generator_weights", lambda run, name: (base, tmp_path))
    return base, tmp_path


def test_the_four_log_probabilities_are_those_of_the_texts_read_alone(senior):
    base, adapter = senior
    four = measure.four_log_probs(open_run("smoke"), PAIRS)
    tokenizer, plain = loading.load_tokenizer(base), loading.load_causal_lm(base, dtype="float32")
    trained = PeftModel.from_pretrained(loading.load_causal_lm(base, dtype="float32"), str(adapter)).eval()
    for who, model in (("reference", plain), ("policy", trained)):
        for side in ("chosen", "rejected"):
            tokens, found = measure.token_log_probs(model, tokenizer, PAIRS[1]["prompt"], PAIRS[1][side])
            ends = logp_of_end(model, tokenizer, PAIRS[1]["prompt"], PAIRS[1][side])
            assert four[f"{who}_{side}"] == pytest.approx(sum(found) + ends, abs=1e-3)
            assert "".join(tokens).strip() == PAIRS[1][side] and len(tokens) == len(found)
    assert abs(four["policy_chosen"] - four["reference_chosen"]) > 0.01


def logp_of_end(model, tokenizer, read, written):
    """The log-probability of the end token behind a text."""
    head = loading.encode_prompt(tokenizer, training.prompt_text(read))
    ids = torch.tensor([head + tokenizer(written, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return float(model(ids).logits[0, -1].log_softmax(-1)[tokenizer.eos_token_id])


def test_pairs_of_which_none_can_be_trained_on_are_refused_with_their_reasons(senior):
    with pytest.raises(UserError, match="none of 1 can be trained on.*'same': 1"):
        measure.four_log_probs(open_run("smoke"), PAIRS[:1])


def test_the_revisor_reads_each_text_and_scores_the_same_tokens(senior):
    tokens, (one, other) = measure.revisor_log_probs(
        open_run("smoke"), ["Write.", "Write one example."], "a good text about hens"
    )
    assert "".join(tokens).strip() == "a good text about hens" and len(tokens) == len(one) == len(other) and one != other


def test_a_replay_says_that_it_has_no_weights(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("SPEED_REPLAY", "1")
    run = open_run("smoke", {"models.generator": tiny_model("gemma3")})
    assert set(measure.four_log_probs(run, PAIRS).values()) == {0.0}
    tokens, found = measure.revisor_log_probs(run, ["Write."], "hens")
    assert found == [[0.0] * len(tokens)] and tokens
    assert capsys.readouterr().out.count("a replay has no weights") == 2


def test_a_rewritten_text_stands_beside_the_one_before_and_its_prompt():
    before = [{"record": k, "raw": f"old {k}", "status": "ok"} for k in "ab"]
    after = [{"record": "b", "raw": "new b", "status": "ok"}, {"record": "a", "raw": "{", "status": "invalid"}]
    prompts = [SimpleNamespace(id=k) for k in "ab"]
    assert measure.rewritten(after, before, prompts) == [("new b", "old b", prompts[1])]


def test_gains_and_drift_compare_the_second_text_with_the_first():
    class Judge:
        def score(self, text, prompt):
            return float(len(text)), {}, ""

    assert measure.gains(Judge(), [("long", "a", None), ("b", "cd", None)]) == [3.0, -1.0]
    before, after = ([{"raw": raw, "status": s} for raw, s in rows] for rows in (
        [("a b", "ok"), ("a", "ok"), ("a", "invalid")], [("a b c", "ok"), ("a b", "invalid"), ("a b", "invalid")]
    ))  # fmt: skip
    assert measure.length_drift(before, after) == [1]


def test_comparing_every_pair_drops_what_minhash_drops_and_only_within_a_kind():
    hens = "how long do hens lay eggs in a year when the nights are cold and the"
    texts = [hens + " days", hens + " weeks", "a train leaves at four", hens + " days"]
    records = [
        {"id": str(i), "kind": kind, "query": text, "positive": ""}
        for i, (text, kind) in enumerate(zip(texts, ("sts", "sts", "sts", "retrieval"), strict=True))
    ]
    settings = profile.Curate()
    fast = {r["id"] for r, twin in zip(records, curate.near_duplicates(records, settings), strict=True) if twin}
    assert measure.duplicates_one_by_one(records, settings) == fast == {"1"}

"""The engines for real, on this machine: gemma-3-270m through Transformers and through vLLM."""

import importlib.util
import json

import pytest

from speed_core.data import prompts, records
from speed_core.files import UserError, read_jsonl
from speed_core.generation import engines, generate, vllm_engine, vllm_worker
from speed_core.generation.transformers_engine import TransformersEngine
from speed_core.models import loading, training
from speed_core.preference import judge, pairs

BASE = "package:gemma-3-270m"


def requests(n):
    kinds = ("sts", "classification")
    planned = [
        prompts.synthesis(kinds[i % 2], "Home/Gardening", "Label a gardener's note by its task.", index=i, table="short")
        for i in range(n)
    ]
    return [generate.Request(p.id, training.prompt_text(p.text), p.kind, i) for i, p in enumerate(planned)]


def test_transformers_answers_every_request_once_and_resumes_from_the_log(tmp_path, tiny_model):
    base, decoding = tiny_model("gemma3"), generate.Decoding(max_new_tokens=48)
    entries = generate.generate_all(
        requests(4), model=base, log=tmp_path / "log", decoding=decoding, engine=generate.EngineOptions("transformers")
    )
    assert sum(generate.counts(entries).values()) == 4
    assert all(generate.outcome_of(e).status == e["status"] for e in entries)
    assert all(e["raw"].startswith("{") for e in entries), "the grammar holds from the first character"

    class Refuses:
        name = "none"

        def generate(self, todo, decoding):
            raise AssertionError(f"{len(todo)} requests were issued again")

        def close(self):
            pass

    again = generate.generate_all(requests(4), model=base, log=tmp_path / "log", decoding=decoding, engine=Refuses())
    assert again == entries


def test_a_text_of_transformers_does_not_depend_on_its_batch(tiny_model):
    engine = TransformersEngine(tiny_model("gemma3"), dtype="float32")
    decoding, told = generate.Decoding(0.9, 0.95, 8, constrained=False), []
    for size, items in ((5, requests(5)), (2, requests(5)[::-1])):
        engine.batch_size = size
        told.append({c.id: c.text for c in engine.generate(items, decoding)})
    assert told[0] == told[1] and len(set(told[0].values())) == 5


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_runs_in_a_process_of_its_own_and_ends_with_it(tmp_path):
    engine = vllm_engine.VllmEngine(BASE, max_length=512)
    try:
        items = [*requests(6), generate.Request("free", training.prompt_text("Water boils at"), "", 1)]
        entries = generate.generate_all(
            items[:6], model=BASE, log=tmp_path / "log", decoding=generate.Decoding(max_new_tokens=96), engine=engine
        )
        long = generate.Request("long", "word " * 600, "sts", 1)
        refused = generate.generate_all([long], model=BASE, log=tmp_path / "log2", decoding=generate.Decoding(), engine=engine)
        text = list(engine.generate(items[6:], generate.Decoding(max_new_tokens=12, temperature=0.0, constrained=False)))[0].text
    finally:
        engine.close()
    assert engine._worker.child.poll() is not None
    assert sum(generate.counts(entries).values()) == 6 == len(read_jsonl(tmp_path / "log"))
    assert refused[0]["status"] == "error" and "limit 512" in refused[0]["reason"], "a long prompt ends itself, not the engine"
    assert all(e["raw"].startswith('{"') and "\n" not in e["raw"][:3] for e in entries)
    assert "100" in text, "without <bos> the model would only repeat itself"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_vllm_that_rests_takes_other_weights_and_writes_what_a_new_one_writes(tmp_path, monkeypatch):
    import torch
    from peft import LoraConfig, get_peft_model

    workers = []

    class Counted(vllm_engine.Worker):
        def __init__(self):
            super().__init__()
            workers.append(self)

    torch.manual_seed(0)
    other = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(loading.load_causal_lm(BASE), other).save_pretrained(tmp_path / "other")
    base = loading.resolve(BASE)
    monkeypatch.setattr(loading, "cache_dir", lambda: tmp_path / "cache")  # of the merged weights
    monkeypatch.setattr(vllm_engine, "Worker", Counted)
    vllm_engine.end_resting()
    # float32: a fresh engine compiles its grammars while it writes, so its batches, and the last bits in bfloat16, are others.
    decoding = generate.Decoding(temperature=0.7, max_new_tokens=24)
    how = {"decoding": decoding, "engine": generate.EngineOptions("vllm", max_length=512, dtype="float32")}
    told = {}
    for name, adapter in (("base", None), ("other", tmp_path / "other"), ("base again", None), ("new", tmp_path / "other")):
        if name == "new":
            assert len(workers) == 1 and workers[0].child.poll() is None
            vllm_engine.end_resting()
            assert workers[0].child.poll() is not None
            monkeypatch.setattr(vllm_engine, "REST_SECONDS", 0.1)
        entries = generate.generate_all(requests(6), model=base, adapter=adapter, log=tmp_path / f"{name}.log", **how)
        told[name] = [e["raw"] for e in entries]
    assert told["other"] == told["new"] != told["base"] == told["base again"] and len(workers) == 2
    workers[1].child.wait(timeout=30)  # nobody came


def test_the_cache_of_vllm_on_a_cpu_holds_all_requests_of_full_length():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(loading.resolve(BASE)).get_text_config()
    a_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values, 16 bits
    assert (
        (vllm_worker.cache_gigabytes(config, 640, 64) - 1) * 2**30
        < a_token * 640 * 64
        <= vllm_worker.cache_gigabytes(config, 640, 64) * 2**30
    )
    assert vllm_worker.cache_gigabytes(config, 6400, 64, dtype="float32") >= 2 * vllm_worker.cache_gigabytes(config, 6400, 64) - 1
    assert vllm_worker.cache_gigabytes(config, 6400, 64) > 5 * vllm_worker.cache_gigabytes(config, 640, 64)


def test_fewer_texts_are_written_at_a_time_where_memory_is_short(monkeypatch):
    for free, wanted in ((8, 64), (24, 128)):
        monkeypatch.setattr(vllm_worker.machine, "memory_gb", lambda free=free: free)
        assert vllm_worker.cpu_requests() == wanted


def test_transformers_holds_each_request_to_its_own_grammar_and_free_text_to_none(tmp_path):
    engine = TransformersEngine(BASE)
    decoding = generate.Decoding(temperature=0.7, top_p=0.95, max_new_tokens=24)
    entries = generate.generate_all(requests(4), model=BASE, log=tmp_path / "log", decoding=decoding, engine=engine)
    free = generate.Request("free", training.prompt_text("Water boils at"), "", 1)
    text = list(engine.generate([free], generate.Decoding(max_new_tokens=12, temperature=0.0, constrained=False)))[0].text
    engine.close()
    assert sum(generate.counts(entries).values()) == 4 and {e["engine"] for e in entries} == {"transformers"}
    firsts = {e["kind"]: e["raw"].split(":")[0] for e in entries}
    assert firsts == {"sts": '{"S1"', "classification": '{"input_text"'}, "each kind has its own first key"
    assert "100" in text and not text.startswith("{")


def test_everything_that_decides_the_text_is_in_the_request_id():
    r, d = generate.Request("a", "text", "sts", 1), generate.Decoding()
    ids = {
        generate.request_id(r, "m", d),
        generate.request_id(r, "m2", d),
        generate.request_id(generate.Request("a", "text!", "sts", 1), "m", d),
        generate.request_id(generate.Request("a", "text", "sts", 2), "m", d),
        generate.request_id(generate.Request("a", "text", "classification", 1), "m", d),
        generate.request_id(r, "m", generate.Decoding(temperature=0.7)),
    }
    assert len(ids) == 6


class Second:
    """An engine that writes a valid record at the second attempt, and for one prompt never."""

    name = "second"

    def __init__(self):
        self.issued = []

    def generate(self, todo, decoding):
        self.issued += todo
        for r in todo:
            good = r.attempt == 2 and not r.id.endswith("never")
            text = '{"S1":"a b","S2":"a c","S3":"d"}' if good else "no json"
            yield engines.Completion(r.id, text, "stop", 5, 5)

    def close(self):
        pass


def test_an_invalid_text_is_asked_for_again_with_its_own_seed_and_not_for_ever(tmp_path, tiny_model):
    items = [generate.Request(i, f"prompt {i}", "sts", 7) for i in ("a", "b", "never")]
    given = dict(model=tiny_model("llama"), log=tmp_path / "log", decoding=generate.Decoding(), attempts=3)
    engine = Second()
    entries = generate.generate_all(items, engine=engine, **given)
    assert [e["status"] for e in entries] == ["ok", "ok", "invalid"] and [e["attempt"] for e in entries] == [2, 2, 3]
    assert len(engine.issued) == 3 + 3 + 1 == len(read_jsonl(tmp_path / "log"))
    assert len({(r.id, r.seed) for r in engine.issued}) == 7, "an attempt repeated a seed"
    again = Second()
    assert generate.generate_all(items, engine=again, **given) == entries and again.issued == []
    assert generate.replay(items, tmp_path / "log", generate.Decoding(), attempts=3) == entries
    first = generate.replay(items, tmp_path / "log", generate.Decoding())
    assert [e["status"] for e in first] == ["invalid"] * 3, "one attempt means the first one"


def test_a_log_of_other_settings_is_kept_and_named_and_not_used(tmp_path, tiny_model, capsys):
    items = [generate.Request("a", "prompt", "sts", 7)]
    given = dict(model=tiny_model("llama"), log=tmp_path / "log")
    generate.generate_all(items, engine=Second(), decoding=generate.Decoding(), **given)
    engine = Second()
    generate.generate_all(items, engine=engine, decoding=generate.Decoding(temperature=0.5), **given)
    assert len(engine.issued) == 1 and len(read_jsonl(tmp_path / "log")) == 2
    assert "log: holds 1 of these records with another prompt, model, decoding or seed; kept, not used" in capsys.readouterr().out


def test_prompts_with_a_common_beginning_follow_each_other():
    texts = ["b 2", "a 1", "b 1", "a 2"]
    ordered = generate.prefix_order([generate.Request(t, t) for t in texts])
    assert [r.text for r in ordered] == ["a 1", "a 2", "b 1", "b 2"]


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match="auto, vllm, transformers or server"):
        engines.choose_engine("magic", 1, 1)


def test_the_grammar_leaves_the_largest_length_to_the_parser():
    for kind in records.KINDS:
        schema, bounded = engines.grammar_schema(kind), records.schema(kind)
        assert {k: v | {"maxLength": records.MAX_CHARS} for k, v in schema["properties"].items()} == bounded["properties"]
        assert all(v == {"type": "string", "minLength": 1} for v in schema["properties"].values())
        values = dict.fromkeys(records.KEYS[kind], "a few words") | {records.KEYS[kind][0]: "x" * (records.MAX_CHARS + 1)}
        outcome = records.parse(json.dumps(values), kind, "stop")
        assert outcome.status == "invalid" and "long" in outcome.reason


class Guide:
    """Bag-of-words vectors: enough to tell a related text from an unrelated one."""

    def encode(self, texts, **_):
        import zlib

        import numpy as np

        out = np.zeros((len(texts), 256))
        for i, t in enumerate(texts):
            for w in judge.words(t):
                out[i, zlib.crc32(w.encode()) % 256] += 1
        return out / np.maximum(1e-9, np.linalg.norm(out, axis=1, keepdims=True))


def test_the_rubric_prefers_a_good_record_to_a_leaking_a_looping_and_a_broken_one():
    p = prompts.synthesis("classification", "Home", "Tell which tool a repair needs.", table="short")
    good = {"input_text": "The rim wobbles and two nipples are loose, so the repair cannot wait any longer than tonight I am afraid, says the mechanic at the desk.", "label": "repair tool spoke wrench", "misleading_label": "cake"}  # fmt: skip
    leak = good | {"input_text": good["input_text"] + " repair tool spoke wrench now"}
    loop = good | {"input_text": "the rim the rim the rim " * 9}
    texts = [json.dumps(x) for x in (leak, good, loop)] + ["{broken"]
    verdict = judge.RubricJudge(Guide()).judge(p, texts)
    assert verdict.best == 1 and verdict.worst == 3
    assert "invalid: not_json" in verdict.reason and "length" in verdict.reason


def test_the_judge_is_asked_about_pairs_whose_order_is_known():
    p = prompts.synthesis("sts", "Home", "", table="short")
    good = '{"S1":"a cat sat on the mat","S2":"a cat sat down on the mat","S3":"rain on the mat"}'
    bad = '{"S1":"rain rain rain rain rain","S2":"a cat","S3":"rain rain rain rain"}'
    row = {"kind": "sts", "task": "", "prompt": p.text}
    rows = [row | {"weak": bad, "answer": good}, row | {"weak": good, "answer": bad}, row | {"weak": good, "answer": good}]
    assert pairs.prefers_revision(judge.RubricJudge(Guide()), rows).tolist() == [1, 0, 0.5]


def test_preference_counts_add_up():
    p = prompts.synthesis("sts", "Home", "", table="short")
    valid = {"raw": '{"S1":"a cat sat","S2":"a cat sat down","S3":"rain"}', "finish_reason": "stop", "status": "ok"}
    broken = {"raw": "{", "finish_reason": "stop", "status": "invalid"}
    made, count = pairs.make_pairs(judge.RubricJudge(Guide()), [(p, [valid, broken]), (p, [broken, broken]), (p, [valid, valid])])
    assert count == {"pairs": 1, "no_valid_candidate": 1, "same_text": 0, "tie": 1} and made[0]["chosen"] == valid["raw"]

"""The benchmarks compare like with like, and say what they leave out."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from trl import import_utils


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark's module by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


def test_ligers_row_is_skipped_in_one_line_without_a_gpu_and_all_others_run(benchmark, monkeypatch, capsys):
    dpo, measured = benchmark("dpo"), []
    monkeypatch.setattr("sys.argv", ["dpo.py", "--quick"])

    def in_process(function, method, *arguments, limit_s):
        measured.append(method)
        return {"status": "ok", "epoch_s": 1.0, "step_s": 1.0, "peak_mb": 1.0, "losses": [0.7]}

    monkeypatch.setattr(dpo.common, "in_process", in_process)
    dpo.main()
    *lines, result = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "trl_liger" in line and "skipped" in line and "need a GPU" in line]
    skipped = [r for r in json.loads(result)["rows"] if r["method"] == "trl_liger"]
    assert measured == ["trl_default", "trl", "trl_precomputed", "ours"] and [r["status"] for r in skipped] == ["skipped"]


@pytest.mark.parametrize("there", (False, True))
def test_on_a_gpu_ligers_row_needs_the_package_that_trl_asks_for(benchmark, monkeypatch, there):
    monkeypatch.setattr(import_utils, "is_liger_kernel_available", lambda: there)
    why = benchmark("dpo").no_liger("cuda")
    assert why == "" if there else "pip install liger-kernel" in why


def test_the_bare_products_are_those_of_the_loss(benchmark, monkeypatch):
    guided_loss, counted = benchmark("guided_loss"), []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: counted.append(a[-1].shape.numel()) or real(*a, **k))
    monkeypatch.setattr(guided_loss, "SLAB", 64 * 16)
    guided_loss.method("sgemm", 64, "cpu")()
    assert len(counted) == 3 * 4 * 4  # and as many additions in place, of four slabs each
    assert guided_loss.work(64) == 16 * 2 * 64 * 64 * guided_loss.DIMENSION


def test_the_training_steps_with_a_token_budget_have_one_loss_and_one_budget(benchmark, tmp_path):
    steps = benchmark("guided_training_step")
    student, guide = (steps.bert(tmp_path / name, seed, "cpu").eval() for seed, name in enumerate(("student", "guide")))
    columns = [[" ".join(steps.WORDS[i * 9 + j : i * 9 + j + 3 + i]) for i in range(5)] for j in range(3)]
    found = {}
    for name in ("ours", "gist", "ours_cached", "cached_gist"):
        loss = steps.loss_for(name, student, guide)
        if "cached" in name:
            assert loss.mini_batch_num_tokens == steps.TOKENS
            loss.mini_batch_num_tokens = 12
        features = [student.preprocess(texts) for texts in columns]
        if name.startswith("ours"):
            features = [f | {"guide_text": texts} for f, texts in zip(features, columns, strict=True)]
        found[name] = float(loss(features, None).detach())
    assert list(found.values()) == pytest.approx([found["gist"]] * 4, rel=1e-4)

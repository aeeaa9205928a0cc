"""What a profile needs of GPUs is told before it runs, and what does not fit is refused with the value to change."""

import json

import pytest

from speed_core import __main__
from speed_core.files import UserError
from speed_core.runner import preflight
from speed_core.study import gpu_plan
from speed_core.study.runs import open_run


@pytest.fixture
def paper(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return lambda **changes: open_run("paper", {k.replace("__", "."): v for k, v in changes.items()})


def test_the_papers_sizes_fit_eight_gpus_of_80_gb(paper, capsys):
    preflight.dry_run(paper(), 8, 80)
    said = capsys.readouterr().out
    for stage in (
        "03 junior: 46.1 GB = weights 15.0",
        "04 senior: ",
        "05 revisor: ",
        "06 raw to revised",
        "08 embedder-guided-0 to",
    ):
        assert f"\n  {stage}" in said, said
    assert "room for 115 texts of 4096 tokens" in said
    assert "generation.executor=ray and generation.workers=8 use all" in said and "\ndisk: " in said
    assert said.count("no measured rate, so ") == 2  # until `make gpu-check` has run somewhere


def test_what_does_not_fit_names_the_arithmetic_and_a_value_that_does(paper):
    _, (problem,) = gpu_plan.report(paper(revisor__micro_batch=3), 8, 80)
    assert problem.startswith("revisor: 114.4 GB = weights 15.0 + ") and "and 73.6 GB of a GPU are usable" in problem
    assert problem.endswith("; set revisor.micro_batch=1")
    _, problems = gpu_plan.report(paper(), 8, 40)
    changes = [p.rpartition("; set ")[2] for p in problems]
    assert changes[1] == "senior.gradient_checkpointing=true"
    given = {name: json.loads(value) for change in changes for name, _, value in [change.partition("=")]}
    assert gpu_plan.report(paper(**{k.replace(".", "__"): v for k, v in given.items()}), 8, 40)[1] == []


def test_gpus_that_do_not_divide_a_batch_and_models_that_fit_nowhere_are_refused(paper):
    _, problems = gpu_plan.report(paper(), 7, 80)
    assert "junior.batch 16 is no multiple of 7 GPUs x junior.micro_batch 1; set junior.batch=21" in problems
    assert "embedding.batch 1536 is no multiple of 7 GPUs; set embedding.batch=1540" in problems
    _, problems = gpu_plan.report(paper(), 8, 16)
    assert any(p.startswith("generation: ") and p.endswith("take GPUs with more memory or a smaller model") for p in problems)
    padded = paper(generation__engine="transformers")
    _, (problem,) = gpu_plan.report(padded, 8, 80)
    fits = int(problem.rpartition("set generation.batch_size=")[2])
    assert gpu_plan.report(paper(generation__engine="transformers", generation__batch_size=fits), 8, 80)[1] == []


def test_a_budget_that_the_calls_exceed_is_refused(paper):
    with pytest.raises(UserError, match="teacher.max_calls 9,000: 25,000 seed calls; set teacher.max_calls=25000; then"):
        preflight.dry_run(paper(teacher__max_calls=9000), 8, 80)
    with pytest.raises(UserError, match="20,000 judge calls cost about 240 USD; set teacher.max_usd=240"):
        preflight.dry_run(paper(teacher__max_usd=150.0), 8, 80)


def test_rates_of_a_gpu_check_take_the_place_of_the_assumed_ones(paper, tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(gpu_plan, "ROOT", tmp_path)
    about = {"machine": {"gpu": "H200"}, "written": "2026-01-01"}
    rows = [{"method": "plain cross-entropy", "layers": 8, "rows": 8, "tokens": 512, "step_s": 9.0}]
    rows += [
        {"method": "completion tokens only", "layers": 8, "rows": 8, "tokens": 512, "step_s": 0.1},
        {"failed": "out of memory"},
    ]
    (results / "sft.cuda.json").write_text(json.dumps({"benchmark": "gpu_check sft", "rows": rows, **about}))
    done, said = gpu_plan.rate("sft")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096  # parameters of one of LLaMA-3-8B
    assert done == pytest.approx(4 * (8 * layer + 4096) * 8 * 512 / 0.1)
    assert said == "286 TFLOP/s were measured on H200, 2026-01-01"
    assert gpu_plan.rate("generation")[1].startswith("no measured rate")
    text, _ = gpu_plan.report(paper(), 8, 80, tokens_per_second=2500)
    assert "were measured on H200" in text and "2,500 tokens/s of a GPU, as given" in text


def test_gpus_without_their_memory_are_asked_for_it(paper):
    with pytest.raises(UserError, match="--gpus and --gpu-gb belong together"):
        __main__.plan(profile="smoke", gpus=8, gpu_gb=0.0, only="", start="", set_=None, why="", seed=None, tokens_per_second=0.0)

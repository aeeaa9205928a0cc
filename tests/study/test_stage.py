"""The registry: what a run can make, read from the declarations alone."""

import json
from types import SimpleNamespace

import pytest

from bundle import models_read_later
from speed_core.files import UserError
from speed_core.models import launch
from speed_core.store.artifacts import Artifact
from speed_core.study import (
    ablation_stages,
    embedding_stages,
    generation_stages,
    planning,
    score_stages,
    student_stages,
    synthesis_stages,
)  # fmt: skip
from speed_core.study.runs import open_run
from speed_core.study.stage import FACTS, STAGES, Kind, find, planned, rebuilt, trained_generators


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return open_run("smoke")


def test_each_artifact_is_declared_once_and_every_input_is_one(run):
    names = [one.name for one in planned(run)]
    assert len(names) == len(set(names)) > 60 and not set(names) & set(FACTS)
    assert all(set(one.reads(run)) <= set(names) for one in planned(run))
    assert all(one.notebook <= two.notebook for one in planned(run) for two in planned(run) if one.name in two.reads(run))


def test_every_declared_stage_is_called_by_the_function_that_is_named_in_its_module():
    modules = (generation_stages, synthesis_stages, ablation_stages, embedding_stages, student_stages, score_stages)
    for one in STAGES:
        assert any(one in vars(module).values() for module in modules), one.name


def test_generators_and_what_a_replay_rebuilds_follow_from_the_kinds(run):
    assert trained_generators() == ["junior", "senior", "revisor"]
    found = set(rebuilt(run))
    assert {"tasks", "pairs", "raw", "synthetic-jr"} <= found and not {"junior", "revisions", "embedder-jr-0"} & found
    assert models_read_later(run) == ["junior", "senior", "revisor", "embedder-guided-0", "embedder-plain-0"]
    assert "revisions" in rebuilt(open_run("smoke", {"teacher.kind": "openai", "teacher.model": "m"}))


def test_a_stage_makes_what_is_missing_once_and_the_plan_then_finds_it_current(run, capsys):
    assert planning.stale(run, ["tasks", "seeds"]) == ["tasks: not made yet", "seeds: not made yet"]
    generation_stages.brainstorm(run)
    made = generation_stages.seed_data(run)
    assert made.name == "seeds" and list(made.manifest["parents"]) == ["tasks"] and find(run, "seeds").kind is Kind.TEACHER
    assert capsys.readouterr().out.count("making it") == 2
    assert planning.stale(run, ["tasks", "seeds"]) == [] and generation_stages.seed_data(run).digest == made.digest
    fewer = open_run("smoke", {"seeds": 4})
    assert planning.stale(fewer, ["seeds"])[0].startswith("seeds: prompts ")
    assert "making it" not in capsys.readouterr().out


def test_why_tells_what_an_artifact_is_made_from_and_by_whom(run):
    generation_stages.brainstorm(run)
    lines = planning.why_text(run, "seeds").splitlines()
    assert lines[0] == "seeds: answers of the teacher, of notebook 02, declared as 'seeds' in speed_core.study.generation_stages"
    assert lines[1] == "  not made yet" and lines[2].startswith("  reads tasks: ") and lines[3].startswith("  parameters {")
    assert "not known yet: artifact 'root'" in planning.why_text(run, "pairs")
    with pytest.raises(UserError, match="'seed': no stage of profile smoke"):
        planning.why_text(run, "seed")


def test_the_plan_goes_on_with_an_artifact_that_a_budget_left_partial(run):
    made = generation_stages.brainstorm(run)
    manifest = made.path / "manifest.json"
    manifest.write_text(json.dumps(made.manifest | {"partial": "3 of 12 prompts have no answer"}))
    assert planning.stale(run, ["tasks"]) == ["tasks: partial, 3 of 12 prompts have no answer"]
    assert planning.stale(open_run("smoke", {"teacher.accept_partial": True}), ["tasks"]) == []


def test_when_a_checkpoint_is_written_makes_no_training_stale(tmp_path, run):
    names = ("junior", "senior", "revisor", "embedding")
    often = open_run("smoke", {f"{name}.save_steps": 5 for name in names})
    for name, read in (("junior", 1), ("senior", 2), ("revisor", 0), ("embedder-plain-0", 1)):
        one = find(run, name)
        before, now = (one.stage.parameters(r, *[None] * read, **one.keys) for r in (run, often))
        earlier = before | {"training": before["training"] | {"save_steps": 10}}
        assert before == now and Artifact(tmp_path / name, {"parameters": earlier}).other_parameters(now) == []


def test_every_training_but_the_students_goes_through_the_launcher(monkeypatch, tmp_path, run):
    from speed_core.contrastive import train as contrastive
    from speed_core.generation import sft
    from speed_core.preference import dpo

    seen = []
    monkeypatch.setattr(
        launch, "train", lambda function, how, folder, **given: seen.append((function, folder.name, given["seed"]))
    )
    draft, read = SimpleNamespace(info={}, path=tmp_path), SimpleNamespace(rows=lambda name="": [], weights=lambda: tmp_path)
    generation_stages.junior.write(run, draft, read)
    generation_stages.senior.write(run, draft, read, read)
    generation_stages.revisor.write(run, draft)
    embedding_stages.embedder.write(run, draft, read, arm="plain", seed=3)
    assert seen == [
        (sft.train, "junior", 0),
        (dpo.train, "senior", 0),
        (sft.train, "revisor", 0),
        (contrastive.train_embedder, "embedder-plain-3", 3),
    ]


@pytest.mark.slow
def test_a_stage_that_two_processes_made_is_current_for_one(monkeypatch, tmp_path, tiny_model, capsys):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    values = {
        "models.generator": tiny_model("llama"),
        "junior.micro_batch": 1,
        "junior.max_length": 4096,
        "junior.dtype": "float32",
    }
    run = open_run("smoke", values | {"training.processes": 2})
    generation_stages.brainstorm(run)
    generation_stages.seed_data(run)
    made = generation_stages.junior(run)
    said = capsys.readouterr().out
    assert "junior: 100%" in said and (run.folder / "workers" / "junior" / "process-1.log").is_file()
    assert made.json("training.json")["rows"] > 0 and (made.weights() / "adapter_model.safetensors").is_file()
    assert generation_stages.junior(open_run("smoke", values)).digest == made.digest
    assert "making it" not in capsys.readouterr().out

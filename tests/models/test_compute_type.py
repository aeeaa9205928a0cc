"""The compute type: chosen for the machine, an explicit one wins, and artifacts are compared by it."""

import json

import pytest
import torch

from speed_core import machine
from speed_core import profile as profiles
from speed_core.contrastive import embedder
from speed_core.evaluation.encoder import load_encoder
from speed_core.files import UserError
from speed_core.models import compute_type, loading, training
from speed_core.store.artifacts import Store


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A function that pretends to be a processor: with AMX or not, and how fast bfloat16 is on it."""
    monkeypatch.setenv("SPEED_CACHE", str(tmp_path))
    measured = []

    def pretend(amx: bool, ratio: float = 1.0):
        compute_type.remembered_speedup.cache_clear()
        monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
        monkeypatch.setattr(machine, "has_amx", lambda: amx)
        monkeypatch.setattr(compute_type, "speedup", lambda: measured.append(ratio) or ratio)
        return measured

    yield pretend
    compute_type.remembered_speedup.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends to be a GPU with bfloat16 or without."""

    def pretend(native: bool):
        monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
        monkeypatch.setattr(compute_type, "_gpu", lambda: ("Tesla T4", native))

    return pretend


def test_a_processor_without_amx_computes_in_float32_and_nothing_is_measured(processor):
    measured = processor(amx=False)
    assert compute_type.choose().name == "float32" and "no AMX" in compute_type.choose().why
    assert measured == []


@pytest.mark.parametrize(("ratio", "name"), [(3.2, "bfloat16"), (2.0, "bfloat16"), (1.9, "float32"), (0.5, "float32")])
def test_with_amx_bfloat16_has_to_be_twice_as_fast(processor, ratio, name):
    processor(amx=True, ratio=ratio)
    assert compute_type.choose().name == name


def test_a_machine_decides_once_and_remembers_it(processor):
    measured = processor(amx=True, ratio=3.0)
    assert compute_type.choose().name == "bfloat16"
    processor(amx=True, ratio=1.0)  # another process of the same machine, at a bad moment
    assert compute_type.choose().name == "bfloat16" and measured == [3.0]


def test_limits_of_the_libraries_are_another_machine(processor, monkeypatch):
    processor(amx=True, ratio=3.0)
    assert compute_type.choose().name == "bfloat16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    processor(amx=True, ratio=0.1)
    assert compute_type.choose().name == "float32"


def test_an_explicit_type_wins(processor):
    processor(amx=False)
    assert compute_type.choose("bfloat16", training=True).name == "bfloat16"
    assert compute_type.choose("bfloat16").why == "as the profile says"


def test_a_gpu_takes_bfloat16_where_it_has_it_and_an_older_one_float16(gpu):
    gpu(native=True)
    assert compute_type.choose().name == "bfloat16"
    gpu(native=False)
    assert (compute_type.choose().name, compute_type.choose().weights) == ("float16", "float16")
    training = compute_type.choose(training=True)
    assert (training.name, training.weights) == ("float16", "float32")


def test_an_older_gpu_computes_models_in_float32_that_overflow_in_float16(gpu, tiny_model):
    gpu(native=False)
    chosen = compute_type.choose(training=True, folder=tiny_model("gemma3"))
    assert (chosen.name, chosen.weights) == ("float32", "float32") and "overflows in float16" in chosen.why
    assert compute_type.choose(folder=tiny_model("llama")).name == "float16"


def test_a_damaged_note_of_what_was_measured_is_measured_again(processor, tmp_path):
    (tmp_path / "compute_type.json").write_text("{")
    processor(amx=True, ratio=3.0)
    assert compute_type.choose().name == "bfloat16" and "3.0" in (tmp_path / "compute_type.json").read_text()


def test_an_unusable_type_is_one_line_with_a_remedy(processor, gpu):
    processor(amx=False)
    with pytest.raises(UserError, match="dtype 'int8': unknown; use one of auto"):
        compute_type.choose("int8")
    with pytest.raises(UserError, match="training in it needs an NVIDIA GPU; use float32"):
        compute_type.choose("float16", training=True)
    gpu(native=False)
    with pytest.raises(UserError, match="Tesla T4 does not compute in it; use float16"):
        compute_type.choose("bfloat16")


@pytest.mark.parametrize("part", ["generation", "junior", "senior", "revisor", "embedding"])
def test_auto_is_the_default_of_every_profile_and_another_word_is_refused(part):
    assert {getattr(profiles.load(name), part).dtype for name in profiles.names()} == {"auto"}
    with pytest.raises(UserError, match=f"'{part}.dtype'.*'auto', 'float32'.*'float64'"):
        profiles.load("smoke", {f"{part}.dtype": "float64"})


def test_autocast_follows_the_type_of_a_gpu(gpu, tmp_path):
    settings = profiles.load("smoke").embedding
    gpu(native=False)
    arguments = training.trainer_arguments(settings, 0, tmp_path)
    assert arguments["fp16"] and not arguments["bf16"]


@pytest.mark.parametrize("asked", ["bfloat16", "float32"])
def test_an_explicit_type_reaches_every_model_that_is_loaded(tiny_model, asked):
    wanted, folder = getattr(torch, asked), tiny_model("llama")
    loaded = [
        loading.load_causal_lm(folder, dtype=asked),
        embedder.build_embedder(folder, 32, asked),
        load_encoder(folder, "untrained", instructed=False, dtype=asked).model,
        load_encoder("package:all-MiniLM-L6-v2", "untrained", instructed=False, dtype=asked).model,
    ]
    assert [{p.dtype for p in m.parameters()} for m in loaded] == [{wanted}] * 4


def test_merged_weights_keep_the_type_of_their_file(tiny_model):
    assert next(loading.load_causal_lm(tiny_model("llama"), dtype="stored").parameters()).dtype == torch.float32
    assert next(loading.load_causal_lm("package:gemma-3-270m", dtype="stored").parameters()).dtype == torch.bfloat16


def made(tmp_path, dtype: str, computed: str) -> Store:
    store = Store(tmp_path)
    with store.stage("junior", {"training": {"lr": 1, "dtype": dtype}}) as draft:
        draft.info |= compute_type.facts(computed)
    return store


def test_a_manifest_says_type_and_instructions(tmp_path):
    made(tmp_path, "auto", "float32")
    said = json.loads((tmp_path / "junior" / "manifest.json").read_text())
    assert said["compute_type"] == "float32" and said["instructions"] == machine.instructions()


@pytest.mark.parametrize(
    ("then", "computed", "now", "stale"),
    [
        ("auto", "bfloat16", "auto", ""),  # another machine made it
        ("bfloat16", "bfloat16", "auto", ""),
        ("auto", "float32", "float32", ""),
        ("auto", "float32", "bfloat16", "training.dtype float32 -> bfloat16"),
        ("bfloat16", "bfloat16", "float32", "training.dtype bfloat16 -> float32"),
    ],
)
def test_auto_takes_an_artifact_of_any_type_and_an_explicit_type_only_its_own(tmp_path, then, computed, now, stale):
    store = made(tmp_path, then, computed)
    assert store.why_stale("junior", {"training": {"lr": 1, "dtype": now}}) == stale

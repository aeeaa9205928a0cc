"""Models of a notebook, several at a time: real students of the smoke size in real processes."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from speed_core import machine
from speed_core.files import UserError
from speed_core.runner import parallel
from speed_core.study import generation_stages
from speed_core.study.runs import open_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A smoke run with its seed examples, ready for notebook 07b."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEED_RUNS", "runs")  # relative to where a notebook runs, which is not where the package lies
    monkeypatch.delenv("SPEED_WORKERS", raising=False)
    run = open_run("smoke")
    generation_stages.brainstorm(run)
    generation_stages.seed_data(run)
    return run


def test_there_are_as_many_processes_as_cores_and_memory_allow_and_one_on_a_gpu(monkeypatch):
    for name in ("SPEED_WORKERS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel.machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(parallel.machine, "cores", lambda: 8)
    found = []
    for free in (3, 13, 30, 500):
        monkeypatch.setattr(parallel.machine, "memory_gb", lambda free=free: free)
        found.append(parallel.workers())
    assert found == [1, 1, 4, 8]
    monkeypatch.setattr(parallel.machine, "device", lambda: torch.device("cuda"))
    assert parallel.workers() == 1
    monkeypatch.setattr(parallel.machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")  # of threads in threads the first counts
    assert parallel.workers() == 1
    monkeypatch.setenv("SPEED_WORKERS", "3")
    assert parallel.workers() == 3
    for said in ("many", "0", "\u00b2"):
        monkeypatch.setenv("SPEED_WORKERS", said)
        with pytest.raises(UserError, match=f"SPEED_WORKERS '{said}': not a whole number"):
            parallel.workers()


def test_free_memory_is_what_a_containers_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = machine.memory_gb()
    for name, text in {
        "memory.max": "max",
        "memory.current": str(2**30),
        "memory.stat": f"anon 5\ninactive_file {2**28}\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert machine.memory_gb() == pytest.approx(free, rel=0.2), "no limit"
    (tmp_path / "memory.max").write_text(str(3 * 2**29))
    assert machine.memory_gb() == pytest.approx(0.75)


def test_each_model_is_followed_by_its_scores_and_what_is_current_is_left_out(run):
    found = parallel.chains(run, "07b")
    assert ["student-1-guided-0", "scores-student-1-guided-0"] in found and ["scores-guide-topic"] in found
    assert parallel.chains(run, "01") == []


def test_two_processes_make_what_the_notebook_then_finds(run, monkeypatch, capsys):
    monkeypatch.setenv("SPEED_WORKERS", "2")
    wanted = [
        ["student-1-uncovered-0", "scores-student-1-uncovered-0"],
        ["student-1-covered-0"],
        ["student-1-plain-0"],
        ["scores-guide-topic"],
    ]
    chains = parallel.chains
    everything = chains(run, "07b")
    monkeypatch.setattr(parallel, "chains", lambda run, notebook: wanted)
    assert parallel.make(run, "07b") == 5
    left = chains(run, "07b")
    assert len(left) == len(everything) - 2 and ["scores-student-1-covered-0"] in left
    assert {run.store.need(c[0]).manifest["beside"] for c in wanted} == {2}
    assert "5 models and scores, 2 at a time" in capsys.readouterr().out


def test_a_stage_that_fails_is_named_with_its_reason_and_the_log(run, monkeypatch):
    monkeypatch.setenv("SPEED_WORKERS", "2")
    monkeypatch.setattr(parallel, "chains", lambda run, notebook: [[f"embedder-{a}-0"] for a in ("guided", "plain", "jr", "sr")])
    with pytest.raises(
        UserError, match=r"embedder-\w+-0: artifact 'synthetic': not in .*all that it said is in smoke/workers/08-\d.log"
    ):
        parallel.make(run, "08")


def test_when_one_process_fails_the_others_are_stopped_in_the_middle(run, monkeypatch):
    monkeypatch.setenv("SPEED_WORKERS", "2")
    students = [f"student-1-{arm}-0" for arm in ("guided", "plain", "weak", "margin", "labelled", "both", "uncovered", "covered")]
    # A pair for each process, so that one works on the students while the other fails.
    monkeypatch.setattr(parallel, "chains", lambda run, notebook: [students, ["embedder-guided-0"], [], []])
    with pytest.raises(UserError, match=r"embedder-guided-0: artifact 'synthetic': not in"):
        parallel.make(run, "08")
    assert run.store.made(students[-1]) is None


ORPHANS = """
import os, sys
from speed_core.runner import parallel
from speed_core.study.runs import open_run
students = [f"student-1-{arm}-0" for arm in ("guided", "plain", "weak", "margin", "labelled", "both", "uncovered", "covered")]
parallel.chains = lambda run, notebook: [students[:4], students[4:], [], []]
parallel.make(open_run("smoke"), "07b")
"""


def test_processes_whose_parent_is_gone_end_in_the_middle_of_their_stages(run, monkeypatch):
    monkeypatch.setenv("SPEED_WORKERS", "2")
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        logs = [run.folder / "workers" / f"07b-{k}.log" for k in (0, 1)]
        while not all(log.is_file() and "making it" in log.read_text() for log in logs):
            assert parent.poll() is None
            time.sleep(0.2)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) >= 2 and not alive and run.store.made("student-1-covered-0") is None


def test_a_process_that_is_killed_ends_the_others_and_says_what_may_be_the_reason(run, monkeypatch):
    monkeypatch.setenv("SPEED_WORKERS", "2")
    students = [f"student-1-{arm}-0" for arm in ("guided", "plain", "weak", "margin")]
    monkeypatch.setattr(parallel, "chains", lambda run, notebook: [students[:2], students[2:], [], []])
    log = run.folder / "workers" / "07b-0.log"

    def kill():
        while not (log.is_file() and "making it" in log.read_text()):
            time.sleep(0.2)
        open_by = [
            p for p in psutil.Process().children(recursive=True) if str(log.resolve()) in os.readlink(f"/proc/{p.pid}/fd/1")
        ]
        open_by[0].kill()

    threading.Thread(target=kill).start()
    with pytest.raises(UserError, match="notebook 07b: a process ended in the middle .* SPEED_WORKERS=1"):
        parallel.make(run, "07b")

"""Models of a notebook made at the same time, each by one of a few processes with its share of the cores.

A second thread gains a training of this size little. On two cores (gemma-3-270m with LoRA, 168 records) a training takes 85 s
alone with two threads, and with one thread 130 s beside another point of a sweep, so 65 s of the machine; scoring a model 43 s
and 60 s, so 30. So a notebook hands the models that it is about to make, and their scores, to processes like this one; what
it calls afterwards finds them made. On a GPU, or with memory for one process only, nothing happens. How many threads a training
has changes the last digits of its numbers, as another machine does.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from functools import lru_cache
from pathlib import Path

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor, process_executor

from speed_core import console, machine
from speed_core.files import UserError
from speed_core.models import launch
from speed_core.store.run_context import Run
from speed_core.study import planning
from speed_core.study.runs import reopen
from speed_core.study.stage import SIDE_BY_SIDE, Kind, find

GB_EACH = 7  # of free memory; a process that has trained and scored several models was seen to take 6.6


def make(run: Run, notebook: str) -> int:
    """Make the models and scores of `notebook` that are not current, several at a time; returns how many were handed over.

    $SPEED_WORKERS says how many processes; without it, as many as the cores of this process (or $OMP_NUM_THREADS) and the free
    memory allow. With one, or nothing to gain, it returns 0 and the notebook makes them itself. Raises UserError as soon as a
    stage fails; the other processes are stopped, and what they had finished stays.
    """
    machine.end_idle()
    most = 1 if launch.processes(run.profile.training) > 1 else workers()  # each training takes the cores itself
    work = chains(run, notebook) if most > 1 and not run.replay else []
    count = min(len(work) // 2, most)  # each takes 15 s to start, which two models at least have to pay for
    if count < 2:
        return 0
    logs = run.folder / "workers"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob(f"{notebook}-*.log"):
        old.unlink()
    total, where = sum(map(len, work)), f"{run.folder.name}/{logs.name}/"
    print(f"{total} models and scores, {count} at a time; what they say is in {where}", flush=True)
    told = {"profile": run.profile.model_dump_json(), "variant": run.folder.name if run.point else "", "count": count}
    bar = console.progress(total, f"notebook {notebook}", "stage")
    try:
        with parallel_config("loky", n_jobs=count, inner_max_num_threads=max(1, _cores() // count)):
            named = ((chain, logs / f"{notebook}-{k}.log") for k, chain in enumerate(work))
            jobs = [delayed(_make)(chain, parent=os.getpid(), log=log, **told) for chain, log in named]
            for made in Parallel(return_as="generator_unordered", pre_dispatch=count, batch_size=1)(jobs):
                bar.update(made)
    except process_executor.TerminatedWorkerError:
        raise UserError(
            f"notebook {notebook}: a process ended in the middle of its work, perhaps for memory; what it said is in {where}; "
            "SPEED_WORKERS=1 makes one model at a time"
        ) from None
    finally:
        bar.close()
        get_reusable_executor().shutdown(wait=True, kill_workers=True)  # idle ones would hold their memory
    return total


def _make(chain: list[str], *, profile: str, variant: str, count: int, parent: int, log: Path) -> int:
    """What a process does: make the stages of a chain; returns how many. All that it prints is in `log`."""
    _end_with(parent)
    with log.open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    os.environ["SPEED_BESIDE"] = str(count)  # for the manifests
    # Else loky replaces a process that holds 300 MB more than after its first model.
    process_executor._MAX_MEMORY_LEAK_SIZE = 2**40
    console.quiet()
    run = reopen(profile, variant)
    for name in chain:
        one = find(run, name)
        assert one is not None
        try:
            one.make(run)
        except Exception as error:  # whatever it is, the notebook shows one line, and the log has the rest
            traceback.print_exc()
            told = error if isinstance(error, UserError) else repr(error)
            raise UserError(f"{name}: {told}; all that it said is in {Path(*log.parts[-3:])}") from None
    return len(chain)


@lru_cache(maxsize=1)
def _end_with(parent: int) -> None:
    """End this process, in the middle of a stage too, when the one that began it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def workers() -> int:
    """How many processes may work at a time, at least one."""
    if said := os.environ.get("SPEED_WORKERS", ""):
        return _positive("SPEED_WORKERS", said)
    if machine.device().type != "cpu":
        return 1
    return max(1, min(_cores(), int(machine.memory_gb() // GB_EACH)))


def _cores() -> int:
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": threads in threads
    return _positive("OMP_NUM_THREADS", said) if said else machine.cores()


def _positive(name: str, said: str) -> int:
    if not said.strip().isdecimal() or not int(said):
        raise UserError(f"{name} {said!r}: not a whole number from 1 on; set another or take it out of the environment")
    return int(said)


def chains(run: Run, notebook: str) -> list[list[str]]:
    """The stages of a notebook that train or score a model and are not current: one list for each model, its training first."""
    why = planning.Reasons(run)
    found: dict[str, list[str]] = {}
    for one in why.known.values():
        if one.notebook == notebook and one.kind in SIDE_BY_SIDE:
            model = one.reads(run)[0] if one.kind is Kind.SCORES and one.reads(run) else one.name
            reason, follows = why.of(one.name)
            if reason and (not follows or model in found):
                found.setdefault(model, []).append(one.name)
    return list(found.values())

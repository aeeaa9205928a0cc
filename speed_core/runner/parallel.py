"""Models of a notebook made at the same time, each by one of a few processes with its share of the cores.

A second thread gains a training of this size little. On two cores (gemma-3-270m with LoRA, 168 records) a training takes 85 s
alone with two threads, and with one thread 130 s beside another point of a sweep, so 65 s of the machine; scoring a model 43 s
and 60 s, so 30. So a notebook hands the models that it is about to make, and their scores, to processes like this one; what
it calls afterwards finds them made. On a GPU, or with memory for one process only, nothing happens. How many threads a training
has changes the last digits of its numbers, as another machine does.

The child runs as `python -m speed_core.runner.parallel FD`: the run comes in on stdin, then a JSON list of stages a line;
what became of each leaves on a pipe. It ends when stdin closes, in the middle of a stage too: then its parent is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from speed_core import console, machine
from speed_core.files import UserError
from speed_core.store.run_context import ROOT, Run
from speed_core.study import planning
from speed_core.study.runs import reopen
from speed_core.study.stage import SIDE_BY_SIDE, Kind, planned

GB_EACH = 7  # of free memory; a process that has trained and scored several models was seen to take 6.6


def make(run: Run, notebook: str) -> int:
    """Make the models and scores of `notebook` that are not current, several at a time; returns how many were handed over.

    $SPEED_WORKERS says how many processes; without it, as many as the cores of this process (or $OMP_NUM_THREADS) and the free
    memory allow. With one, or nothing to gain, it returns 0 and the notebook makes them itself. Raises UserError as soon as a
    stage fails; the other processes are stopped, and what they had finished stays.
    """
    machine.end_idle()
    most = workers()
    work = chains(run, notebook) if most > 1 and not run.replay else []
    count = min(len(work) // 2, most)  # each takes 15 s to start, which two models at least have to pay for
    if count < 2:
        return 0
    names = [name for chain in work for name in chain]
    print(
        f"{len(names)} models and scores, {count} at a time; what each process says is in {run.folder.name}/workers/", flush=True
    )
    waiting, bar = deque(work), console.progress(len(names), f"notebook {notebook}", "stage")
    children: list[Child] = []
    try:
        with ThreadPoolExecutor(count) as pool:
            try:
                children += [Child(run, notebook, k, count) for k in range(count)]
                served = [pool.submit(child.serve, waiting, bar) for child in children]
                for done in wait(served, return_when=FIRST_EXCEPTION).done:
                    done.result()
            except BaseException:  # one failed, or this process was interrupted
                waiting.clear()
                for child in children:
                    child.process.kill()
                raise
    finally:
        for child in children:
            child.close()
        bar.close()
    return len(names)


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
            model = one.inputs(run)[0] if one.kind is Kind.SCORES and one.inputs(run) else one.name
            reason, follows = why.of(one.name)
            if reason and (not follows or model in found):
                found.setdefault(model, []).append(one.name)
    return list(found.values())


class Child:
    """One process, and what it is told and tells."""

    def __init__(self, run: Run, notebook: str, number: int, count: int):
        self.log = run.folder / "workers" / f"{notebook}-{number}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Same folder as here, so that relative paths in the environment mean the same.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        given = {"OMP_NUM_THREADS": str(max(1, _cores() // count)), "SPEED_BESIDE": str(count), "PYTHONPATH": path}
        read, write = os.pipe()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "speed_core.runner.parallel", str(write)],
                stdin=subprocess.PIPE, stdout=out, stderr=out, pass_fds=(write,), env=os.environ | given,
            )  # fmt: skip
        os.close(write)
        self.replies = os.fdopen(read, encoding="utf-8")
        variant = run.folder.name if run.folder.parent.name == "variants" else ""
        self._say({"profile": run.profile.model_dump_json(), "variant": variant})

    def _say(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def serve(self, waiting: deque[list[str]], bar: Any) -> None:
        """Take lists of stages until none is left; UserError with the child's own words when one fails."""
        while True:
            try:
                chain = waiting.popleft()
            except IndexError:
                return
            with suppress(BrokenPipeError):  # the missing reply says it
                self._say(chain)
            for name in chain:
                reply = json.loads(self.replies.readline() or "{}")
                if reply.get("made") != name:
                    waiting.clear()
                    raise UserError(
                        f"{name}: {reply.get('error') or self._ended()}; all that it said is in {Path(*self.log.parts[-3:])}"
                    )
                bar.update()

    def _ended(self) -> str:
        return (
            f"its process ended with status {self.process.wait()} (-9: killed, perhaps for memory; "
            "SPEED_WORKERS=1 makes one model at a time)"
        )

    def close(self) -> None:
        """End the process, which is waiting or dead."""
        with suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        self.process.wait()
        self.replies.close()


def _feed(jobs: SimpleQueue[Sequence[str]]) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


def main() -> None:
    """What the child does."""
    out = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1)
    told = json.loads(sys.stdin.readline())
    jobs: SimpleQueue[Sequence[str]] = SimpleQueue()
    threading.Thread(target=_feed, args=(jobs,), daemon=True).start()
    console.quiet()
    run = reopen(told["profile"], told["variant"])
    known = {one.name: one for one in planned(run)}
    while True:
        for name in jobs.get():
            try:
                known[name].make(run)
            except Exception as error:
                traceback.print_exc()
                out.write(json.dumps({"error": str(error) if isinstance(error, UserError) else repr(error)}) + "\n")
                break
            out.write(json.dumps({"made": name}) + "\n")


if __name__ == "__main__":
    main()

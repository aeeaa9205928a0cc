"""kill -9 at 50 random moments: the published artifact is the same, and only what was in flight is paid for twice."""

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
from tqdm import tqdm

from speed_core import files
from speed_core.files import read_jsonl, write_jsonl
from speed_core.generation import engines, generate
from speed_core.store.artifacts import Store

REQUESTS = [generate.Request(f"r{i:03}", f"prompt {i} with \u2028 and \u00e9", "sts", i) for i in range(40)]
DECODING = generate.Decoding(max_new_tokens=50)


class Paid:
    """An engine whose texts follow from the request; every answer is noted in a file before it is handed over."""

    name = "paid"

    def __init__(self, bill):
        self.bill = bill

    def generate(self, requests, decoding):
        for r in requests:
            word = hashlib.sha256(f"{r.text}{r.seed}".encode()).hexdigest()
            # Every fifth text is cut, every seventh is no record: both are outcomes and published like any other.
            record = {"S1": f"a {word[:6]}", "S2": f"b {word[6:12]}", "S3": "c"}
            text = json.dumps(record) if r.seed % 7 else "no json"
            with self.bill.open("a") as f:
                f.write(r.id + "\n")
            time.sleep(0.0005)
            yield engines.Completion(r.id, text, "length" if r.seed % 5 == 4 else "stop", 10, 20)

    def close(self):
        pass


def work(folder, slow):
    """The stage: answer what the log lacks, then publish."""
    if slow:
        stretch()
    store = Store(folder / "artifacts")
    store.recover()
    with store.stage("raw", {"prompts": "x"}) as draft:
        if draft:
            entries = generate.generate_all(
                REQUESTS, model=str(folder.parent / "model"), log=folder / "log.jsonl", decoding=DECODING, engine=Paid(folder / "bill")
            )  # fmt: skip
            write_jsonl(draft.file("data.jsonl"), entries)
            draft.info["outcomes"] = generate.counts(entries)
    return store.need("raw")


def stretch():
    """Make every short moment long enough to be hit: halves of a line, and the time around each rename."""
    replace, append = os.replace, files.AppendLog.append

    def slow_replace(a, b):
        time.sleep(0.003)
        replace(a, b)
        time.sleep(0.003)

    def torn_append(self, entry):
        line = (json.dumps(entry, ensure_ascii=True) + "\n").encode()
        half, place = len(line) // 2, self._file.seek(0, os.SEEK_END)
        self._file.write(line[:half])
        time.sleep(0.0005)
        self._file.write(line[half:])
        self.entries.places[entry["id"]] = place

    os.replace, files.AppendLog.append = slow_replace, torn_append
    assert append is not torn_append


def killed(folder, delay):
    """True when the child was killed before it finished."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # tqdm's lock is a semaphore that forked processes share: a child killed while it holds it stops everybody.
            tqdm.set_lock(threading.RLock())
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(folder, slow=True)
            code = 0
        finally:
            os._exit(code)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the stage failed after an earlier kill"
    return os.WIFSIGNALED(status)


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "whole").mkdir()
    return work(tmp_path / "whole", slow=False)


@pytest.mark.slow
def test_fifty_kills_change_nothing_and_pay_nothing_twice_but_what_was_in_flight(tmp_path, whole, capsys):
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 50:
        folder = tmp_path / f"round{rounds}"
        folder.mkdir()
        rounds, here = rounds + 1, 0
        while killed(folder, rng.uniform(0.002, 0.12)):
            here += 1
            if here > 40:
                break
        kills += here
        final = work(folder, slow=False)
        assert final.digest == whole.digest
        assert final.file("data.jsonl").read_bytes() == whole.file("data.jsonl").read_bytes()
        paid = Counter((folder / "bill").read_text().split())
        assert set(paid) == {r.id for r in REQUESTS}
        assert sum(paid.values()) - len(REQUESTS) <= here, "more was paid twice than was in flight"
        assert len(read_jsonl(folder / "log.jsonl")) == len(REQUESTS)
        assert not list((folder / "artifacts").glob("*.old"))
    assert kills >= 50


def test_counts_of_the_uninterrupted_run_add_up(whole):
    outcomes = whole.manifest["outcomes"]
    assert (
        sum(outcomes.values()) == len(REQUESTS) and outcomes["ok"] > 0 and outcomes["truncated"] > 0 and outcomes["invalid"] > 0
    )

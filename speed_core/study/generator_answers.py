"""What a generator is asked, and what answers: a stage of answers is declared with `generated`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from speed_core.data import prompts
from speed_core.data.prompts import Prompt
from speed_core.files import Lazy, write_jsonl
from speed_core.generation import generate
from speed_core.models import compute_type, loading, training
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study.stage import Instances, Kind, Stage, stage


@dataclass(frozen=True)
class Ask:
    """Prompts for a generator: `candidates` answers to each, with ids "RECORD#k" and a seed each where there are several.

    constrained: whether a grammar holds the answers to the form; the profile says it where this is None.
    """

    planned: Sequence[Prompt]
    candidates: int = 1
    constrained: bool | None = None

    def requests(self, run: Run) -> Lazy[generate.Request]:
        def request(n: int) -> generate.Request:
            q, k = self.planned[n // self.candidates], n % self.candidates
            rid = f"{q.id}#{k}" if self.candidates > 1 else q.id
            seed = int(prompts.text_digest(f"{rid}|{run.profile.seed}")[:8], 16) & 0x7FFFFFFF
            return generate.Request(rid, training.prompt_text(q.text), q.kind, seed)

        return Lazy(request, range(len(self.planned) * self.candidates))

    def decoding(self, run: Run) -> generate.Decoding:
        g = run.profile.generation
        constrained = g.constrained if self.constrained is None else self.constrained
        return generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, constrained)

    def parameters(self, run: Run, generator: str) -> dict[str, Any]:
        g, asked = run.profile.generation, hashlib.sha256()
        for r in self.requests(run):
            asked.update((r.id + r.text).encode())
        return {
            "prompts": asked.hexdigest(),
            "decoding": dataclasses.asdict(self.decoding(run)),
            "generator": generator,
            "seed": run.profile.seed,
            "dtype": _dtype(run),
        } | ({"attempts": g.attempts} if g.attempts > 1 else {})

    def write(self, run: Run, draft: Draft, name: str, generator: str) -> None:
        """Fill a draft with one outcome a request; the log and the artifact have one name."""
        g, requests, decoding = run.profile.generation, self.requests(run), self.decoding(run)
        if run.replay:
            entries: Sequence[dict[str, Any]] = generate.replay(requests, run.log(name), decoding, g.attempts, _dtype(run))
        else:
            entries = _generate(run, requests, generator, decoding, name)
            if g.engine != "server" and g.executor == "process":  # others know best what they compute in
                folder = loading.resolve(run.profile.models.generator)
                draft.info |= compute_type.facts(compute_type.choose(_dtype(run), folder=folder).name)
        write_jsonl(draft.file("data.jsonl"), entries)
        draft.info |= {"outcomes": generate.counts(entries), "new_tokens": sum(e["new_tokens"] for e in entries)}


def _dtype(run: Run) -> str:
    g = run.profile.generation
    return "auto" if g.engine == "server" else g.dtype  # a server computes in its own


def generated(
    name: str, made: str | Callable[[Run], Instances], generator: str, *, inputs: Sequence[str] = (), work: Callable[..., float]
) -> Callable[[Callable[..., Ask]], Stage]:
    """Declare a stage of answers of `generator` ("base", "junior", "senior", "revisor", or a key in braces); the decorated function
    says what is asked: (run, *inputs, **keys) -> Ask."""

    def declare(ask: Callable[..., Ask]) -> Stage:
        def parameters(run: Run, *read: Artifact, **keys: Any) -> dict[str, Any]:
            return ask(run, *read, **keys).parameters(run, generator.format(**keys))

        def write(run: Run, draft: Draft, *read: Artifact, **keys: Any) -> None:
            ask(run, *read, **keys).write(run, draft, name.format(**keys), generator.format(**keys))

        def uses(run: Run, **keys: Any) -> list[str]:
            return [g for g in [generator.format(**keys)] if g != "base"]

        write.__module__ = ask.__module__  # where `plan --why` sends a reader
        return stage(name, Kind.GENERATED, made, parameters=parameters, inputs=inputs, uses=uses, work=work)(write)

    return declare


def _generate(
    run: Run, requests: Sequence[generate.Request], generator: str, decoding: generate.Decoding, name: str
) -> Sequence[dict[str, Any]]:
    """Answer requests with the engine of the profile; the log is the artifact's name."""
    g, base = run.profile.generation, run.profile.models.generator
    common: dict[str, Any] = {"log": run.log(name), "decoding": decoding, "label": name, "attempts": g.attempts}
    if g.engine == "server":
        from speed_core.generation.server_engine import ServerEngine

        # The server holds the weights; an adapter that was made here is still named by its digest.
        made = run.store.get(generator) if generator != "base" else None
        model_id = f"server:{base}{loading.settings_id(base)}+{loading.weights_id(made.weights()) if made else generator}"
        served = ServerEngine(g.base_url, base if generator == "base" else generator, base, concurrency=g.concurrency)
        try:
            return generate.generate_all(requests, model=base, model_id=model_id, engine=served, **common)
        finally:
            served.close()
    base, adapter = generator_weights(run, generator)
    workers = g.workers if g.executor == "ray" else 0
    options = generate.EngineOptions(g.engine, g.dtype, g.max_length, g.batch_size, workers, g.ray_address)
    return generate.generate_all(requests, model=base, adapter=adapter, engine=options, **common)


def generator_weights(run: Run, generator: str) -> tuple[str, Any]:
    """(base name or folder, adapter folder or None) of one of the four generators."""
    base = run.profile.models.generator
    if generator == "base":
        return base, None
    adapter = run.store.need(generator).weights()
    if generator == "senior":
        from speed_core.preference import dpo

        return dpo.reference_model_path(base, run.store.need("junior").weights()), adapter
    return base, adapter

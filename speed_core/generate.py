"""Generation that loses nothing: one request, one logged outcome, whatever happens.

An engine turns requests into completions; `run` keeps the log. Three engines share one small
interface: vLLM in a process of its own (its memory is really back after `close`), Transformers in
this process (padded batches, or continuous batching in `speed_core.continuous_engine`), and any OpenAI-compatible server (`speed_core.server_engine`). With `constrained` decoding
the text is held to the JSON schema of its kind by a grammar; a grammar guarantees a prefix of a
valid object, not its end, so text cut at the token limit is `truncated`, never repaired.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from speed_core import models, records
from speed_core.artifacts import AppendLog, UserError, digest
from speed_core.sft import progress

# Measured on 2 cores (gemma-3-270m, 32 to 64 requests with a grammar): vLLM starts in 24 s without graph
# compilation and then writes about 150 tokens a second, `generate` about 30; below this many tokens the
# start costs more than it saves.
VLLM_WORTH_TOKENS = 1000
# Free text in a JSON value costs characters, not tokens; this many characters a token bounds the
# grammar so that a value can never outgrow the token budget by whitespace or repetition alone.
CHARS_PER_TOKEN = 6


@dataclass(frozen=True)
class Decoding:
    """How text is sampled. Temperature and top_p as in SPEED appendix B (1.0 and 1.0)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 200
    constrained: bool = True


@dataclass(frozen=True)
class Request:
    """One text to be written: `id` names it, `kind` decides the schema (empty: free text), `attempt` counts from 1."""

    id: str
    text: str
    kind: str = ""
    seed: int = 0
    attempt: int = 1

    def again(self) -> Request:
        """The next attempt: the same prompt with a seed of its own."""
        seed = int(digest([self.seed, self.attempt])[:8], 16) & 0x7FFFFFFF
        return replace(self, seed=seed, attempt=self.attempt + 1)


@dataclass(frozen=True)
class Completion:
    """What the engine returned. `finish_reason` is "stop", "length", or "error" when it refused the request for good:
    then `text` says why. Token counts are for speed and cost."""

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int


class Engine(Protocol):
    """Anything that streams one completion per request, in any order."""

    name: str

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]: ...

    def close(self) -> None: ...


def request_id(request: Request, model_id: str, decoding: Decoding) -> str:
    """Digest of everything that decides the text: prompt, weights, decoding, schema, seed."""
    decides = {
        "prompt": request.text,
        "model": model_id,
        "decoding": asdict(decoding),
        "schema": records.schema(request.kind) if request.kind and decoding.constrained else None,
        "seed": request.seed,
        "record": request.id,
    }
    return digest(decides | ({"attempt": request.attempt} if request.attempt > 1 else {}))[:24]


def grammar_schema(kind: str, decoding: Decoding) -> dict[str, Any]:
    """Schema handed to the grammar: string lengths bounded by the token budget."""
    return records.schema(kind, min(records.MAX_CHARS, decoding.max_new_tokens * CHARS_PER_TOKEN))


# --- engines -----------------------------------------------------------------------------------


class TransformersEngine:
    """`model.generate` in this process, requests sorted by length so that padding stays small."""

    name = "transformers"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "bfloat16", batch_size: int = 32):
        self.tokenizer = models.load_tokenizer(model)
        self.model = models.load_causal_lm(model, adapter, dtype).to(models.device())
        self.batch_size = batch_size
        self._compiler: Any = None

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        import torch

        encoded = {r.id: models.encode_prompt(self.tokenizer, r.text) for r in requests}
        order = sorted(requests, key=lambda r: len(encoded[r.id]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [encoded[r.id] for r in batch]
            width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
            device = self.model.device
            ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
            # Temperature and top-p are in our own processors; what the model's defaults say is switched off.
            options: dict[str, Any] = {"do_sample": decoding.temperature > 0}
            if decoding.temperature > 0:
                options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(int(digest([r.seed for r in batch])[:8], 16))
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=decoding.max_new_tokens,
                    pad_token_id=pad,
                    logits_processor=self._processors(batch, decoding),
                    **options,
                )
            for request, row, full in zip(batch, rows, out[:, width:].tolist(), strict=True):
                eos = self.tokenizer.eos_token_id
                ended = eos in full
                new = full[: full.index(eos)] if ended else full
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                yield Completion(request.id, text, "stop" if ended else "length", len(row), len(new))

    def _processors(self, batch: Sequence[Request], decoding: Decoding) -> list[Any]:
        """Grammar, temperature, nucleus, in this order: the nucleus is taken of the tokens that the grammar allows."""
        from transformers import TemperatureLogitsWarper

        from speed_core import sampling

        out = self._grammars(batch, decoding) if decoding.constrained and any(r.kind for r in batch) else []
        if decoding.temperature > 0:
            out += [TemperatureLogitsWarper(decoding.temperature), sampling.hf_processor(decoding.top_p)]
        return out

    def _grammars(self, batch: Sequence[Request], decoding: Decoding) -> list[Any]:
        from xgrammar.contrib.hf import LogitsProcessor

        return [LogitsProcessor([self._compiled(r.kind, decoding) for r in batch])]

    def _compiled(self, kind: str, decoding: Decoding) -> Any:
        """The grammar of a kind, compiled once: reading a vocabulary of 262,144 words takes longer than a step."""
        import xgrammar

        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.model.config.vocab_size)
            self._compiler = xgrammar.GrammarCompiler(info)
        # The compiler keeps what it has compiled.
        schema = json.dumps(grammar_schema(kind, decoding))
        return self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))

    def close(self) -> None:
        del self.model


class VllmEngine:
    """vLLM in a child process. The parent never touches the accelerator; memory is back after `close`."""

    name = "vllm"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "bfloat16", max_length: int = 1024):
        folder = str(models.merged_folder(model, adapter)) if adapter else models.resolve(model)
        config = {"model": folder, "dtype": dtype, "max_length": max_length}
        self._errors = tempfile.TemporaryFile("w+b")
        read_end, write_end = os.pipe()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "speed_core.vllm_worker", str(write_end), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[write_end],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        )
        os.close(write_end)
        self._out = os.fdopen(read_end, encoding="utf-8")
        self._tokenizer = models.load_tokenizer(folder)
        self._wait_ready()

    def _wait_ready(self) -> None:
        line = self._out.readline()
        if not line:
            raise UserError(f"vllm: the engine did not start ({self._last_error()}); use generation.engine=transformers")

    def _last_error(self) -> str:
        self._child.wait()
        self._errors.seek(0)
        lines = [s for s in self._errors.read().decode(errors="replace").splitlines() if "Error" in s]
        return lines[-1].strip()[:300] if lines else f"exit code {self._child.returncode}"

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        assert self._child.stdin is not None
        job = {
            "decoding": asdict(decoding),
            "schemas": {k: grammar_schema(k, decoding) for k in {r.kind for r in requests} if k},
            "requests": [
                {
                    "id": r.id,
                    "ids": models.encode_prompt(self._tokenizer, r.text),
                    "kind": r.kind if decoding.constrained else "",
                    "seed": r.seed,
                }
                for r in requests
            ],
        }
        payload = (json.dumps(job) + "\n").encode()
        # A thread writes, so that a large job cannot block while the child's answers fill the pipe.
        writer = threading.Thread(target=self._send, args=(payload,), daemon=True)
        writer.start()
        for _ in requests:
            line = self._out.readline()
            if not line:
                raise UserError(
                    f"vllm: the engine ended in the middle ({self._last_error()}); finished requests are logged, run again to go on"
                )
            yield Completion(**json.loads(line))
        writer.join()

    def _send(self, payload: bytes) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(payload)
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the reader reports the dead child with its own error

    def close(self) -> None:
        if self._child.stdin and not self._child.stdin.closed:
            try:
                self._child.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._out.close()
        self._errors.close()


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(name: str, requests: int, max_new_tokens: int) -> str:
    """Resolve `auto`: for little work Transformers; else vLLM, or Transformers' continuous batching where that is missing.

    A server is never chosen by itself: it needs an address (`server_engine.ServerEngine`).
    """
    if name not in ("auto", "vllm", "transformers", "continuous"):
        raise UserError(f"generation.engine {name!r}: unknown; use auto, vllm, transformers, continuous or server")
    if name == "vllm" and not vllm_installed():
        raise UserError("generation.engine 'vllm': not installed; run make setup, or use transformers")
    if name != "auto":
        return name
    # Half of the token limit is a fair guess of what a record takes.
    worth = requests * max_new_tokens / 2 >= VLLM_WORTH_TOKENS
    if not worth:
        return "transformers"
    return "vllm" if vllm_installed() else "continuous"


def open_engine(
    name: str,
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str = "bfloat16",
    max_length: int = 1024,
    batch_size: int = 32,
    workers: int = 0,
    ray_address: str = "",
) -> Engine:
    """Start the engine `name` ("vllm" or "transformers") on base weights, with an adapter if given.

    `workers`: 0 for one engine of this process, else that many over the Ray at `ray_address` (`speed_core.ray_engine`).
    """
    if workers:
        from speed_core.ray_engine import RayEngine

        sizes: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "batch_size": batch_size}
        return RayEngine(name, model, adapter, workers=workers, address=ray_address, **sizes)
    if adapter is not None:
        models.check_adapter(adapter, model)
    if name == "vllm":
        return VllmEngine(model, adapter, dtype, max_length)
    if name == "continuous":
        from speed_core.continuous_engine import ContinuousEngine

        return ContinuousEngine(model, adapter, dtype)
    return TransformersEngine(model, adapter, dtype, batch_size)


# --- the log -----------------------------------------------------------------------------------


def run(
    requests: Sequence[Request],
    *,
    model: str,
    log: Path,
    decoding: Decoding,
    adapter: Path | None = None,
    engine: str | Engine = "auto",
    label: str = "generate",
    dtype: str = "bfloat16",
    max_length: int = 1024,
    batch_size: int = 32,
    attempts: int = 1,
    model_id: str = "",
    workers: int = 0,
    ray_address: str = "",
    parse: Callable[[str, str, str], records.Outcome] = records.parse,
) -> list[dict[str, Any]]:
    """Answer every request and return one log entry each, in the order of `requests`.

    Requests already in `log` (same digest of everything that decides the text) are not issued
    again. Each finished text is parsed by `parse(raw, kind, finish_reason)` and appended at once.
    The number of entries equals the number of requests, always. A text that is not ok is asked for again, with a
    seed of its own, up to `attempts` times in all; every attempt stays in the log, the last one is returned.
    `model_id` names weights that are not on this machine (a server's); else it is their digest.
    """
    if not model_id:
        base = models.weights_id(models.resolve(model))
        model_id = f"{base}+{models.weights_id(adapter)}" if adapter else base
    if len({r.id for r in requests}) != len(requests):
        raise ValueError("requests: two of them share an id; ids must differ")
    latest = {r.id: r for r in requests}
    started: Engine | None = None if isinstance(engine, str) else engine
    with AppendLog(log) as entries:

        def entry(r: Request) -> dict[str, Any] | None:
            return entries.entries.get(request_id(r, model_id, decoding))

        others = {e["record"] for e in entries.entries.values()} & {r.id for r in requests if entry(r) is None}
        if others:
            print(
                f"{log.name}: holds {len(others)} of these records with another prompt, model, decoding or seed; kept, not used"
            )
        try:
            for attempt in range(1, attempts + 1):
                todo = [r for r in latest.values() if r.attempt == attempt and entry(r) is None]
                if todo and started is None:
                    assert isinstance(engine, str)
                    name = choose_engine(engine, len(todo), decoding.max_new_tokens)
                    sizes: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "batch_size": batch_size}
                    started = open_engine(name, model, adapter, workers=workers, ray_address=ray_address, **sizes)
                if todo and started is not None:
                    named = label if attempt == 1 else f"{label}, attempt {attempt}"
                    bar = progress(len(requests), f"{named} [{started.name}]", "rec", len(requests) - len(todo))
                    try:
                        for c in started.generate(prefix_order(todo), decoding):
                            entries.append(_entry(c, latest[c.id], model_id, decoding, started.name, parse))
                            bar.update()
                    finally:
                        bar.close()
                if attempt < attempts:
                    failed = [r for r in latest.values() if r.attempt == attempt and _weak(entry(r))]
                    latest |= {r.id: r.again() for r in failed}
        finally:
            if started is not None and isinstance(engine, str):
                started.close()
        return [e for r in requests if (e := entry(latest[r.id])) is not None]


def prefix_order(requests: Sequence[Request]) -> list[Request]:
    """Requests sorted by their text, so that prompts with a common beginning follow each other and share its cache."""
    return sorted(requests, key=lambda r: r.text)


def _weak(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry["status"] in ("invalid", "truncated", "refused")


def _entry(
    c: Completion,
    request: Request,
    model_id: str,
    decoding: Decoding,
    engine: str,
    parse: Callable[[str, str, str], records.Outcome],
) -> dict[str, Any]:
    """The line of the log for one completion."""
    if c.finish_reason == "error":
        outcome = records.Outcome("error", c.text)
    else:
        outcome = parse(c.text, request.kind, c.finish_reason)
    more = {"attempt": request.attempt} if request.attempt > 1 else {}
    return more | {
        "id": request_id(request, model_id, decoding),
        "record": c.id,
        "kind": request.kind,
        "seed": request.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "raw": "" if outcome.status == "error" else c.text,
        "finish_reason": c.finish_reason,
        "prompt_tokens": c.prompt_tokens,
        "new_tokens": c.new_tokens,
        "model": model_id,
        "engine": engine,
    }


def replay(requests: Sequence[Request], log: Path, decoding: Decoding, attempts: int = 1) -> list[dict[str, Any]]:
    """The log entries of `requests` in their order, without model or engine: the last attempt of each, as `run` returns it.

    An entry counts only when its id is the digest of this very prompt, decoding and seed with the model it names.
    """
    if not log.is_file():
        raise UserError(f"replay: {log.name} is not there; import an export first (python -m speed_core import FILE)")
    with AppendLog(log) as entries:
        by_record: dict[str, list[dict[str, Any]]] = {}
        for e in entries.entries.values():
            by_record.setdefault(e["record"], []).append(e)

    def find(r: Request) -> dict[str, Any] | None:
        found = [e for e in by_record.get(r.id, []) if e["id"] == request_id(r, e["model"], decoding)]
        return found[-1] if found else None

    out = []
    for r in requests:
        entry = find(r)
        while r.attempt < attempts and _weak(entry):
            r = r.again()
            entry = find(r)
        if entry is None:
            raise UserError(
                f"replay: {log.name} holds no outcome of record {r.id} with this prompt, decoding and seed; "
                "use the profile and overrides of the export"
            )
        out.append(entry)
    return out


def outcome_of(entry: dict[str, Any]) -> records.Outcome:
    """Parse a logged text again; the log keeps raw text, so records are always derived from it."""
    if entry["status"] == "error":
        return records.Outcome("error", entry["reason"])
    return records.parse(entry["raw"], entry["kind"], entry["finish_reason"])


def counts(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Outcomes by status, in a fixed order; the values add up to the number of entries."""
    found = Counter(e["status"] for e in entries)
    return {s: found.get(s, 0) for s in ("ok", "invalid", "refused", "truncated", "error")}

"""Generation that loses nothing: one request, one logged outcome, whatever happens.

An engine (`speed_core.generation.engines`) turns requests into completions; `generate_all` keeps the log. Text cut at the token limit is
`truncated`, never repaired, and nothing is asked twice that was answered.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from speed_core.console import progress
from speed_core.data import records
from speed_core.data.replies import Completion
from speed_core.files import AppendLog, Lazy, UserError, digest
from speed_core.generation.engines import Decoding, Engine, EngineOptions, Request, choose_engine, open_engine
from speed_core.models import loading

DEFAULT_ENGINE = EngineOptions()
LOGGED = ("record", "kind", "status", "raw", "reason", "finish_reason", "model")  # what every entry of a log has


def request_id(request: Request, model_id: str, decoding: Decoding, dtype: str = "auto") -> str:
    """Digest of everything that decides the text: prompt, weights, decoding, schema, seed, and a compute type that was asked for."""
    decides = {
        "prompt": request.text,
        "model": model_id,
        "decoding": asdict(decoding),
        "schema": records.schema(request.kind) if request.kind and decoding.constrained else None,
        "seed": request.seed,
        "record": request.id,
    }
    decides |= {"attempt": request.attempt} if request.attempt > 1 else {}
    return digest(decides | ({"dtype": dtype} if dtype != "auto" else {}))[:24]


def generate_all(
    requests: Sequence[Request],
    *,
    model: str,
    log: Path,
    decoding: Decoding,
    adapter: Path | None = None,
    engine: Engine | EngineOptions = DEFAULT_ENGINE,
    label: str = "generate",
    attempts: int = 1,
    model_id: str = "",
) -> Lazy[dict[str, Any]]:
    """Answer every request and return one log entry each, in the order of `requests`.

    Requests already in `log` (same digest of everything that decides the text) are not issued
    again. Each finished text is parsed (`records.parse`) and appended at once.
    The number of entries equals the number of requests, always. A text that is not ok is asked for again, with a
    seed of its own, up to `attempts` times in all; every attempt stays in the log, the last one is returned.
    `engine`: one that is open and stays open, or options to open one with when a request has to be issued.
    `model_id` names weights that are not on this machine (a server's); else it is their digest.
    Of a request two digests stay in memory and of an entry its place in the log: for a million less than 1 GB, where
    `requests` makes its items when they are read (`files.Lazy`).
    """
    if not model_id:
        base = loading.model_id(model)
        model_id = f"{base}+{loading.weights_id(adapter)}" if adapter else base
    opened, options = (None, engine) if isinstance(engine, EngineOptions) else (engine, None)
    dtype = options.dtype if options else "auto"
    keys, place = list[str](), dict[str, int]()  # the request id of each one's latest attempt; where a record's request stands
    for r in requests:
        place[r.id] = len(keys)
        keys.append(request_id(r, model_id, decoding, dtype))
    if len(place) != len(keys):
        raise ValueError("requests: two of them share an id; ids must differ")
    attempt_of = bytearray(b"\1" * len(keys))

    @lru_cache(maxsize=1024)
    def request(i: int, attempt: int) -> Request:  # an engine reads it, and its completion needs it again soon after
        r = requests[i]
        while r.attempt < attempt:
            r = r.again()
        return r

    with AppendLog(log, LOGGED) as outcomes:
        entries = outcomes.entries
        planned = set(keys)
        unused = (entries[key]["record"] for key in entries if key not in planned)
        others = {record for record in unused if record in place and keys[place[record]] not in entries}
        if others:
            otherwise = "with another prompt, model, decoding or seed; kept, not used"
            print(f"{log.name}: holds {len(others)} of these records {otherwise}")
        try:
            for attempt in range(1, attempts + 1):
                left = [i for i, key in enumerate(keys) if attempt_of[i] == attempt and key not in entries]
                todo = Lazy(partial(request, attempt=attempt), left)
                if todo and opened is None and options:
                    # By all requests: what is left of a stopped run is answered by the engine that began it.
                    name = choose_engine(options.name, len(requests), decoding.max_new_tokens)
                    opened = open_engine(replace(options, name=name), model, adapter)
                if todo and opened:
                    named = label if attempt == 1 else f"{label}, attempt {attempt}"
                    bar = progress(len(requests), f"{named} [{opened.name}]", "rec", len(requests) - len(todo))
                    with closing(bar), closing(opened.generate(prefix_order(todo), decoding)) as completions:
                        for c in completions:
                            i = place[c.id]
                            outcomes.append(_entry(c, request(i, attempt=attempt), keys[i], model_id, opened.name))
                            bar.update()
                if attempt < attempts:
                    for i, key in enumerate(keys):
                        if attempt_of[i] == attempt and _weak(entries.get(key)):
                            attempt_of[i] += 1
                            keys[i] = request_id(request(i, attempt=attempt + 1), model_id, decoding, dtype)
        except BaseException:
            if opened and options:
                opened.close()
            raise
        if opened and options:
            opened.rest()  # the next stage often opens the same engine on other weights
        return Lazy(entries.__getitem__, [key for key in keys if key in entries])


def prefix_order(requests: Sequence[Request]) -> Lazy[Request]:
    """Requests sorted by their text, so that prompts with a common beginning follow each other and share its cache.

    The texts are sorted on the disk (a database without a name): a million of them are more than a gigabyte.
    """
    with closing(sqlite3.connect("")) as db:
        db.execute("CREATE TABLE texts (text BLOB)")
        db.executemany("INSERT INTO texts VALUES (?)", ((r.text.encode("utf-8", "surrogatepass"),) for r in requests))
        found = db.execute("SELECT rowid FROM texts ORDER BY text, rowid")
        return Lazy(requests.__getitem__, array("q", (n - 1 for (n,) in found)))


def _weak(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry["status"] in records.WEAK


def _entry(c: Completion, request: Request, key: str, model_id: str, engine: str) -> dict[str, Any]:
    """The line of the log for one completion."""
    if c.finish_reason == "error":
        outcome = records.Outcome(records.Status.ERROR, c.text)
    else:
        outcome = records.parse(c.text, request.kind, c.finish_reason)
    more = {"attempt": request.attempt} if request.attempt > 1 else {}
    return more | {
        "id": key,
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


def replay(
    requests: Sequence[Request], log: Path, decoding: Decoding, attempts: int = 1, dtype: str = "auto"
) -> Lazy[dict[str, Any]]:
    """The log entries of `requests` in their order, without model or engine: the last attempt of each, as `generate_all` returns it.

    An entry counts only when its id is the digest of this very prompt, decoding and seed with the model it names.
    """
    if not log.is_file():
        raise UserError(f"replay: {log.name} is not there; import an export first (python -m speed_core import FILE)")
    with AppendLog(log, LOGGED) as outcomes:
        entries, by_record = outcomes.entries, dict[str, list[str]]()
        for key, e in entries.items():
            by_record.setdefault(e["record"], []).append(key)

    def find(r: Request) -> dict[str, Any] | None:
        mine = map(entries.__getitem__, by_record.get(r.id, []))
        found = [e for e in mine if e["id"] == request_id(r, e["model"], decoding, dtype)]
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
        out.append(entry["id"])
    return Lazy(entries.__getitem__, out)


def outcome_of(entry: dict[str, Any]) -> records.Outcome:
    """Parse a logged text again; the log keeps raw text, so records are always derived from it."""
    if entry["status"] == "error":
        return records.Outcome(records.Status.ERROR, entry["reason"])
    return records.parse(entry["raw"], entry["kind"], entry["finish_reason"])


def text_of(entry: dict[str, Any]) -> str:
    """The text of a valid outcome that a model is to learn from or to read (`records.own_text`)."""
    return records.own_text(entry["raw"], entry["kind"])


def counts(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Outcomes by status, in a fixed order; the values add up to the number of entries."""
    found = Counter(e["status"] for e in entries)
    return {s: found.get(s, 0) for s in ("ok", "invalid", "refused", "truncated", "error")}

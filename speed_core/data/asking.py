"""Asking a teacher many prompts: one logged outcome per prompt, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_core.data import records
from speed_core.data.budget import BudgetReached, Ledger
from speed_core.data.prompts import Prompt
from speed_core.data.records import Outcome, Status
from speed_core.data.replies import Completion, Refusals, held_back, of_request, sentence, status_of
from speed_core.data.teacher import Teacher, Unrecorded
from speed_core.files import AppendLog, UserError, digest
from speed_core.profile import Teacher as TeacherSettings

LOGGED = ("record", "prompt_digest", "status", "raw", "reason", "finish_reason")  # what every entry of a log has
UNRECORDED = "no recorded answer to this prompt"
Parser = Callable[[str, str, str], Outcome]  # of (text, kind, finish reason)


def ask(
    teacher: Teacher,
    items: Sequence[Prompt],
    *,
    purpose: str,
    log: Path,
    parse: Parser = records.parse,
    temperature: float | None = None,
    attempts: int = 1,
) -> list[dict[str, Any]]:
    """Ask the teacher every prompt; log each answer as it comes; return one entry per prompt, in order.

    Every entry has a status: ok, invalid, refused, truncated, or error (no recorded answer, a refused request, a budget that ran
    out). The counts add up to the prompts. An `error` is asked again the next time unless the endpoint refused the request itself
    (`replies.of_request`): then `retryable` is false and it is remembered. Where the endpoint refuses every request (a key that has
    expired), UserError says so at once, and nothing is remembered. An answer that is not ok is asked for again, up to `attempts`
    times in all; each attempt has its own entry in the log, and the last one is returned.
    """
    with AppendLog(log, LOGGED) as entries:
        asking = _Asking(teacher, entries, purpose, parse, temperature)
        known = (entries.entries.get(asking.key(p, n)) for p in items for n in range(1, attempts + 1))
        teacher.remember([e for e in known if e], purpose)
        todo, last = list(items), dict[str, dict[str, Any]]()
        for attempt in range(1, attempts + 1):
            asking.round(todo, attempt)
            last |= {p.id: entries.entries[asking.key(p, attempt)] for p in todo}
            todo = [p for p in todo if last[p.id]["status"] in records.WEAK]
        return [last[p.id] for p in items]


@dataclass
class _Asking:
    """One call of `ask`. A refused request is logged once it is known to be its own fault."""

    teacher: Teacher
    log: AppendLog
    purpose: str
    parse: Parser
    temperature: float | None
    refusals: Refusals[dict[str, Any]] = field(default_factory=Refusals)

    def key(self, p: Prompt, attempt: int) -> str:
        """Digest of all that decides the answer to this attempt."""
        later = {"attempt": attempt} if attempt > 1 else {}
        decides = self.teacher.sampling_params(self.temperature) | later
        return digest({"prompt": p.text, "teacher": self.teacher.label, "record": p.id, **decides})[:24]

    def round(self, items: Sequence[Prompt], attempt: int) -> None:
        """Ask each prompt that the log does not answer yet."""
        keys = {p.id: self.key(p, attempt) for p in items}
        unanswered = [p for p in items if self._is_open(self.log.entries.get(keys[p.id]))]
        if unanswered:
            self.teacher.begin(unanswered, [keys[p.id] for p in unanswered], self.purpose)
        asked = {self.teacher.submit(p, self.purpose, self.temperature): p for p in unanswered}
        try:
            for future in as_completed(list(asked)):
                self._keep(self._entry(asked.pop(future), attempt, future), future)
        except UserError:  # no further call is sent; what is on its way may be an answer, and paid for
            wait(asked, timeout=10)
            raise
        finally:  # Ctrl-C, or a server that refuses: nothing more is paid for, and what has come is kept
            for future, p in asked.items():
                if not future.cancel() and future.done() and not future.exception():
                    self.log.append(self._entry(p, attempt, future))
        self._release()

    def _is_open(self, entry: dict[str, Any] | None) -> bool:
        if entry is None:
            return True
        # An earlier version remembered also what was no fault of the request, and no code.
        final = not entry.get("retryable", True) and "code" in entry
        return entry["status"] == Status.ERROR and not final and not self.teacher.replays

    def _entry(self, p: Prompt, attempt: int, future: Future[Completion]) -> dict[str, Any]:
        """The line of the log for one answer, or for what kept it from coming."""
        key = self.key(p, attempt)
        entry: dict[str, Any] = {
            "id": key,
            "record": p.id,
            "kind": p.kind,
            "topic": p.topic,
            "task": p.task,
            "prompt_digest": p.digest,
        }
        failed = entry | {"status": Status.ERROR, "raw": "", "finish_reason": "stop"}
        try:
            done = future.result()
        except Unrecorded:
            return failed | {"reason": UNRECORDED}
        except BudgetReached as stop:
            return failed | {"reason": str(stop)}
        except UserError:
            raise
        except Exception as error:  # the client raises many types; each ends as a logged outcome
            failed |= {"reason": sentence(error)}
            if held_back(error):
                return failed | {"status": Status.REFUSED, "finish_reason": "content_filter", "prompt_tokens": 0, "new_tokens": 0}
            return failed | ({"retryable": False, "code": status_of(error)} if of_request(error) else {"retryable": True})
        outcome = self.parse(done.text, p.kind, done.finish_reason)
        entry |= {"attempt": attempt} if attempt > 1 else {}
        return entry | {
            "status": outcome.status,
            "reason": outcome.reason,
            "raw": done.text,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt_tokens,
            "new_tokens": done.new_tokens,
        }

    def _keep(self, entry: dict[str, Any], future: Future[Completion]) -> None:
        """Log an entry, or hold a refused request back. UserError where the server refuses all."""
        if "code" not in entry:
            self.log.append(entry)
            if entry["status"] != Status.ERROR:
                self._release()
        elif self.refusals.hold(entry["reason"], entry):
            if stop := self.teacher.refuses_all(future.exception() or RuntimeError(), self.purpose, self.temperature):
                raise stop
            self._release(probed=True)

    def _release(self, probed: bool = False) -> None:
        for entry in self.refusals.release(probed):
            self.log.append(entry)


def spent(log: Path, items: Sequence[Prompt], purpose: str, settings: TeacherSettings) -> dict[str, dict[str, float]]:
    """{purpose: calls, tokens, money} of every answer to these prompts in a log: all attempts, of all runs that wrote it."""
    wanted, ledger = {(p.id, p.digest) for p in items}, Ledger(settings)
    with AppendLog(log, LOGGED) as entries:
        ledger.add_entries(purpose, (e for e in entries.entries.values() if (e["record"], e["prompt_digest"]) in wanted))
    return ledger.rows


def unanswered(entries: Sequence[dict[str, Any]]) -> str:
    """Why a data set is only a part of what was asked for ("12 of 400 unanswered: REASON"), or nothing.

    A request that the endpoint refuses for good, or a prompt that nobody recorded, is an outcome, not a gap.
    """
    failed = [e for e in entries if e["status"] == Status.ERROR and e.get("retryable", True)]
    gaps = [e["reason"] for e in failed if e["reason"] != UNRECORDED]
    return f"{len(gaps)} of {len(entries)} unanswered: {gaps[0]}" if gaps else ""


def parse_tasks(raw: str, kind: str, finish_reason: str) -> Outcome:
    """Outcome of a brainstorm answer: a list of strings."""
    if cut := records.unfinished(raw, finish_reason):
        return cut
    tasks, why = records.parse_string_list(raw, finish_reason)
    return records.invalid(why, raw) if why else Outcome(Status.OK, record={"tasks": json.dumps(tasks)}, raw=raw)

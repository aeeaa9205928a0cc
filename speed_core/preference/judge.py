"""Best and worst of several candidates: a rubric that writes its reasons, or a language model.

The rubric stands where GPT-4o stood when nothing can be reached. It scores what SPEED's judge prompt
asks about (does the output fit the prompt?) by rule, and uses the guide model for the one thing
rules cannot see: whether the positive is really closer to the query than the hard negative.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from speed_core.data import asking, prompts, records
from speed_core.data.prompts import Prompt

INVALID_SCORE = -5.0


@dataclass(frozen=True)
class Judgement:
    """Scores of the candidates, index of the best and of the worst, and the reason in words."""

    best: int
    worst: int
    scores: tuple[float, ...]
    reason: str


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _wanted_words(prompt: Prompt) -> tuple[str, int, int]:
    """(field, least, most) words that the prompt's attributes ask for; most 0 means no limit."""
    a = prompt.attributes
    if "document_words" in a:
        return "positive", int(a["document_words"]), 0
    if "classification_length" in a:
        number = int(a["classification_length"].split()[-1])
        return ("query", 1, number - 1) if a["classification_length"].startswith("less") else ("query", number, 0)
    if "long_words" in a:
        return "query", int(a["long_words"]), 0
    return "query", 1, 60


def length_score(record: dict[str, str | None], prompt: Prompt) -> float:
    """1 when the asked word count is met, less in proportion to what is missing or too much."""
    name, least, most = _wanted_words(prompt)
    fields = [name, "negative"] if name == "positive" else [name]
    if "long_words" in prompt.attributes:
        fields = ["query", "positive"]
    counts = [len(words(record[f] or "")) for f in fields]
    return float(np.mean([n / least if n < least else most / n if most and n > most else 1.0 for n in counts]))


def repetition(text: str) -> float:
    """Share of word trigrams that occurred before: 0 for natural text, near 1 for a loop."""
    w = words(text)
    grams = [tuple(w[i : i + 3]) for i in range(len(w) - 2)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copying(query: str, text: str) -> float:
    """Share of the query's word bigrams found in the text (1: copied verbatim)."""
    q, t = words(query), words(text)
    grams = {tuple(q[i : i + 2]) for i in range(len(q) - 1)} or {tuple(q)}
    seen = {tuple(t[i : i + 2]) for i in range(len(t) - 1)} | {tuple(t)}
    return len(grams & seen) / len(grams)


def about(prompt: Prompt) -> str:
    """What a text for `prompt` should be about."""
    return prompt.task if prompt.kind != "sts" else prompt.topic


class RubricJudge:
    """Scores a candidate in [-5, about 5]; `guide` encodes texts to unit vectors."""

    label = "rubric judge (rules and the guide model)"
    # Weights are a judgement of ours, printed with every reason; notebook 04 shows their effect.
    WEIGHTS = {"length": 1.0, "gap": 2.0, "on_topic": 1.5, "copying": -1.0, "leak": -1.0, "repetition": -2.0}

    def __init__(self, guide: Any):
        self.guide = guide
        self._cache: dict[str, np.ndarray] = {}

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        new = list(dict.fromkeys(t for t in texts if t not in self._cache))
        # A batch at a time: `encode` would order all texts by length, and texts of one length differently on each processor.
        new.sort(key=len)
        for start in range(0, len(new), 64):
            batch = new[start : start + 64]
            vectors = self.guide.encode(batch, normalize_embeddings=True, show_progress_bar=False, batch_size=64)
            self._cache.update(zip(batch, np.asarray(vectors), strict=True))
        return np.stack([self._cache[t] for t in texts])

    def precompute_embeddings(self, raw: Iterable[tuple[str, Prompt]]) -> None:
        """Embed what `score` needs of many texts in one pass (a call per candidate would be slow)."""
        texts = []
        for text, prompt in raw:
            if record := records.parse(text, prompt.kind).record:
                texts += [t for t in record.values() if t] + [about(prompt)]
        if texts:
            self._embed(texts)

    def score(self, raw: str, prompt: Prompt, finish_reason: str = "stop") -> tuple[float, dict[str, float], str]:
        """(score, its parts, a reason). Text that is no valid record scores -5 and says which rule failed."""
        outcome = records.parse(raw, prompt.kind, finish_reason)
        if outcome.record is None:
            return INVALID_SCORE, {}, f"{outcome.status}: {outcome.reason}"
        record = outcome.record
        query, positive, negative = str(record["query"]), str(record["positive"]), record["negative"]
        q, p, n, a = self._embed([query, positive, negative or positive, about(prompt)])
        whole = " ".join(t for t in (query, positive, negative) if t)
        parts = {
            "length": length_score(record, prompt),
            "gap": float(q @ p - q @ n) if negative else float(q @ p) - 0.5,
            "on_topic": float(max(q @ a, p @ a)),
            "copying": copying(query, positive) if prompt.kind == "retrieval" else float(query.lower() == positive.lower()),
            "leak": float(prompt.kind == "classification" and f" {positive.lower()} " in f" {query.lower()} "),
            "repetition": repetition(whole),
        }
        total = sum(self.WEIGHTS[k] * v for k, v in parts.items())
        reason = ", ".join(f"{k} {v:.2f}" for k, v in parts.items())
        return total, parts, reason

    def judge(self, prompt: Prompt, candidates: Sequence[str], finish_reasons: Sequence[str] | None = None) -> Judgement:
        """Best and worst candidate (ties go to the first; best and worst always differ in index)."""
        ends = finish_reasons or ["stop"] * len(candidates)
        scored = [self.score(c, prompt, e) for c, e in zip(candidates, ends, strict=True)]
        values = [s[0] for s in scored]
        best = int(np.argmax(values))
        worst = min((i for i in range(len(values)) if i != best), key=lambda i: values[i])
        reason = f"best [{best}] scores {values[best]:.2f} ({scored[best][2]}); worst [{worst}] {values[worst]:.2f} ({scored[worst][2]})"
        return Judgement(best, worst, tuple(values), reason)


class LlmJudge:
    """A language model through an endpoint, at temperature 0 (SPEED appendix B).

    It is asked twice with the order reversed. Where it contradicts itself, best equals worst, and `make_pairs` counts a tie.
    Every answer is in `log`: a second run pays for nothing that was answered.
    """

    def __init__(self, teacher: Any, log: Path, temperature: float = 0.0):
        self.teacher, self.log, self.temperature = teacher, log, temperature
        self.label = f"llm judge ({teacher.label})"
        self._answers: dict[str, dict[str, Any]] = {}  # of one question, by its text
        counted = ("judged", "unanswered", "unreadable", "agree", "contradict", "first_place_best")
        self.audit: dict[str, float] = dict.fromkeys(counted, 0) | {"first_place_expected": 0.0}

    def questions(self, items: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Prompt]:
        """What is asked about prompts and their candidates: each once in either order."""
        return [
            dataclasses.replace(prompt, id=f"{prompt.id}/judge{k}", text=prompts.judge(prompt.text, order))
            for prompt, candidates in items
            for k, order in enumerate([list(candidates), list(reversed(candidates))])
        ]

    def ask(self, items: Sequence[tuple[Prompt, Sequence[str]]]) -> str:
        """Ask about many prompts at once, every answer logged as it comes; returns why some are missing, or nothing."""
        questions = self.questions(items)
        how: dict[str, Any] = {"purpose": "judge", "log": self.log, "parse": parse_verdict, "temperature": self.temperature}
        entries = asking.ask(self.teacher, questions, **how)
        self._answers |= {q.text: e for q, e in zip(questions, entries, strict=True)}
        return asking.unanswered(entries)

    def _choice(self, entry: dict[str, Any], count: int) -> tuple[int, int, str] | None:
        """(best, worst, reason) of an answer, or None when it names no two of the candidates."""
        record = parse_verdict(entry["raw"], "", entry["finish_reason"]).record
        if record is None:
            return None
        best, worst = int(str(record["best"])), int(str(record["worst"]))
        inside = 0 <= best < count and 0 <= worst < count and best != worst
        return (best, worst, str(record["reason"])) if inside else None

    def judge(self, prompt: Prompt, candidates: Sequence[str], finish_reasons: Sequence[str] | None = None) -> Judgement:
        n, audit = len(candidates), self.audit
        questions = self.questions([(prompt, candidates)])
        if any(q.text not in self._answers for q in questions):
            self.ask([(prompt, candidates)])
        entries = [self._answers[q.text] for q in questions]
        if any(e["status"] == "error" for e in entries):
            audit["unanswered"] += 1
            return self._undecided(n, "the judge did not answer")
        audit["judged"] += 1
        choices = [self._choice(e, n) for e in entries]
        # Over both orders each candidate stands first as often as last, so a fair judge names place 0 in 1 of n.
        audit["first_place_best"] += sum(c is not None and c[0] == 0 for c in choices)
        audit["first_place_expected"] += sum(c is not None for c in choices) / n
        first, again = choices
        if first is None or again is None:
            audit["unreadable"] += 1
            return self._undecided(n, "the judge's answer could not be read")
        best, worst, reason = first
        same = (n - 1 - again[0], n - 1 - again[1]) == (best, worst)
        audit["agree" if same else "contradict"] += 1
        if not same:
            return self._undecided(n, "the judge contradicts itself when the order is reversed")
        return Judgement(best, worst, tuple(1.0 if i == best else -1.0 if i == worst else 0.0 for i in range(n)), reason)

    @staticmethod
    def _undecided(count: int, reason: str) -> Judgement:
        return Judgement(0, 0, (0.0,) * count, reason)


class NoVerdict(StrEnum):
    """Why a judge's answer counts for nothing."""

    NO_OBJECT = "no_verdict"
    NO_INDEX = "no_index"
    AMBIGUOUS = "ambiguous"


def parse_verdict(raw: str, kind: str, finish_reason: str) -> records.Outcome:
    """Outcome of a judge's answer: its JSON object with whole numbers `best` and `worst`; thinking is set aside."""
    if cut := records.unfinished(raw, finish_reason):
        return cut
    objects = [{k: str(v.get(k, "")) for k in ("best", "worst", "reason")} for v in records.objects(raw)]
    verdicts = [v for v in objects if all(re.fullmatch("[0-9]{1,3}", v[k]) for k in ("best", "worst"))]
    if not verdicts:
        return records.invalid((NoVerdict.NO_INDEX if objects else NoVerdict.NO_OBJECT).value, raw)
    if len({(v["best"], v["worst"]) for v in verdicts}) > 1:
        return records.invalid(NoVerdict.AMBIGUOUS.value, raw)
    return records.Outcome(records.Status.OK, record={**verdicts[-1]}, raw=raw)

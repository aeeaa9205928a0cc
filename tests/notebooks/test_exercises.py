"""Exercises: each has a solution that is right, a stub that is not, and hints for the usual mistakes."""

import math
import re
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from scipy.stats import norm

import classroom
from speed_core import profile as profiles
from speed_core import reference
from speed_core.data import prompts
from speed_core.evaluation import uncertainty
from speed_core.files import UserError
from speed_core.runner import notebook
from speed_core.store.artifacts import notebook_number
from speed_core.store.run_context import ROOT
from speed_core.study import student_questions, verdicts
from workbook import exercises, findings

NOTEBOOKS = notebook.notebooks(ROOT / "notebooks")


def seed(query, positive, negative):
    return f'{{"user_query":"{query}","positive_document":"{positive}","hard_negative_document":"{negative}"}}'


PAIRS = [
    {"chosen": "one two three", "rejected": "one two"},
    {"chosen": "one two", "rejected": "three four five"},
    {"chosen": "one two", "rejected": "a b"},  # as many words, more characters
    {"chosen": "one two four", "rejected": "one"},
    {"chosen": "a", "rejected": "b c"},
]
POINTS = [
    {"guide": g, "labels": s, "margin": m, "precision": p, "recall": r}
    for g, s, values in (
        ("MiniLM", "several answers to a question", [(-0.1, 0.9, 0.1), (0.0, 0.52, 0.2), (0.1, 0.3, 0.5), (0.2, 0.1, 0.9)]),
        ("MiniLM", "20 Newsgroups", [(-0.1, 0.5, 0.1), (0.0, 0.3, 0.2), (0.1, 0.2, 0.5), (0.2, 0.1, 0.9)]),
        ("TF-IDF", "several answers to a question", [(-0.1, 0.9, 0.1), (0.0, 0.8, 0.2), (0.1, 0.7, 0.5), (0.2, 0.5, 0.9)]),
        ("MiniLM, 2 of 6 layers", "several answers to a question", [(-0.1, 0.9, 0.1), (0.2, 0.5, 0.9)]),
    )
    for m, p, r in values
]
# What a checker is given beside the answer. `names` are what the solution cell finds in its notebook.
FACTS = {
    "01.1": {"topics": ["Arts/Music/Jazz/Piano/Trio", "Home/Garden", "A/B/C"]},
    "04.2": {"pairs": PAIRS},
    "05.2": {"gain": [1.0, -0.5, 0.0, 0.3]},
    "06.2": {"issued": 100, "valid": 80, "dropped": [{"dropped_by": "near-duplicate"}] * 6 + [{"dropped_by": "evaluation overlap"}] * 5},
    "07.3": {"points": POINTS},
    "00.1": {"prompts": 120},
}  # fmt: skip


class Rows:
    """An artifact as far as solutions read it."""

    def __init__(self, rows, **manifest):
        self._rows, self.manifest = rows, manifest

    def rows(self, name="data.jsonl"):
        return self._rows


def names(number):
    """What the cells before the exercises have left behind, as far as the solutions use it."""
    known = {
        "02": {"prompts": prompts},
        "04": {"pairs": Rows(PAIRS)},
        "05": {"prompts": prompts, "gain": FACTS["05.2"]["gain"]},
        "06": {"dropped": FACTS["06.2"]["dropped"], "outcomes": {"ok": 80}},
        "07": {"points": POINTS, "reference": reference},
        "00": {"profiles": profiles, "run": SimpleNamespace(profile=profiles.load("tiny"))},
        "08": {"reference": reference},
        "10": {"verdicts": verdicts},
        "12": {"verdicts": verdicts},
    }
    return {"np": np, "torch": torch} | known.get(number, {})


def parts(path):
    """(name of the exercise, source of its solution cell, its stub, source of its checker cell) for each exercise."""
    nb = nbformat.read(path, 4)
    solutions, checkers = classroom.tagged(nb, "solution"), classroom.tagged(nb, "checker")
    assert len(solutions) == len(checkers)
    return [
        (f"{notebook_number(path)}.{k}", s.source, s.metadata["speed"]["stub"], c.source)
        for k, (s, c) in enumerate(zip(solutions, checkers, strict=True), 1)
    ]


EVERY = [pytest.param(*p, id=p[0]) for path in NOTEBOOKS for p in parts(path)]


def test_every_notebook_has_exercises_with_question_solution_and_checker():
    assert sorted(p.values[0] for p in EVERY) == sorted(exercises.CHECKERS)
    assert {p.values[0].split(".")[0] for p in EVERY} == {notebook_number(p) for p in NOTEBOOKS}
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        for i in [i for i, c in enumerate(cells) if "solution" in c.metadata.get("tags", [])]:
            assert "Exercise" in question(cells, i) and cells[next_code(cells, i)].metadata["tags"] == ["checker"]


def question(cells, i):
    """The text above cell i."""
    return next(c.source for c in reversed(cells[:i]) if c.cell_type == "markdown")


def next_code(cells, i):
    return next(k for k in range(i + 1, len(cells)) if cells[k].cell_type == "code")


CHANGES = (
    "01.1",
    "02.1",
    "03.2",
    "04.1",
    "05.1",
    "06.1",
    "07.2",
    "07b.1",
    "08.1",
    "08.2",
    "09.2",
    "10.1",
    "11.1",
    "12.2",
)  # the reference code, changed by the reader
CHANGED = ("reference.", "prompts.", "verdicts.", "uncertainty.", "student_questions.")  # where that code is


def test_who_changes_the_reference_code_sees_the_effect_solved_or_not():
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        solutions = [i for i, c in enumerate(cells) if "solution" in c.metadata.get("tags", [])]
        for k, solved in enumerate(solutions, 1):
            changes, i = f"{notebook_number(path)}.{k}" in CHANGES, next_code(cells, solved)
            assert ("Change the reference code" in question(cells, solved)) == changes
            assert cells[i + 1].source.startswith("**The effect.**") == changes
            effect = cells[i + 2].source if changes else ""
            assert not changes or f"answer_{k}" in effect and any(m in effect for m in CHANGED)


def toy_results(*scores):
    """Results of one training seed for each score."""
    return [{"tasks": {"toy": {"type": "STS", "score": v / 100, "items": []}}} for v in scores]


EFFECTS = {
    "01": {"deep": ["A/B/C/D/E/F"]},
    "02": {"table": "paper"},
    "03": {},
    "04": {},
    "05": {"first": {"prompt": "Write one example.", "weak": "a weak sample"}},
    "06": {"three": ["how long do hens lay eggs in a year"]},
    "07": {"toy": np.eye(6, dtype=np.float32)},
    "09": {"chosen": "t", "results": {a: [{"tasks": {"t": {"items": [0.1 * k, 0.5, 1.0]}}}] for k, a in enumerate(("guided", "plain"))}},
    "08": {"toy": torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=2)}
    | {"hidden": torch.randn(3, 5, 4), "read": {"attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0]])}},
    "07b": {"np": np, "uncertainty": uncertainty, "student_questions": student_questions}
    | {"toy_scores": {(k, arm): toy_results(50.0 + k, 51.0) for k in (1, 4) for arm in ("guided", "plain")}},
    "10": {},
    "11": {"uncertainty": uncertainty, "results": {n: toy_results(20.0 + n) for n in (2, 4)}, "sizes": [2, 4], "y": [22.0, 24.0]},
    "12": {
        "findings": findings, "rule": findings.in_a_word,
        "rows": [{"id": "S4", "low": 0.2, "high": 1.4, "verdict": verdicts.Verdict.SMALLER}],
    },
}  # fmt: skip


@pytest.mark.parametrize("tried", ["solution", "stub"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_effect_is_shown_for_a_solution_and_for_a_stub(name, tried, capsys):
    number, k = name.split(".")
    (path,) = [p for p in NOTEBOOKS if notebook_number(p) == number]
    _, solution, stub, _ = parts(path)[int(k) - 1]
    space = names(number) | EFFECTS[number] | {"reference": reference}
    exec({"solution": solution, "stub": stub}[tried], space)
    cells = nbformat.read(path, 4).cells
    effects = [cells[i + 1].source for i, c in enumerate(cells) if c.source.startswith("**The effect.**")]
    (effect,) = [e for e in effects if f"answer_{k}" in e]
    exec(effect, space)
    assert ("None" in capsys.readouterr().out) == (tried == "stub")


def answer_of(source, number, k):
    space = names(number)
    exec(source, space)
    return space[f"answer_{k}"]


@pytest.mark.parametrize("name, solution, stub, checker", EVERY)
def test_the_solution_is_right_and_the_stub_is_told_that_it_is_unanswered(name, solution, stub, checker):
    number, k = name.split(".")
    assert re.search(rf'exercises\.(check|use)\("{name}", answer_{k}\b', checker)
    assert exercises.hint(name, answer_of(solution, number, k), **FACTS.get(name, {})) == ""
    assert exercises.UNANSWERED in exercises.hint(name, answer_of(stub, number, k), **FACTS.get(name, {}))


@pytest.mark.parametrize("name, solution, stub, checker", EVERY)
def test_a_hint_never_holds_the_solution(name, solution, stub, checker):
    number, k = name.split(".")
    right = answer_of(solution, number, k)
    for wrong in (..., None, "nonsense", -7.25, [1, 2], {}, lambda *a: 1 / 0, lambda *a: "nonsense", lambda *a: -7.25):
        why = exercises.hint(name, wrong, **FACTS.get(name, {}))
        assert why and not any(line.strip() in why for line in solution.splitlines() if len(line.strip()) > 3)
        for value in np.ravel(right) if isinstance(right, (float, tuple)) else []:
            assert f"{value:.3f}" not in why


def mask_rule(compare, sign=1):
    return lambda g, m: compare(g, np.diag(g)[:, None] - sign * m)


def dpo(a, b, c, d, beta, e):
    return (1 - e) * reference.dpo_loss(a, b, c, d, beta) + e * reference.dpo_loss(b, a, d, c, beta)


def own_texts(q, p, n, t, label=0):
    own = torch.stack([(q * p).sum(1), (q * n).sum(1)], dim=1)
    return torch.nn.functional.cross_entropy(own / t, torch.full((len(q),), label))


def instead(low, high, expected, where):
    """What the rule says, but "fails" for "open" where `where` holds."""
    word = findings.in_a_word(low, high, expected)
    return "fails" if where and word == "open" else word


def flip(word):
    return {"holds": "fails", "fails": "holds"}.get(word, word)


def widened(low, high, expected, by):
    middle, half = (low + high) / 2, (high - low) / 2 * by
    return verdicts.verdict(middle - half, middle + half, expected)


def copied(texts):
    return torch.tensor([[a == b for b in texts] for a in texts])


def terms_of(scores, layers, weight):
    return [t for k in layers for t in ((weight(k), scores[k, "guided"], None), (-weight(k), scores[k, "plain"], None))]


def place(mask):
    return mask.cumsum(1) * mask


def fit(scores, log, weights):
    return float(np.polyfit(log(list(scores)), list(scores.values()), 1, w=weights)[0])


def error(values):
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def characters(a, b, size):
    return len(runs(a, size) & runs(b, size)) / len(runs(a, size) | runs(b, size))


def runs(text, size):
    return {text.lower()[i : i + size] for i in range(len(text) - size + 1)}


def row_losses(logits, ids, scored):
    one = [reference.completion_loss(x[None], i[None], s[None]) for x, i, s in zip(logits, ids, scored, strict=True)]
    return torch.stack(one)


MISTAKES = [
    ("01.1", lambda p, d: "/".join(p.split("/")[:d]), "the end of a path"),
    ("01.1", lambda p, d: "/".join(p.split("/")[-d:]), "the beginning of a path"),
    ("01.1", prompts.truncate_topic, "the reference still"),
    ("01.1", lambda p, d: prompts.truncate_topic(p), "always leaves four"),
    ("01.1", lambda p, d: "A", "cases differ"),
    ("01.1", lambda p: p, "TypeError"),
    ("01.1", "A/B/E/F", "a function is asked for"),
    ("01.2", {"read": '["a task"]', "refused": "[f()]"}, "JSON already"),
    ("01.2", {"read": "no list", "refused": "[f()]"}, "refuses it as no_list"),
    ("01.2", {"read": "['a']", "refused": "['b']"}, "the reader takes it"),
    ("01.2", {"read": "['a']", "refused": "[f("}, "Python itself"),
    ("01.2", {"read": "['a']", "refused": "[1, 2]"}, "no call inside"),
    ("01.2", {"read": "['a']", "refused": ...}, "refused"),
    ("02.1", lambda i, table, name: prompts.draw_attribute(prompts.rng_for(i), table, name), "by the id alone"),
    ("02.1", lambda i, table, name: prompts.draw_attribute(prompts.rng_for(name), table, name), "by the name alone"),
    ("02.1", lambda i, table, name: prompts.draw_attribute(prompts.rng_for(f"{i}/{name}"), "paper", name), "table is not used"),
    ("02.1", lambda i, table, name: prompts.draw_attribute(prompts.rng_for(f"{name}/{i}"), table, name), "changed places"),
    ("02.1", lambda i, table, name: "clear", "cases differ"),
    ("02.2", {"lost": "{", "kept": "{"}, "our parser says invalid"),
    ("02.2", {"lost": seed("a", "b", "c"), "kept": "{"}, "the released parser says kept"),
    ("02.2", {"lost": "so: " + seed("a", "b}", "c"), "kept": seed("a", "b", "c")}, "takes it as well"),
    ("02.2", {"lost": "so: " + seed("a", "b}", "c"), "kept": "{"}, "must still be JSON"),
    ("03.1", lambda p, c, e: (p + c + [e], [1] * (len(p + c) + 1)), "the prompt is scored"),
    ("03.1", lambda p, c, e: (p + c, [0] * len(p) + [1] * len(c)), "never stops"),
    ("03.1", lambda p, c, e: (p + c + [e], [0] * len(p) + [1] * len(c) + [0]), "never learnt"),
    ("03.1", lambda p, c, e: (p + c + [e], [1] * len(p) + [0] * len(c + [e])), "wrong way round"),
    ("03.1", lambda p, c, e: (p + c + [e], [0] * len(p) + [1] * len(c)), "entries"),
    ("03.1", lambda p, c, e: p + c, "two lists"),
    ("03.2", reference.completion_loss, "the reference still"),
    ("03.2", lambda x, i, s: row_losses(x, i, s), "for each row"),
    ("03.2", lambda x, i, s: row_losses(x, i, s).sum(), "the sum over the rows"),
    ("03.2", lambda x, i, s: row_losses(x, i, torch.ones_like(s)).mean(), "the prompt is scored"),
    ("03.2", lambda x, i, s: -row_losses(x, i, s).mean(), "other sign"),
    ("03.2", lambda x, i, s: 2.0, "6 of 6 cases differ"),
    ("04.1", lambda a, b, c, d, beta, e: reference.dpo_loss(a, b, c, d, beta), "Eq. 2 as it was"),
    ("04.1", lambda a, b, c, d, beta, e: dpo(b, a, d, c, beta, e), "changed places"),
    ("04.1", lambda a, b, c, d, beta, e: reference.dpo_loss(a, b, c, d, beta * (1 - 2 * e)), "mix the two losses"),
    ("04.1", lambda a, b, c, d, beta, e: dpo(a, b, c, d, 1, e), "beta is not used"),
    ("04.1", lambda a, b, c, d, beta, e: dpo(a, b, 0, 0, beta, e), "reference model is missing"),
    ("04.1", lambda *case: -dpo(*case), "other sign"),
    ("04.1", lambda *case: 0.7, "20 of 20 cases differ"),
    ("04.2", 0.6, "equal length"),
    ("04.2", 2, "divide it"),
    ("04.2", 0.75, "another share"),
    ("05.1", prompts.revise, "the reference still"),
    ("05.1", lambda p, s: s, "the sample alone"),
    ("05.1", lambda p, s: prompts.revise("", s), "an empty line"),
    ("05.1", lambda p, s: prompts.revise("", s).strip()[3:], "cases differ"),
    ("05.1", lambda p, s: prompts.revise(p, "").removeprefix(f"{p}\n\n"), "the weak sample is missing"),
    ("05.2", (0.8, 1.3), "the first is a sum"),
    ("05.2", (0.2, 0.65), "forgets the records"),
    ("05.2", (0.2, 0.2), "first again"),
    ("05.2", (0.2, 0.1), "cannot be smaller"),
    ("06.1", reference.jaccard, "runs of words"),
    ("06.1", lambda a, b, size: characters(a, b, 1), "single characters"),
    ("06.1", lambda a, b, size: characters(a.replace(" ", ""), b.replace(" ", ""), size), "a space is a character"),
    ("06.1", lambda a, b, size: len(runs(a, size) & runs(b, size)) / len(runs(b, size)), "cases differ"),
    ("06.1", lambda *case: 1 - characters(*case), "a distance"),
    ("06.2", 0.69, "every loss"),
    ("06.2", 0.74, "divided by the prompts"),
    ("06.2", 69 / 80, "no duplicates"),
    ("06.2", 6 / 80, "dropped"),
    ("07.1", mask_rule(np.greater), "own pair is removed"),
    ("07.1", lambda g, m: mask_rule(np.greater, -1)(g, m) & ~np.eye(4, dtype=bool), "wrong way"),
    ("07.1", lambda g, m: (g > np.diag(g) - m) & ~np.eye(4, dtype=bool), "that of the column"),
    ("07.1", lambda g, m: mask_rule(np.greater_equal)(g, m) & ~np.eye(4, dtype=bool), "exactly as alike"),
    ("07.1", lambda g, m: ~(mask_rule(np.greater)(g, m) & ~np.eye(4, dtype=bool)), "marks what stays"),
    ("07.1", lambda g, m: g[0] > m, "a 4 x 4 array"),
    ("07.3", 0.1, "half of the false negatives"),
    ("07.3", -0.1, "newsgroups"),
    ("07.3", 0.2, "weaker guide"),
    ("07.3", 0.07, "not tried"),
    ("07.2", lambda g, t, m: reference.guide_mask(g, m).fill_diagonal_(False), "the reference still"),
    ("07.2", lambda g, t, m: reference.guide_mask(g, m) | copied(t), "a copy of itself"),
    ("07.2", lambda g, t, m: (g >= g.diagonal()[:, None] - m).fill_diagonal_(False), "another text may be exactly as alike"),
    ("07.2", lambda g, t, m: copied(t).fill_diagonal_(False), "only copies are removed"),
    ("07.2", lambda g, t, m: reference.guide_mask(g, m) & ~copied(t), "yours protects it"),
    ("07.2", lambda g, t, m: ~(reference.guide_mask(g, m) | copied(t)).fill_diagonal_(False), "marks what stays"),
    ("07.2", lambda g, t, m: g[0] > m, "True or False for each"),
    ("07b.1", student_questions.gain, "the reference still"),
    ("07b.1", lambda s, layers: terms_of(s, layers, lambda k: k), "sum to more than 1"),
    ("07b.1", lambda s, layers: terms_of(s, layers, lambda k: 1 / k / sum(1 / n for n in layers)), "a small student counts more"),
    ("07b.1", lambda s, layers: terms_of(s, layers, lambda k: -k / sum(layers)), "turned round"),
    ("07b.1", lambda s, layers: 0.7, "a list of terms"),
    ("07b.2", lambda a, b: float(np.hypot(error(a), error(b))), "seeds of their own"),
    ("07b.2", lambda a, b: float(np.subtract(a, b).std(ddof=1)), "spread of single seeds"),
    ("07b.2", lambda a, b: float(np.subtract(a, b).std() / len(a) ** 0.5), "one seed less"),
    ("07b.2", lambda a, b: error(np.subtract(a, b)) ** 2, "this is a variance"),
    ("07b.2", lambda a, b: float(np.subtract(a, b).mean()), "how sure is it"),
    ("07b.2", lambda a, b: 1.96 * error(np.subtract(a, b)), "half the width"),
    ("08.1", reference.info_nce, "the reference still"),
    ("08.1", lambda q, p, n, t: own_texts(q, p, n, 1 / t), "multiplied"),
    ("08.1", lambda q, p, n, t: own_texts(q, p, n, 1), "temperature is not used"),
    ("08.1", lambda q, p, n, t: own_texts(q, p, n, t, label=1), "taken for the positive"),
    ("08.1", lambda *case: -own_texts(*case), "other sign"),
    ("08.1", lambda q, p, n, t: len(q) * own_texts(q, p, n, t), "sum over the queries"),
    ("08.2", reference.mean_pooling, "the reference still"),
    ("08.2", reference.last_token_pooling, "the last token alone"),
    ("08.2", lambda h, m: reference.mean_pooling(h, torch.ones_like(m).cumsum(1)), "the padding is in the mean"),
    ("08.2", lambda h, m: (h * place(m)[..., None]).sum(1) / place(m).sum(1)[:, None], "not of length 1"),
    ("08.2", lambda h, m: torch.nn.functional.normalize((h * (place(m) - 1).clamp(0)[..., None]).sum(1), dim=1), "begin at 1"),
    ("08.2", lambda h, m: h[:, -1, 0], "a vector for each text"),
    ("09.1", lambda r: 1 / math.log2(r + 1), "what does @10 say"),
    ("09.1", lambda r: 1 / r if r <= 10 else 0, "reciprocal rank"),
    ("09.1", lambda r: 1 / math.log(r + 1) if r <= 10 else 0, "another base"),
    ("09.2", lambda a, b: np.quantile(draws(a, 0) - draws(b, 1), [0.025, 0.975]), "drawn apart"),
    ("09.2", lambda a, b: np.quantile(draws(b - a, 0), [0.025, 0.975]), "turned round"),
    ("09.2", lambda a, b: np.quantile(a - b, [0.025, 0.975]), "single items"),
    ("09.2", lambda a, b: np.quantile(draws(a - b, 0), [0.975, 0.025]), "above the high end"),
    ("09.2", lambda a, b: np.quantile(draws(a - b, 0), [0.25, 0.75]), "narrower"),
    ("10.1", lambda a, b, m: verdicts.verdict(a, b), "the reference still"),
    ("10.1", lambda a, b, m: verdicts.verdict(a + m, b + m), "the wrong way"),
    ("10.1", lambda a, b, m: verdicts.verdict(a - m, a - m), "decides nothing"),
    ("10.1", lambda a, b, m: verdicts.verdict(a - m, b) if a > m or b < 0 else verdicts.verdict(-1, 1), "contradicts the claim"),
    ("10.1", lambda a, b, m: verdicts.verdict(b - m, b - m), "not its upper end alone"),
    ("10.1", lambda a, b, m: findings.in_a_word(a - m, b - m), "24 of 24 cases differ"),
    ("10.2", lambda a, b, n, e: n * (b - a) / 2 / e, "square root"),
    ("10.2", lambda a, b, n, e: n * ((b - a) / e) ** 2, "whole width"),
    ("10.2", lambda a, b, n, e: ((b - a) / 2 / e) ** 2, "how many times more"),
    ("11.1", lambda s: float(np.polyfit(np.log2(list(s)), list(s.values()), 1)[0]), "the reference still"),
    ("11.1", lambda s: fit(s, np.log, np.sqrt(list(s))), "natural"),
    ("11.1", lambda s: fit(s, np.array, np.sqrt(list(s))), "points a record"),
    ("11.1", lambda s: fit(s, np.log2, 1 / np.sqrt(list(s))), "few records count most"),
    ("11.1", lambda s: fit(s, np.log2, np.sqrt(np.log2(list(s)))), "the records themselves"),
    ("11.2", lambda n, s, g: n * (1 + g / s), "straight line"),
    ("11.2", lambda n, s, g: g / s, "how many doublings"),
    ("11.2", lambda n, s, g: 2 ** (g / s), "multiply by the records"),
    ("12.1", lambda a, b, e: findings.in_a_word(a, b, abs(e)), "a claimed fall"),
    ("12.1", lambda a, b, e: findings.in_a_word(a, b, e or 1), "a claim of no difference"),
    ("12.1", lambda a, b, e: "holds" if a == 0 else findings.in_a_word(a, b, e), "still inside it"),
    ("12.1", lambda a, b, e: instead(a, b, e, not e), "across the one-point margin"),
    ("12.1", lambda a, b, e: instead(a, b, e, e), "does not contradict"),
    ("12.1", lambda a, b, e: verdicts.verdict(a, b, e), "12 of 12 cases differ"),
    ("12.1", lambda a, b, e: flip(findings.in_a_word(a, b, e)), "changed places"),
    ("12.2", lambda a, b, e, n: verdicts.verdict(a, b, e), "nothing became wider"),
    ("12.2", lambda a, b, e, n: widened(a, b, e, norm.ppf(1 - 0.05 / n) / norm.ppf(0.975)), "two sides"),
    ("12.2", lambda a, b, e, n: widened(a, b, e, n), "multiplied by the number"),
    ("12.2", lambda a, b, e, n: widened(a, b, e, norm.ppf(0.975) / norm.ppf(1 - 0.025 / n)), "became narrower"),
    ("00.1", 120 / 1_150_000, "turn it over"),
    ("00.1", 1_150_000, "divide by yours"),
    ("00.1", 40, "another number"),
    ("00.2", "junior.epocs", "the misspelled name itself"),
    ("00.2", "epochs", "no setting"),
    ("00.2", "junior.lr", "not the one"),
]  # fmt: skip


def draws(values, seed):
    picks = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return values[picks].mean(1)


@pytest.mark.parametrize("name, answer, wanted", MISTAKES, ids=[f"{m[0]}-{m[2][:24]}" for m in MISTAKES])
def test_a_usual_mistake_has_a_hint_of_its_own(name, answer, wanted):
    assert wanted in exercises.hint(name, answer, **FACTS.get(name, {}))


def test_every_exercise_is_in_the_table_of_mistakes():
    assert {m[0] for m in MISTAKES} == set(exercises.CHECKERS)


def test_a_notebook_goes_on_with_an_answer_that_is_right_and_else_with_its_own(capsys):
    def right(low, high, items, effect):
        return items * ((high - low) / 2 / effect) ** 2

    assert exercises.use("10.2", right, None) is right
    assert exercises.use("10.2", lambda *a: 1.0, right) is right
    assert exercises.use("10.2", ..., right) is right
    assert capsys.readouterr().out.count("not yet") == 2


def test_check_prints_one_line_and_never_stops_a_notebook(capsys):
    exercises.check("09.1", ...)
    exercises.check("09.1", lambda rank: {}["no"])
    exercises.check("09.1", lambda rank: 1 / np.log2(rank + 1) * (rank <= 10))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("09.1: not yet - ") and "KeyError" in second and third == "09.1: right"
    with pytest.raises(ValueError, match="unknown; there are 00.1"):
        exercises.check("99.1", 0)


def test_the_students_copy_holds_no_solution_and_nothing_else_changes(tmp_path):
    for path in classroom.write(tmp_path / "copy"):
        ours, theirs = nbformat.read(ROOT / "notebooks" / path.name, 4), nbformat.read(path, 4)
        text = "\n".join(c.source for c in theirs.cells)
        for _, solution, stub, _ in parts(ROOT / "notebooks" / path.name):
            own = [line.strip() for line in solution.splitlines() if line not in stub and len(line.strip()) > 15]
            assert own and not [line for line in own if line in text]
        assert '"solution"' not in path.read_text() and '"stub"' not in path.read_text()
        for a, b in zip(ours.cells, theirs.cells, strict=True):
            if "exercise" in b.metadata.get("tags", []):
                assert "..." in b.source and a.source not in text
            else:
                assert a == b


def test_a_folded_students_copy_keeps_each_solution_closed_behind_its_checker(tmp_path):
    for path in classroom.write(tmp_path / "lab", folded=True):
        ours, theirs = nbformat.read(ROOT / "notebooks" / path.name, 4), nbformat.read(path, 4)
        nbformat.validate(theirs)
        folded = [i for i, c in enumerate(theirs.cells) if c.cell_type == "markdown" and c.id.endswith("-solution")]
        solutions = classroom.tagged(ours, "solution")
        assert len(folded) == len(solutions) and (solutions or path.stem[:2] == "00")
        for i, solution in zip(folded, solutions, strict=True):
            text = theirs.cells[i].source
            assert text.startswith("<details><summary>Solution</summary>\n\n```python\n") and text.endswith("```\n\n</details>")
            assert solution.source in text and theirs.cells[i].cell_type == "markdown"
            assert "checker" in theirs.cells[i - 1].metadata["tags"]
        assert not classroom.tagged(theirs, "solution")
        assert [c for i, c in enumerate(theirs.cells) if i not in folded] == classroom.student_copy(
            ROOT / "notebooks" / path.name
        ).cells


def test_a_copy_that_is_kept_gets_what_is_missing_and_no_work_is_lost(tmp_path):
    first, second = classroom.write(tmp_path, folded=True, keep=True)[1:3]
    first.write_text(first.read_text().replace("# your turn", "# my work"))
    second.unlink()
    classroom.write(tmp_path, folded=True, keep=True)
    assert "my work" in first.read_text() and second.is_file()
    with pytest.raises(UserError, match="--force overwrites"):
        classroom.main(tmp_path, force=True, keep=True)


def test_an_exercise_without_a_checker_is_refused(tmp_path):
    nb = nbformat.read(NOTEBOOKS[0], 4)
    nb.cells = [c for c in nb.cells if "checker" not in c.metadata.get("tags", [])]
    nbformat.write(nb, tmp_path / "01_a.ipynb")
    with pytest.raises(UserError, match="01_a.ipynb: 2 solutions and 0 checkers"):
        classroom.student_copy(tmp_path / "01_a.ipynb")


def test_make_lab_opens_the_folded_copy_and_keeps_what_is_there():
    target = re.search(r"^lab: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M).group(1)
    assert "scripts/classroom.py lab --folded --keep" in target and " lab/00_preflight.ipynb" in target


def test_work_of_a_student_is_not_overwritten(tmp_path):
    first = classroom.write(tmp_path)[1]
    classroom.write(tmp_path)
    first.write_text(first.read_text().replace("# your turn", "# my work"))
    with pytest.raises(UserError, match="01_task_brainstorming.ipynb: somebody worked in it"):
        classroom.write(tmp_path)
    assert "my work" in first.read_text()
    classroom.write(tmp_path, force=True)
    assert "my work" not in first.read_text()


def test_the_lesson_plan_takes_its_running_times_from_the_notebooks_and_leaves_no_gap():
    text = (ROOT / "notebooks" / "README.md").read_text()
    planned = re.search(r"^\| run, minutes \|(.*)\|$", text, re.M).group(1).split("|")
    for path, minutes in zip(notebook.notebooks(ROOT / "notebooks"), planned, strict=True):
        card = nbformat.read(path, 4).cells[1].source
        measured = re.search(r"\| time \| (\d+) min at `tiny`", card)
        assert int(minutes) == (int(measured.group(1)) if measured else 0), path.stem
    for part, end in (("## Half a day", 210), ("## A full day", 420)):
        table = text[text.index(part) :].split("**Skip**")[0]
        slots = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) - (\d+) \|", table, re.M)]
        assert [a for a, _ in slots] == [0, *(b for _, b in slots[:-1])] and slots[-1][1] == end

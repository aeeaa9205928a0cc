"""Every prompt of the pipeline: brainstorm, synthesis, judge, revise.

The content follows the two prompt families that SPEED published (its appendix C and released
prompts), in our own words. The originals, byte for byte, are read from a user's own clone when
`style="faithful"`; they are not part of this repository.

Attributes (document length, clarity, ...) are drawn per record from a generator seeded with the
record id, so a prompt does not depend on the order of requests, on the number of workers or on
any global random state.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from speed_core.data.records import KEYS
from speed_core.files import ASSETS, UserError

BUILDER_VERSION = 1  # part of every record id: a changed builder makes new ids
BRAINSTORM_KINDS = ("retrieval", "classification", "short_short", "long_long")  # STS takes the topic
STS_TASK = "Retrieve semantically similar text."  # one instruction for all STS records (SPEED Fig. 9)

# Values and weights as released by SPEED (paper-facts, section 1.1).
# "short" keeps every weight and divides the lengths, because a 270M model on two CPU cores writes
# about a hundred tokens a second; the lengths are the only thing it changes.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "paper": {
        "document_words": ((50, 100, 200, 300, 400, 500), None),
        "classification_length": (
            ("less than 10", "at least 10", "at least 50", "at least 100", "at least 200"),
            (0.1, 0.3, 0.2, 0.2, 0.2),
        ),
        "long_words": 300,
    },
    "short": {
        "document_words": ((12, 16, 20, 24, 28, 32), None),
        "classification_length": (
            ("less than 10", "at least 10", "at least 15", "at least 20", "at least 25"),
            (0.1, 0.3, 0.2, 0.2, 0.2),
        ),
        "long_words": 30,
    },
}
_COMMON: dict[str, tuple[tuple[Any, ...], tuple[float, ...] | None]] = {
    "query_type": (("extremely long-tail", "long-tail", "common"), (0.4, 0.5, 0.1)),
    "query_length": (("less than 5 words", "5 to 15 words", "at least 10 words"), (0.4, 0.4, 0.2)),
    "clarity": (("clear", "understandable with some effort", "ambiguous"), (0.6, 0.2, 0.2)),
    "difficulty": (("high school", "college", "PhD"), None),
    "sts_difficulty": (("elementary school", "high school", "college"), None),
    "unit": (("sentence", "phrase", "passage"), (0.9, 0.05, 0.05)),
    "high_score": ((4, 4.5, 5), None),
    "low_score": ((2.5, 3, 3.5), None),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt and everything that decided it.

    `id` is the record id (see `record_id`); `digest` is the SHA-256 of `text`, the key under which a
    recorded answer is found.
    """

    id: str
    kind: str
    topic: str
    task: str
    text: str
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return text_digest(self.text)


def read_back(kind: str, task: str, text: str) -> Prompt:
    """A `Prompt` from the text of a synthesis prompt in our own words: topic of an STS prompt, and the lengths asked for."""
    patterns = {
        "document_words": r"Each document has at least (\d+) words",
        "classification_length": r"The input_text has ((?:at least|less than) \d+) words",
        "long_words": r"Both texts are a document of at least (\d+) words",
    }
    found = {k: m[1] for k, pattern in patterns.items() if (m := re.search(pattern, text))}
    topic = re.search(r"similarity on the topic: (.+)", text)
    return Prompt(text_digest(text)[:16], kind, topic[1] if topic else "", task, text, found)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_id(**fields: Any) -> str:
    """Digest of canonical JSON of everything that decides a prompt (16 hex digits)."""
    canonical = json.dumps({"builder": BUILDER_VERSION, **fields}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def rng_for(identifier: str) -> random.Random:
    """A private random generator that depends on the record id alone."""
    return random.Random(int(hashlib.sha256(identifier.encode()).hexdigest(), 16))


def load_topics(path: Path | None = None) -> list[str]:
    """Topic paths, one a line, '#' starts a comment. Default: the list of this repository."""
    path = path or ASSETS / "topics.txt"
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def truncate_topic(path: str, max_depth: int = 4) -> str:
    """Drop the middle levels of a path deeper than `max_depth` (SPEED section 3.2.1).

    The paper's one example keeps the first two and the last two of six levels.

    >>> truncate_topic("A/B/C/D/E/F")
    'A/B/E/F'
    """
    levels = path.split("/")
    if len(levels) <= max_depth:
        return path
    head = (max_depth + 1) // 2
    return "/".join(levels[:head] + levels[len(levels) - (max_depth - head) :])


def draw_attribute(rng: random.Random, table: str, name: str) -> Any:
    """One value of the attribute `name`, with the weights of the `table` ("paper" or "short")."""
    values, weights = ATTRIBUTES[table][name] if name in ATTRIBUTES[table] else _COMMON[name]
    return rng.choices(values, weights)[0]


def brainstorm(kind: str, topic: str, *, count: int = 3, seed: int = 0, style: str = "own", clone: str = "") -> Prompt:
    """Ask for about `count` one-sentence tasks of `kind` on `topic`."""
    if kind not in BRAINSTORM_KINDS:
        raise ValueError(f"kind {kind!r}: no brainstorm prompt; use one of {', '.join(BRAINSTORM_KINDS)}")
    rid = record_id(stage="brainstorm", kind=kind, topic=topic, count=count, seed=seed, style=style)
    if style == "faithful":
        return Prompt(rid, kind, topic, "", _faithful_brainstorm(clone, kind, topic, rid))
    asks = {
        "retrieval": (
            "text retrieval tasks: a short query is used to find a document. "
            "Say in each task what the query is and what the wanted documents are",
            [
                "Given a question about gardening, retrieve forum answers that solve it.",
                "Given a scientific claim, retrieve abstracts that support or refute it.",
                "Given a product name, find the pages that explain how to repair it.",
            ],
        ),
        "classification": (
            "text classification tasks. Name the text and the labels or what they tell apart; "
            "avoid sentiment, subject, study field, genre, main topic, spam, urgency and language",
            [
                "Classify a message as a question, a request or an announcement.",
                "Given a recipe step, tell the cooking method that it describes.",
                "Tell whether a review talks about price, delivery or quality.",
            ],
        ),
        "short_short": (
            "text matching tasks in which the input and the matching text are both a phrase or a sentence",
            ["Match a word with its definition.", "Given the name of a person, find the work they are known for."],
        ),
        "long_long": (
            "text matching tasks in which the input and the matching text are both long documents",
            [
                "Given an essay for a position, find an essay that argues against it.",
                "Given a case report, find a report of a similar case.",
            ],
        ),
    }
    what, examples = asks[kind]
    examples = list(examples)
    rng_for(rid).shuffle(examples)
    lines = "\n".join(f"- {e}" for e in examples)
    text = (
        f"Brainstorm {what}.\nTopic: {topic}\nExamples for other topics:\n{lines}\n"
        f"Each task is one sentence of about ten words, covers many inputs and differs from the others.\n"
        f"Answer with a JSON list of about {count} strings and nothing else."
    )
    return Prompt(rid, kind, topic, "", text)


def synthesis(
    kind: str,
    topic: str,
    task: str,
    *,
    index: int = 0,
    seed: int = 0,
    stage: str = "seed",
    table: str = "paper",
    style: str = "own",
    clone: str = "",
) -> Prompt:
    """Ask for one example of `kind` as a JSON object.

    `index` tells apart several examples of one task; `stage` keeps the draws of, say, seed data and
    synthesis apart. For STS the `task` is ignored and the topic goes into the prompt directly.
    Raises ValueError for an unknown kind or attribute table.
    """
    if kind not in KEYS:
        raise ValueError(f"kind {kind!r}: unknown; use one of {', '.join(KEYS)}")
    if table not in ATTRIBUTES:
        raise ValueError(f"attributes {table!r}: unknown table; use one of {', '.join(ATTRIBUTES)}")
    task = STS_TASK if kind == "sts" else task
    rid = record_id(stage=stage, kind=kind, topic=topic, task=task, index=index, seed=seed, table=table, style=style)
    if style == "faithful":
        return Prompt(rid, kind, topic, task, _faithful_synthesis(clone, kind, topic, task, rid))
    rng = rng_for(rid)
    builder = {"retrieval": _retrieval, "classification": _classification, "sts": _sts}.get(kind, _matching)
    text, attributes = builder(rng, table, topic, task, kind)
    return Prompt(rid, kind, topic, task, text, attributes)


def _finish(head: str, keys: list[str], rules: list[str]) -> str:
    body = "\n".join(f"- {k}" for k in keys) + "\nRules:\n" + "\n".join(f"- {r}" for r in rules)
    return f"{head}\nKeys of the JSON object:\n{body}\nAnswer with one JSON object and nothing else."


def _retrieval(rng: random.Random, table: str, topic: str, task: str, kind: str) -> tuple[str, dict[str, Any]]:
    a = {
        "document_words": draw_attribute(rng, table, "document_words"),
        "difficulty": draw_attribute(rng, table, "difficulty"),
        "query_length": draw_attribute(rng, table, "query_length"),
        "clarity": draw_attribute(rng, table, "clarity"),
        "query_type": draw_attribute(rng, table, "query_type"),
        "ask_difficulty": rng.random() < 0.5,
    }
    rules = [
        f"The user_query is {a['query_type']}, {a['query_length']} long and {a['clarity']}.",
        f"Each document has at least {a['document_words']} words and does not copy the query.",
        "The hard_negative_document has some useful information but answers less well than the positive_document.",
        "No document explains why it is relevant or not.",
    ]
    if a["ask_difficulty"]:
        rules.append(f"Query and documents need {a['difficulty']} education to understand.")
    rng.shuffle(rules)
    keys = [
        '"user_query": a search query for this task',
        '"positive_document": a document that is relevant to the query',
        '"hard_negative_document": a document that only looks relevant',
    ]
    return _finish(f"Write one example for this retrieval task: {task}", keys, rules), a


def _classification(rng: random.Random, table: str, topic: str, task: str, kind: str) -> tuple[str, dict[str, Any]]:
    a = {
        "classification_length": draw_attribute(rng, table, "classification_length"),
        "difficulty": draw_attribute(rng, table, "difficulty"),
        "clarity": draw_attribute(rng, table, "clarity"),
        "ask_difficulty": rng.random() < 0.5,
    }
    rules = [
        f"The input_text has {a['classification_length']} words.",
        "The misleading_label is a possible label of the task, but fits the input_text less well than the label.",
        "The input_text contains neither label.",
    ]
    if a["ask_difficulty"]:
        rules.append(f"The input_text is {a['clarity']} and needs {a['difficulty']} education to understand.")
    rng.shuffle(rules)
    keys = [
        '"input_text": the text to classify',
        '"label": its correct label',
        '"misleading_label": a wrong label of the same task',
    ]
    return _finish(f"Write one example for this classification task: {task}", keys, rules), a


def _sts(rng: random.Random, table: str, topic: str, task: str, kind: str) -> tuple[str, dict[str, Any]]:
    a = {
        "high_score": draw_attribute(rng, table, "high_score"),
        "low_score": draw_attribute(rng, table, "low_score"),
        "unit": draw_attribute(rng, table, "unit"),
        "difficulty": draw_attribute(rng, table, "sts_difficulty"),
        "ask_difficulty": rng.random() < 0.5,
    }
    rules = [
        f"All three {a['unit']}s share some words.",
        f"On a scale from 1 to 5, S1 and S2 have similarity {a['high_score']}.",
        f"S1 and S3 have similarity {a['low_score']}.",
    ]
    if a["ask_difficulty"]:
        rules.append(f"The {a['unit']}s need {a['difficulty']} education to understand.")
    keys = [f'"{s}": a {a["unit"]}' for s in ("S1", "S2", "S3")]
    head = f"Write three {a['unit']}s of graded semantic similarity on the topic: {topic}"
    return _finish(head, keys, rules), a


def _matching(rng: random.Random, table: str, topic: str, task: str, kind: str) -> tuple[str, dict[str, Any]]:
    words = ATTRIBUTES[table]["long_words"]
    length = "a phrase or a sentence" if kind == "short_short" else f"a document of at least {words} words"
    rules = [
        f"Both texts are {length}.",
        "They share few words and neither refers to the other.",
    ]
    keys = ['"input": an input of the task', '"positive_document": a text that matches it']
    a = {"long_words": words} if kind == "long_long" else {}
    return _finish(f"Write one example for this matching task: {task}", keys, rules), a


def judge(prompt: str, candidates: list[str]) -> str:
    """Ask which candidate fits `prompt` best and which worst. Indices start at 0, and the prompt says so."""
    numbered = "\n".join(f"[{i}] {c}" for i, c in enumerate(candidates))
    return (
        f"A model was given this prompt:\n{prompt}\n\nIts outputs, numbered from 0:\n{numbered}\n\n"
        "Decide which output fits the prompt best and which fits it worst.\n"
        'Answer with one JSON object: "reason" (a string), "best" (an index), "worst" (another index).'
    )


def revise(prompt: str, sample: str) -> str:
    """Ask for a better version of `sample` (x of SPEED Eq. 3: prompt, task and root sample).

    The released prompt asks for {"reason", "revision"}; the revisor itself is trained on the
    revision alone, so this prompt asks for the revised object only.
    """
    return (
        f"{prompt}\n\nA first answer:\n{sample}\n\nRevise it: relevant to the task, complete, correct, "
        "true to every rule. Answer with the better JSON object and nothing else."
    )


# --- the byte-exact originals, from the reader's own clone -------------------------------------


@lru_cache(maxsize=4)
def _released_module(clone: str, name: str) -> ModuleType:
    path = Path(clone) / f"{name}.py"
    if not clone or not path.is_file():
        raise UserError(
            f"prompts.clone {clone!r}: the faithful style reads {name}.py from a clone of haon-chen/SPEED; "
            'clone it and set prompts.clone to that folder, or use prompts.style="own"'
        )
    spec = importlib.util.spec_from_file_location(f"speed_released_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"prompts.clone {clone!r}: {path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_seed(identifier: str, call: Any, *args: Any) -> str:
    """Run a released builder under private seeds (it draws from both global generators), then restore them."""
    import numpy as np

    seed = int(hashlib.sha256(identifier.encode()).hexdigest()[:8], 16)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        messages = call(*args)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return str(messages[-1]["content"])


def _faithful_brainstorm(clone: str, kind: str, topic: str, rid: str) -> str:
    module = _released_module(clone, "prompts_tasks")
    name = {
        "retrieval": "get_brainstorm_retrieval_tasks_prompt_with_topic_ICL",
        "classification": "get_brainstorm_classify_tasks_prompt_with_topic",
        "short_short": "get_brainstorm_s2s_tasks_prompt_with_topic",
        "long_long": "get_brainstorm_p2p_tasks_prompt_with_topic",
    }[kind]
    return _with_seed(rid, getattr(module, name), topic)


def _faithful_synthesis(clone: str, kind: str, topic: str, task: str, rid: str) -> str:
    module = _released_module(clone, "prompts_synthesis")
    if kind == "retrieval":
        return _with_seed(rid, module.get_create_retrieval_data_prompt, task)
    if kind == "classification":
        return _with_seed(rid, module.get_create_classify_data_prompt, task)
    if kind == "sts":
        return _with_seed(rid, module.get_sts_prompt_with_topic, topic)
    return _with_seed(rid, module.get_create_s2s_p2p_data_prompt, task, "s2s" if kind == "short_short" else "p2p")

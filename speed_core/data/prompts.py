"""Every prompt of the pipeline: brainstorm, synthesis, judge, revise.

The content follows the two prompt families that SPEED published (its appendix C and released prompts), in our own words. The
originals, byte for byte, are read from a user's own clone when `style="faithful"`; they are not part of this repository.

Attributes (document length, clarity, ...) are drawn per record from a generator seeded with the record id, so a prompt does not
depend on the order of requests, on the number of workers or on any global random state.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import runpy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from speed_core.data.records import KEYS
from speed_core.files import UserError

BUILDER_VERSION = 1  # part of every record id: a changed builder makes new ids
STS_TASK = "Retrieve semantically similar text."  # one instruction for all STS records (SPEED Fig. 9)

Choices = tuple[tuple[Any, ...], tuple[float, ...] | None]  # values, and their weights (None: equal)

# Values and weights as released by SPEED (paper-facts, section 1.1).
# "short" keeps every weight and divides the lengths, because a 270M model on two CPU cores writes
# about a hundred tokens a second; the lengths are the only thing it changes.
LENGTH_WEIGHTS = (0.1, 0.3, 0.2, 0.2, 0.2)
ATTRIBUTES: dict[str, dict[str, Choices]] = {
    "paper": {
        "document_words": ((50, 100, 200, 300, 400, 500), None),
        "classification_length": (("less than 10", "at least 10", "at least 50", "at least 100", "at least 200"), LENGTH_WEIGHTS),
        "long_words": ((300,), None),
    },
    "short": {
        "document_words": ((12, 16, 20, 24, 28, 32), None),
        "classification_length": (("less than 10", "at least 10", "at least 15", "at least 20", "at least 25"), LENGTH_WEIGHTS),
        "long_words": ((30,), None),
    },
}
_COMMON: dict[str, Choices] = {
    "query_type": (("extremely long-tail", "long-tail", "common"), (0.4, 0.5, 0.1)),
    "query_length": (("less than 5 words", "5 to 15 words", "at least 10 words"), (0.4, 0.4, 0.2)),
    "clarity": (("clear", "understandable with some effort", "ambiguous"), (0.6, 0.2, 0.2)),
    "difficulty": (("high school", "college", "PhD"), None),
    "sts_difficulty": (("elementary school", "high school", "college"), None),
    "unit": (("sentence", "phrase", "passage"), (0.9, 0.05, 0.05)),
    "high_score": ((4, 4.5, 5), None),
    "low_score": ((2.5, 3, 3.5), None),
}

# kind -> (what to brainstorm, examples). STS has no tasks: its prompts take the topic.
BRAINSTORM: dict[str, tuple[str, tuple[str, ...]]] = {
    "retrieval": (
        "text retrieval tasks: a short query is used to find a document. "
        "Say in each task what the query is and what the wanted documents are",
        (
            "Given a question about gardening, retrieve forum answers that solve it.",
            "Given a scientific claim, retrieve abstracts that support or refute it.",
            "Given a product name, find the pages that explain how to repair it.",
        ),
    ),
    "classification": (
        "text classification tasks. Name the text and the labels or what they tell apart; "
        "avoid sentiment, subject, study field, genre, main topic, spam, urgency and language",
        (
            "Classify a message as a question, a request or an announcement.",
            "Given a recipe step, tell the cooking method that it describes.",
            "Tell whether a review talks about price, delivery or quality.",
        ),
    ),
    "short_short": (
        "text matching tasks in which the input and the matching text are both a phrase or a sentence",
        ("Match a word with its definition.", "Given the name of a person, find the work they are known for."),
    ),
    "long_long": (
        "text matching tasks in which the input and the matching text are both long documents",
        (
            "Given an essay for a position, find an essay that argues against it.",
            "Given a case report, find a report of a similar case.",
        ),
    ),
}


@dataclass(frozen=True)
class Template:
    """A synthesis prompt: `{name}` stands for the task, the topic or an attribute. The order of `draws` decides what is drawn."""

    head: str
    keys: tuple[str, ...]
    rules: tuple[str, ...]
    draws: tuple[str, ...] = ()
    sometimes: str = ""  # a rule that each prompt has with probability 1/2
    shuffled: bool = False  # are the rules?


_MATCHING_KEYS = ('"input": an input of the task', '"positive_document": a text that matches it')
_MATCHING_RULE = "They share few words and neither refers to the other."
TEMPLATES = {
    "retrieval": Template(
        "Write one example for this retrieval task: {task}",
        keys=(
            '"user_query": a search query for this task',
            '"positive_document": a document that is relevant to the query',
            '"hard_negative_document": a document that only looks relevant',
        ),
        rules=(
            "The user_query is {query_type}, {query_length} long and {clarity}.",
            "Each document has at least {document_words} words and does not copy the query.",
            "The hard_negative_document has some useful information but answers less well than the positive_document.",
            "No document explains why it is relevant or not.",
        ),
        draws=("document_words", "difficulty", "query_length", "clarity", "query_type"),
        sometimes="Query and documents need {difficulty} education to understand.",
        shuffled=True,
    ),
    "classification": Template(
        "Write one example for this classification task: {task}",
        keys=(
            '"input_text": the text to classify',
            '"label": its correct label',
            '"misleading_label": a wrong label of the same task',
        ),
        rules=(
            "The input_text has {classification_length} words.",
            "The misleading_label is a possible label of the task, but fits the input_text less well than the label.",
            "The input_text contains neither label.",
        ),
        draws=("classification_length", "difficulty", "clarity"),
        sometimes="The input_text is {clarity} and needs {difficulty} education to understand.",
        shuffled=True,
    ),
    "sts": Template(
        "Write three {unit}s of graded semantic similarity on the topic: {topic}",
        keys=('"S1": a {unit}', '"S2": a {unit}', '"S3": a {unit}'),
        rules=(
            "All three {unit}s share some words.",
            "On a scale from 1 to 5, S1 and S2 have similarity {high_score}.",
            "S1 and S3 have similarity {low_score}.",
        ),
        draws=("high_score", "low_score", "unit", "sts_difficulty"),
        sometimes="The {unit}s need {sts_difficulty} education to understand.",
    ),
    "short_short": Template(
        "Write one example for this matching task: {task}",
        keys=_MATCHING_KEYS,
        rules=("Both texts are a phrase or a sentence.", _MATCHING_RULE),
    ),
    "long_long": Template(
        "Write one example for this matching task: {task}",
        keys=_MATCHING_KEYS,
        rules=("Both texts are a document of at least {long_words} words.", _MATCHING_RULE),
        draws=("long_words",),
    ),
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


def parse_prompt_attributes(kind: str, task: str, text: str) -> Prompt:
    """A `Prompt` from the text of a synthesis prompt in our own words: topic of an STS prompt, and the lengths asked for."""
    patterns = {
        "document_words": r"Each document has at least (\d+) words",
        "classification_length": r"The input_text has ((?:at least|less than) \d+) words",
        "long_words": r"Both texts are a document of at least (\d+) words",
    }
    attributes = {k: m[1] for k, pattern in patterns.items() if (m := re.search(pattern, text))}
    topic = re.search(r"similarity on the topic: (.+)", text)
    return Prompt(text_digest(text)[:16], kind, topic[1] if topic else "", task, text, attributes)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_id(**fields: Any) -> str:
    """Digest of canonical JSON of everything that decides a prompt (16 hex digits)."""
    canonical = json.dumps({"builder": BUILDER_VERSION, **fields}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def rng_for(identifier: str) -> random.Random:
    """A private random generator that depends on the record id alone."""
    return random.Random(int(hashlib.sha256(identifier.encode()).hexdigest(), 16))


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
    if kind not in BRAINSTORM:
        raise ValueError(f"kind {kind!r}: no brainstorm prompt; use one of {', '.join(BRAINSTORM)}")
    rid = record_id(stage="brainstorm", kind=kind, topic=topic, count=count, seed=seed, style=style)
    if style == "faithful":
        return Prompt(rid, kind, topic, "", _released(clone, "prompts_tasks", RELEASED_BRAINSTORM[kind], rid, topic))
    what, examples = BRAINSTORM[kind]
    shuffled = list(examples)
    rng_for(rid).shuffle(shuffled)
    lines = "\n".join(f"- {e}" for e in shuffled)
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
    rid = synthesis_id(kind, topic, task, index=index, seed=seed, stage=stage, table=table, style=style)
    task = STS_TASK if kind == "sts" else task
    if style == "faithful":
        name, *more = RELEASED_SYNTHESIS[kind]
        text = _released(clone, "prompts_synthesis", name, rid, topic if kind == "sts" else task, *more)
        return Prompt(rid, kind, topic, task, text)
    t, rng = TEMPLATES[kind], rng_for(rid)
    attributes = {name: draw_attribute(rng, table, name) for name in t.draws}
    rules = list(t.rules)
    if t.sometimes and rng.random() < 0.5:
        rules.append(t.sometimes)
    if t.shuffled:
        rng.shuffle(rules)
    lines = [t.head, "Keys of the JSON object:", *(f"- {k}" for k in t.keys), "Rules:", *(f"- {r}" for r in rules)]
    lines.append("Answer with one JSON object and nothing else.")
    filled = [line.format(task=task, topic=topic, **attributes) for line in lines]
    return Prompt(rid, kind, topic, task, "\n".join(filled), attributes)


def synthesis_id(kind: str, topic: str, task: str, **fields: Any) -> str:
    """The record id of `synthesis`, without the prompt."""
    return record_id(kind=kind, topic=topic, task=STS_TASK if kind == "sts" else task, **fields)


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


# --- the originals, byte for byte, from the reader's own clone ------------------------------------

RELEASED_BRAINSTORM = {
    "retrieval": "get_brainstorm_retrieval_tasks_prompt_with_topic_ICL",
    "classification": "get_brainstorm_classify_tasks_prompt_with_topic",
    "short_short": "get_brainstorm_s2s_tasks_prompt_with_topic",
    "long_long": "get_brainstorm_p2p_tasks_prompt_with_topic",
}
RELEASED_SYNTHESIS = {
    "retrieval": ("get_create_retrieval_data_prompt",),
    "classification": ("get_create_classify_data_prompt",),
    "sts": ("get_sts_prompt_with_topic",),
    "short_short": ("get_create_s2s_p2p_data_prompt", "s2s"),
    "long_long": ("get_create_s2s_p2p_data_prompt", "p2p"),
}


@lru_cache(maxsize=4)
def _released_functions(clone: str, module: str) -> dict[str, Any]:
    path = Path(clone) / f"{module}.py"
    if not clone or not path.is_file():
        raise UserError(
            f"prompts.clone {clone!r}: the faithful style reads {module}.py from a clone of haon-chen/SPEED; "
            'clone it and set prompts.clone to that folder, or use prompts.style="own"'
        )
    return runpy.run_path(str(path))


def _released(clone: str, module: str, name: str, identifier: str, *args: str) -> str:
    """The prompt of a released builder. It draws from both global generators: they are seeded for it, then restored."""
    builder = _released_functions(clone, module)[name]
    seed = int(text_digest(identifier)[:8], 16)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        messages = builder(*args)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return str(messages[-1]["content"])

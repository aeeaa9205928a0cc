"""Topics: one path each, its levels split by '/'. The list of this repository, or a file of one's own.

A file is read by the end of its name:

    .txt            a path a line; '#' starts a comment
    .csv            the column `topic`
    .jsonl          the key `topic` of each line
    .rdf, .rdf.u8   the structure file of a public web directory (Open Directory), whole or packed with gzip (.gz)
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

from speed_core.files import ASSETS, PACKAGE, UserError, read_text, surrogate

BUILTIN = ASSETS / "topics.txt"
COLUMN = "topic"
RECORDS_PER_TOPIC = 1000  # beyond it a topic's records repeat one another
ROOTS = ("Top/World/", "Top/")  # of a web directory's paths; below World they are in other languages than English


@dataclass(frozen=True)
class Topics:
    """Distinct topic paths in the order of their file, and how many lines repeated one."""

    paths: tuple[str, ...]
    duplicates: int = 0

    def __str__(self) -> str:
        depths = sorted(Counter(p.count("/") + 1 for p in self.paths).items())
        shown = ", ".join(f"{n} of depth {depth}" for depth, n in depths)
        return f"{len(self.paths):,} topics ({shown}); {self.duplicates:,} duplicates left out"


def load_topics(file: str = "") -> Topics:
    """The topics of `file` (default: this repository's list). Raises UserError that names the file, the line and the remedy."""
    path = Path(file).expanduser() if file else BUILTIN
    if not path.is_file():  # a notebook's folder is its own; commands are given in the checkout
        path = PACKAGE.parent / path
    if not path.is_file():
        raise UserError(f"topics.file {file!r}: no such file; give a .txt, .csv, .jsonl or .rdf file of topics")
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)  # every plan of a run asks for the topics many times, and a dump takes minutes to read
def _read(path: Path, written: int, size: int) -> Topics:
    """The topics of a file as it stood at the time `written`, with so many bytes."""
    found = [clean for raw in _raw(path) if (clean := _clean(raw))]
    distinct = tuple(dict.fromkeys(found))
    if len(distinct) < 2:
        raise UserError(
            f"topics.file {path.name}: {len(distinct)} topics; give at least two, one to write about and one held out"
        )
    return Topics(distinct, len(found) - len(distinct))


# Tasks for topics that nobody brainstormed: no teacher is at hand, and a generator needs a task to write for.
TASKS = {
    "retrieval": (
        "Given a question about {topic}, retrieve a passage that answers it.",
        "Given a problem that somebody has with {topic}, find a guide that solves it.",
        "Given a term from {topic}, retrieve a text that explains it.",
    ),
    "classification": (
        "Tell whether a text about {topic} asks, explains or complains.",
        "Label a message about {topic} as a request, an offer or a report.",
        "Decide whether a text about {topic} is meant for beginners or for experts.",
    ),
    "short_short": (
        "Match a term from {topic} with its one-line explanation.",
        "Given a short question about {topic}, find a question that means the same.",
        "Match a tool or method of {topic} with what it is used for.",
    ),
    "long_long": (
        "Given a report about {topic}, find the report of a similar case.",
        "Match a beginner's account of {topic} with an expert's long advice.",
        "Given an article about {topic}, find another one on the same subject.",
    ),
}


def template_tasks(kind: str, topic: str) -> list[str]:
    """Three tasks of `kind` about `topic`, from a template."""
    return [task.format(topic=" > ".join(topic.split("/"))) for task in TASKS[kind]]


def _clean(path: str) -> str:
    """A path without blanks around its levels and without empty levels."""
    return "/".join(filter(None, (" ".join(level.replace("_", " ").split()) for level in path.split("/"))))


def _raw(path: Path) -> Iterator[str]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".rdf", ".rdf.u8")):
        yield from _directory(path)
        return
    text = read_text(path)
    if name.endswith(".csv"):
        table = csv.DictReader(io.StringIO(text, newline=""))
        if COLUMN not in (table.fieldnames or ()):
            raise UserError(f"topics.file {path.name}: no column {COLUMN!r} among {table.fieldnames}; name one so")
        yield from (row[COLUMN] or "" for row in table)
    elif name.endswith((".jsonl", ".json")):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _of_line(path, number, line)
    else:
        yield from (line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _of_line(path: Path, number: int, line: str) -> str:
    try:
        topic = json.loads(line)[COLUMN]
    except (ValueError, KeyError, TypeError, RecursionError):
        topic = None
    if not isinstance(topic, str) or surrogate(topic):
        raise UserError(
            f'topics.file {path.name}: line {number} is no object with a text under "{COLUMN}"; write {{"topic": "A/B"}}'
        )
    return topic


def _directory(path: Path) -> Iterator[str]:
    """The r:id of each Topic element, without the directory's own root; the file is read as a stream."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            events = ElementTree.iterparse(file, ("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "start" or element.tag.rpartition("}")[2] != "Topic":
                    continue
                name = next((v for k, v in element.attrib.items() if k.rpartition("}")[2] == "id"), "")
                if name.startswith(ROOTS[1]) and not name.startswith(ROOTS[0]):
                    yield name.removeprefix(ROOTS[1])
                root.clear()  # what was read: a dump has hundreds of thousands
        except (ElementTree.ParseError, EOFError, OSError) as error:
            raise UserError(
                f"topics.file {path.name}: the dump ends or breaks before its last element ({error}); fetch it again"
            ) from None

"""The teacher that writes the seed data: recorded answers, an endpoint (`speed_core.data.endpoint_teacher`), or the log of one.

The recorded answers were written for this repository by its authors, with the help of an AI writing
assistant. They are not GPT-4o output and are labelled as ours wherever they appear.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from speed_core.data import topics
from speed_core.data.prompts import Prompt
from speed_core.data.replies import Completion, without_secrets
from speed_core.files import ASSETS, UserError, read_jsonl
from speed_core.profile import Teacher as TeacherSettings

RECORDED = ASSETS / "recorded"
LABEL = "recorded answers, written by this repository's authors"


class Unrecorded(KeyError):
    """Nobody wrote an answer to this prompt."""


class Teacher:
    """Answers prompts; `asking.ask` asks many, and keeps their log."""

    label: str
    replays = False  # has only what its log holds

    def sampling_params(self, temperature: float | None) -> dict[str, Any]:
        """What decides an answer beside the prompt and the model: part of every request's digest."""
        return {}

    def remember(self, entries: Iterable[Mapping[str, Any]], purpose: str) -> None:
        """Count answers of a log that this object did not ask for: a budget lasts over stops of a stage."""

    def begin(self, items: Sequence[Prompt], keys: Iterable[str], purpose: str) -> None:
        """These prompts are asked next; their entries in the log will have these ids."""

    def submit(self, prompt: Prompt, purpose: str, temperature: float | None = None) -> Future[Completion]:
        """Begin asking; the future gives the answer."""
        raise NotImplementedError

    def refuses_all(self, error: BaseException, purpose: str, temperature: float | None) -> UserError | None:
        """What to tell the user if the endpoint refuses every request as it refused the last ones (`error`)."""
        return None


@lru_cache(maxsize=8)
def recorded_rows(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of `assets/recorded/NAME.jsonl` ({prompt_digest, answer, ...})."""
    path = RECORDED / f"{name}.jsonl"
    return tuple(read_jsonl(path)) if path.is_file() else ()


class RecordedTeacher(Teacher):
    """Answers a prompt that was recorded, found by the digest of its text; anything else is an error.

    Tasks for a topic of the user's own come from a template (`topics.template_tasks`).
    """

    label = LABEL

    def __init__(self) -> None:
        names = ("tasks", "tasks_five", "seeds", "revisions")
        self._answers = {row["prompt_digest"]: row["answer"] for name in names for row in recorded_rows(name)}
        self._topics = {row["topic"] for name in names[:2] for row in recorded_rows(name)}

    def submit(self, prompt: Prompt, purpose: str, temperature: float | None = None) -> Future[Completion]:
        future: Future[Completion] = Future()
        if prompt.digest in self._answers:
            future.set_result(Completion(prompt.id, self._answers[prompt.digest]))
        elif purpose == "brainstorm" and prompt.topic not in self._topics:
            future.set_result(Completion(prompt.id, json.dumps(topics.template_tasks(prompt.kind, prompt.topic))))
        else:
            future.set_exception(Unrecorded(prompt.digest))
        return future


class ModelTeacher(Teacher):
    """A model behind an endpoint: how it is named in logs and figures, and how it samples."""

    def __init__(self, settings: TeacherSettings):
        self.settings = settings
        self.label = f"{settings.model} at {without_secrets(settings.base_url) or 'the OpenAI API'}"

    def sampling_params(self, temperature: float | None) -> dict[str, Any]:
        """`temperature` stands above the settings'."""
        t = self.settings.temperature if temperature is None else temperature
        return {"temperature": t, "top_p": self.settings.top_p, "max_output_tokens": self.settings.max_output_tokens}


class LoggedTeacher(ModelTeacher):
    """An endpoint that is not there any more: what its log lacks is an error (replay)."""

    replays = True

    def submit(self, prompt: Prompt, purpose: str, temperature: float | None = None) -> Future[Completion]:
        raise UserError(f"replay: the log holds no {purpose} answer to one of these prompts; use the profile of the export")


def open_teacher(settings: TeacherSettings, replay: bool = False) -> Teacher:
    """The teacher that a profile names; an endpoint is reached once, so that a wrong one is refused before any work."""
    if settings.kind == "recorded":
        return RecordedTeacher()
    if replay:
        return LoggedTeacher(settings)
    from speed_core.data.endpoint_teacher import EndpointTeacher  # imports openai, which takes seconds

    teacher = EndpointTeacher(settings)
    teacher.check()
    return teacher

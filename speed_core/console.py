"""What a reader sees while something runs: progress bars, and no messages of libraries that say nothing about the run."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from speed_core.files import UserError, disk_errors


def quiet() -> None:
    """Silence messages that say nothing about the reader's run; real problems raise."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*torchao.*")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def progress(total: int, label: str, unit: str, initial: int = 0) -> Any:
    """tqdm on standard output, rarely redrawn: readable in a notebook, a log file and a terminal."""
    return tqdm(total=total, initial=initial, desc=label, unit=unit, mininterval=3, file=sys.stdout, ascii=" #", ncols=90)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program on bad input: its one line on standard error, exit code 2. SIGTERM ends it as Ctrl-C does: what it began is
    cleaned up."""
    with suppress(ValueError):  # not the main thread: somebody else's process, whose signals are not ours
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with disk_errors():
            yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""What a user may set in the environment. Every value is read when it is used, none when the package is imported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_settings import BaseSettings, SettingsConfigDict

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE.parent / "cache"  # where an offline bundle unpacks weights

Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Switch = Annotated[bool, BeforeValidator(lambda value: value not in ("", "0", False))]


class Settings(BaseSettings):
    """The environment as it is now: `Settings().runs` is $SPEED_RUNS. A variable that is empty counts as not set."""

    model_config = SettingsConfigDict(env_prefix="SPEED_", env_ignore_empty=True, frozen=True)

    runs: Folder | None = None  # all runs; without it, runs/ in the checkout
    cache: Folder | None = None  # converted weights; without it, cache/ of a bundle or the user's cache folder
    shipped: Folder | None = None  # artifacts that others made, as PROFILE/artifacts; only read
    data: Path | None = None  # snapshots of evaluation data sets, as ORG/NAME
    online: Switch = False  # whether a model hub may be asked; 0 and empty: no


def prepare_hub() -> None:
    """Tell Hugging Face's libraries, and the processes that are started later, whether they may use the network and where a bundle
    has put its models. What the user has set stays."""
    _default({"HF_HUB_OFFLINE": "0" if Settings().online else "1", "TOKENIZERS_PARALLELISM": "false"})
    use_bundled_models()


def use_bundled_models() -> None:
    """Tell Hugging Face's libraries where a bundle has put its models."""
    if (BUNDLED / "hub").is_dir():
        _default({"HF_HUB_CACHE": str(BUNDLED / "hub")})


def _default(wanted: dict[str, str]) -> None:
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    constants = sys.modules.get("huggingface_hub.constants")
    if missing and constants:  # it has read the variables, so it must read them again
        importlib.reload(constants)

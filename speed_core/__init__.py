"""SPEED, step by step: a thin package behind the notebooks."""

import os
from pathlib import Path

__version__ = "0.1.0"

# Hub models of an unpacked bundle. The hub's library reads the variable when it is imported, so it is set before anything is.
_hub = Path(__file__).resolve().parent.parent / "cache" / "hub"
if _hub.is_dir():
    os.environ.setdefault("HF_HUB_CACHE", str(_hub))

"""Environment variables are read when they are used, and set for the hub's library only by a call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speed_core.settings import Settings


def test_a_value_is_the_one_that_is_set_now(monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", "~/runs")
    assert Settings().runs == Path.home() / "runs"
    monkeypatch.setenv("SPEED_RUNS", "")
    assert Settings().runs is None


@pytest.mark.parametrize(("value", "online"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_a_switch_is_on_unless_it_is_empty_or_zero(monkeypatch, value, online):
    monkeypatch.setenv("SPEED_ONLINE", value)
    assert Settings().online is online


@pytest.mark.parametrize(("online", "offline"), [("1", "False"), ("0", "True")])
def test_the_hubs_library_is_told_even_when_it_was_imported_before_and_an_import_of_ours_tells_nothing(online, offline):
    code = (
        "import os, huggingface_hub.constants as hub; before = dict(os.environ)\n"
        "import speed_core.study.runs, speed_core.settings as settings; assert dict(os.environ) == before\n"
        "settings.prepare_hub(); print(hub.HF_HUB_OFFLINE)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))} | {"SPEED_ONLINE": online}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == offline, done.stderr

"""Training functions in several processes: started, shown, stopped, and what a failure of one of them looks like."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from speed_core import profile
from speed_core.contrastive.train import train_embedder
from speed_core.files import UserError
from speed_core.generation import sft
from speed_core.models import launch, training
from speed_core.profile import Lora, Processes, Training

TWO = Processes(processes=2)
SETTINGS = profile.load("smoke").junior.model_copy(update={"batch": 4, "micro_batch": 1})


def write(settings: Training, folder: Path | None, word: str) -> None:
    """A training function of the tests: says what it was given."""
    assert isinstance(settings, Training) and isinstance(folder, Path)
    print(ascii(word), os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "threads", os.environ["OMP_NUM_THREADS"])
    (folder / f"wrote-{os.environ['RANK']}").touch()


def fail(settings: Training, folder: Path, how: str) -> None:
    """Another one: the second process fails, the first would go on for ten minutes."""
    rank = os.environ["RANK"]
    (folder / f"{rank}.part").write_text(str(os.getpid()))
    os.replace(folder / f"{rank}.part", folder / f"{rank}.pid")
    if rank == "1" and how != "never":
        while not (folder / "0.pid").exists():
            time.sleep(0.01)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("it is too large; make it smaller") if how == "UserError" else ValueError("two\nlines")
    time.sleep(600)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_one_process_is_this_one_and_nothing_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", None)
    seen = []
    launch.train(lambda **given: seen.append(given), Processes(), tmp_path / "w", settings=SETTINGS)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher of the user's own has started this process
    launch.train(lambda **given: seen.append(given), TWO, tmp_path / "w", settings=SETTINGS)
    assert seen == [{"settings": SETTINGS}] * 2 and not (tmp_path / "w").exists()


def test_two_processes_get_the_arguments_and_only_the_first_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.train(write, TWO, tmp_path / "w", settings=SETTINGS, folder=tmp_path, word="half \ud83d and \u2028")
    assert capsys.readouterr().out == "'half \\ud83d and \\u2028' 0 of 2 threads 1\n"
    assert (tmp_path / "wrote-0").exists() and (tmp_path / "wrote-1").exists()
    assert " 1 of 2" in (tmp_path / "w" / "process-1.log").read_text() and not (tmp_path / "w" / "job.json").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("UserError", "^it is too large; make it smaller$"),
        slow("ValueError", "^w: process 1 of 2 failed: ValueError: two lines; all that they said is in .*/w$"),
        slow("SIGKILL", "^w: process 1 of 2 was ended by SIGKILL, perhaps for memory; all that they said is in .*/w$"),
    ],
)
def test_the_failure_of_one_process_is_one_line_and_the_other_is_stopped(how, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        launch.train(fail, TWO, tmp_path / "w", settings=SETTINGS, folder=tmp_path, how=how)
    assert "\n" not in str(error.value)
    assert all(gone(int((tmp_path / f"{rank}.pid").read_text())) for rank in (0, 1))


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])  # the latter ends the command line as Ctrl-C does
def test_no_process_outlives_the_one_that_began_them(number, tmp_path):
    body = (
        "from test_launch import *\nfrom speed_core import console\nwith console.user_errors():\n"
        f"    launch.train(fail, TWO, Path({str(tmp_path / 'w')!r}), settings=SETTINGS, folder=Path({str(tmp_path)!r}), how='never')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", body], env=environment, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in (0, 1)), 600)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 3, "the launcher and two processes"
    finally:
        parent.send_signal(number)
        parent.wait()
    wait_for(lambda: all(gone(child.pid) for child in children), 60)


PAIRS = [(f"Write {n}.", " ".join(["word"] * (n % 5 + 1))) for n in range(16)]
RECORDS = [{"instruction": "Find it", "query": f"q {n}", "positive": f"p {n}", "negative": f"n {n}"} for n in range(16)]


@pytest.mark.slow
@pytest.mark.parametrize("section", ["junior", "embedding"])
def test_a_training_whose_processes_were_killed_goes_on_and_ends_in_the_weights_of_one_process(
    section, tiny_model, tmp_path, capsys
):
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj"))
    values = {
        "examples": 16,
        "batch": 4,
        "micro_batch": 1,
        "epochs": 12,
        "lr": 1e-3,
        "dtype": "float32",
        "lora": lora,
        "save_steps": 3,
    }
    settings = getattr(profile.load("smoke"), section).model_copy(update=values)  # 48 steps, 4 an epoch
    given = {"base": tiny_model("llama"), "settings": settings, "seed": 0, "label": "it"}
    guide = {"guide": "package:all-MiniLM-L6-v2", "guide_cache": tmp_path / "g"}
    function, read = (sft.train, {"pairs": PAIRS}) if section == "junior" else (train_embedder, {"rows": RECORDS, **guide})
    job = (function, TWO, tmp_path / "said"), given | read | {"output": tmp_path / "two", "cache": tmp_path / "c"}
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    body = (
        "import pickle, sys\nfrom speed_core.models import launch\n"
        "how, given = pickle.load(open(sys.argv[1], 'rb'))\nlaunch.train(*how, **given)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", body, str(tmp_path / "job")]
    parent = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:  # in the second epoch or later, and not at the end of one
        wait_for(lambda: parent.poll() is not None or any(tmp_path.glob("c/it-*/checkpoint-[69]/trainer_state.json")), 1200)
        assert parent.poll() is None
        children = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: all(gone(child.pid) for child in children), 60)
    (where,) = (tmp_path / "c").glob("it-*")
    at = int(training.last_checkpoint(where, 2).name.removeprefix("checkpoint-"))
    assert not (tmp_path / "two" / "training.json").exists(), "it had ended before it was killed"
    launch.train(*job[0], **job[1])
    assert f"{48 - at}/48" in (said := capsys.readouterr().out) and f"{49 - at}/48" not in said, "it began again"
    function(**given, **read, output=tmp_path / "one")
    one, two = (load_file(file) for name in ("one", "two") for file in (tmp_path / name).rglob("*.safetensors"))
    assert one.keys() == two.keys() and all(torch.allclose(v, two[k], atol=1e-5) for k, v in one.items())
    assert not where.exists()


@pytest.mark.parametrize(
    ("how", "changes", "says"),
    [
        ({"processes": 3}, {}, r"batch 4: not micro_batch 1 x 3 devices .* or training.processes"),
        ({"accelerate": "/no/such.yaml"}, {}, "training.accelerate '/no/such.yaml': no such file"),
        ({"fsdp": True}, {}, "training.fsdp: splits a model over GPUs, and none is visible"),
    ],
)
def test_what_cannot_begin_is_refused_before_a_process_is_started(how, changes, says, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match=says) as error:
        launch.train(write, Processes(**({"processes": 2} | how)), tmp_path / "w", settings=SETTINGS)
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_more_processes_than_gpus_and_whole_weights_under_fsdp_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.processes(Processes()) == 2
    with pytest.raises(UserError, match="training.processes 4: 2 GPUs are visible, one for each process; lower it"):
        launch.train(write, Processes(processes=4), tmp_path / "w", settings=SETTINGS)
    whole = SETTINGS.model_copy(update={"lora": None})
    with pytest.raises(UserError, match="training.fsdp: for LoRA alone"):
        launch.train(write, Processes(fsdp=True), tmp_path / "w", settings=whole)
    assert launch._checked(Processes(fsdp=True), 2, SETTINGS)["fsdp_config"]["fsdp_version"] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("distributed_type: 'NO'", "training.accelerate: its file starts 1 processes, not 2; correct distributed_type"),
        ("distributed_type: MULTI_GPU\ncolour: red", r"the launcher failed with 1: ValueError: .*unknown keys \(\['colour'\]\)"),
    ],
)
def test_a_configuration_file_that_starts_something_else_is_one_line(text, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        how = Processes(processes=2, accelerate=str(tmp_path / "mine.yaml"))
        launch.train(write, how, tmp_path / "w", settings=SETTINGS, folder=tmp_path, word="")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("wrote-*"))


def test_a_profile_takes_a_file_or_fsdp_and_finds_the_file_beside_itself(tmp_path):
    with pytest.raises(UserError, match="fsdp is true and accelerate names a file"):
        profile.load("smoke", {"training.fsdp": True, "training.accelerate": "mine.yaml"})
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.json").write_text('{"extends": "smoke", "training": {"accelerate": "mine.yaml"}}')
    assert profile.load(str(tmp_path / "mine.json")).training.accelerate == str(tmp_path / "mine.yaml")

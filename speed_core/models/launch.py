"""SFT, DPO and the training of embeddings in several processes, one a GPU, which accelerate's launcher starts.

`train` calls a training function here, or in each of N processes: it shows what the first of them prints, and fails with the message of
the one that failed. None of them outlives the process that began them: each reads its standard input, whose other end is there.
`python -m speed_core.models.launch JOB.json` is what each of them runs.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from speed_core import machine
from speed_core.files import PACKAGE, UserError, disk_errors, write_json
from speed_core.models import training
from speed_core.profile import Processes

# FSDP2 for LoRA on a large model: each layer is gathered when it computes and given back after it. Every process loads the whole model
# into its host's memory: DPO computes its reference with it before it is split.
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_offload_params": False,
}
SECONDS = 2  # that a process waits with an error of its own, so that the launcher sees first what made another one end
END_SECONDS = 10  # for the launcher to end


def processes(how: Processes) -> int:
    """How many processes train: as the profile says, else one a visible GPU; one in a process that a launcher has started."""
    import torch

    return 1 if "WORLD_SIZE" in os.environ else how.processes or max(1, torch.cuda.device_count())


def train(function: Callable[..., Any], how: Processes, folder: Path, /, **arguments: Any) -> None:
    """Call the module-level training `function` in as many processes as `how` says; with one, here.

    `arguments` are what JSON holds, paths and sections of a profile, `settings` among them. `folder` keeps what the processes said.
    Raises UserError: before anything is started where the numbers do not come out, else with the message of the process that failed.
    """
    count = processes(how)
    if count == 1:
        function(**arguments)
        return
    config = _checked(how, count, arguments["settings"])
    machine.end_idle()
    shutil.rmtree(folder, ignore_errors=True)
    values = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in arguments.items()}
    job, ours = folder / "job.json", folder / "accelerate.json"
    write_json(job, {"function": f"{function.__module__}:{function.__qualname__}", "processes": count, "arguments": values})
    write_json(ours, config)
    try:
        code = _run(count, Path(how.accelerate).expanduser() if how.accelerate else ours, job)
    finally:
        job.unlink(missing_ok=True)  # a copy of the training data
    if code:
        raise UserError(_why(folder, count, code))


def _checked(how: Processes, count: int, settings: Any) -> dict[str, Any]:
    """The launcher's configuration, unless the user has one. UserError where the training could not begin."""
    import torch

    training.accumulation(settings, count)
    gpus = torch.cuda.device_count()
    if how.accelerate and not Path(how.accelerate).expanduser().is_file():
        raise UserError(f"training.accelerate {how.accelerate!r}: no such file; write one with `accelerate config --config_file`")
    if gpus and count > gpus:
        raise UserError(f"training.processes {count}: {gpus} GPUs are visible, one for each process; lower it")
    if how.fsdp and not gpus:
        raise UserError("training.fsdp: splits a model over GPUs, and none is visible; set it to false")
    if how.fsdp and settings.lora is None:
        raise UserError(
            "training.fsdp: for LoRA alone, and lora is null here; give rank and alpha, or set training.fsdp to false"
        )
    return {"distributed_type": "FSDP" if how.fsdp else "MULTI_GPU"} | ({"fsdp_config": FSDP} if how.fsdp else {})


def _run(count: int, config: Path, job: Path) -> int:
    """Run the job; returns the launcher's exit code. What the first process prints is shown here as it comes."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or str(max(1, machine.cores() // count))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "no", "--num_cpu_threads_per_process", threads]  # the Trainer takes the profile's type
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path]), "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():  # its --cpu would start one process alone, unless there is MPI
        environment["ACCELERATE_USE_CPU"] = "true"
    with (job.parent / "launcher.log").open("wb") as log:
        child = subprocess.Popen(
            [*command, "--module", "speed_core.models.launch", str(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    assert child.stdin and child.stdout
    try:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        while said := typing.cast(Any, child.stdout).read1(8192):
            print(decode(said), end="", flush=True)
        return child.wait()
    finally:
        child.stdin.close()  # which ends the processes
        child.terminate()
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _why(folder: Path, count: int, code: int) -> str:
    """One line from what the processes left: the message for the user, else the last line of an error and where the rest is."""
    written = sorted(folder.glob("error-*.json"), key=lambda p: p.stat().st_mtime)
    errors = [json.loads(p.read_text(encoding="utf-8")) for p in written]
    for error in errors:
        if error["for_user"]:
            return str(error["message"])
    log = (folder / "launcher.log").read_text(encoding="utf-8", errors="replace")
    first = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", log, re.DOTALL)
    if errors:
        why = f"process {errors[0]['rank']} of {count} failed: {errors[0]['message']}"
    elif first and int(first[2]) < 0:
        why = f"process {first[1]} of {count} was ended by {signal.Signals(-int(first[2])).name}, perhaps for memory"
    else:
        why = f"the launcher failed with {code}: {(log.strip().splitlines() or ['it said nothing'])[-1]}"
    return f"{folder.name}: {why}; all that they said is in {Path(*folder.parts[-3:])}"


def _work(path: Path) -> None:
    """What each process does."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank = int(os.environ.get("RANK", 0))
    with (path.parent / f"process-{rank}.log").open("wb") as log:
        for stream in (1, 2) if rank else (2,):
            os.dup2(log.fileno(), stream)
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        if (world := int(os.environ.get("WORLD_SIZE", 1))) != job["processes"]:
            raise UserError(
                f"training.accelerate: its file starts {world} processes, not {job['processes']}; "
                "correct distributed_type there (MULTI_GPU, FSDP, DEEPSPEED)"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        module, _, name = job["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        with disk_errors():
            function(**_arguments(function, job["arguments"]))
    except Exception as error:
        traceback.print_exc()
        message, for_user = str(error), isinstance(error, UserError)
        if not for_user:
            time.sleep(SECONDS)
            message = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
        write_json(path.parent / f"error-{rank}.json", {"rank": rank, "for_user": for_user, "message": message})
        os._exit(1)  # others may wait for this one, and the interpreter for them
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _arguments(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the function wants them: a section of a profile and a path are made from JSON again."""
    hints, out = typing.get_type_hints(function), dict(given)
    for name, value in given.items():
        wanted = hints.get(name)
        if isinstance(wanted, type) and issubclass(wanted, BaseModel):
            out[name] = wanted.model_validate_json(json.dumps(value))
        elif value is not None and wanted in (Path, Path | None):
            out[name] = Path(value)
    return out


def _end_with_parent() -> None:
    """End this process, in the middle of a step too, when the one that began the training has closed its end of the pipe or is gone."""
    os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when the interpreter ends
    os._exit(1)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it, also with their group destroyed

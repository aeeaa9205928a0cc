"""`python -m speed_core run | plan | check | preflight | execute | ...`: see --help."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from speed_core.console import user_errors
from speed_core.files import UserError
from speed_core.runner import arguments
from speed_core.settings import use_bundled_models

app = typer.Typer(add_completion=False, no_args_is_help=True, help="SPEED, step by step: run, plan and check the notebooks.")

ProfileName = Annotated[str, typer.Option(help="smoke, tiny, overnight, workshop, paper, or a .json file")]
Values = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the profile")]
Numbers = Annotated[str, typer.Option(help="notebook numbers, for instance 03,04")]
FirstNumber = Annotated[str, typer.Option("--from", help="first notebook")]
CellTimeout = Annotated[int | None, typer.Option(min=1, help="seconds that one cell may take; no limit without")]

# Each command imports what it needs: PyTorch and mteb take seconds, and `--help` needs neither.


@app.command()
def run(
    profile: ProfileName = "tiny",
    only: Numbers = "",
    start: FirstNumber = "",
    seed: Annotated[str, typer.Option(help="training and sampling seed, or several: 0,1,2")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the profile, or NAME=V1,V2,... for a grid")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs of a sweep at a time")] = 1,
    executor: Annotated[str, typer.Option(help="process, or ray: machines that share this folder")] = "process",
    cell_timeout: CellTimeout = None,
) -> None:
    """Run the notebooks, once or for every point of a sweep; exit code 0 only when all of them truly ran."""
    numbers, grid, seeds = arguments.words(only), arguments.grid(set_), arguments.seeds(seed)
    if len(seeds) > 1 or any(len(v) > 1 for v in grid.values()):
        from speed_core.runner.sweep import points, run_points

        done = run_points(
            profile, points(grid, seeds), only=numbers, start=start, jobs=jobs, executor=executor, cell_timeout=cell_timeout
        )
        raise typer.Exit(int(any(code for _, code in done)))
    if executor != "process" or jobs > 1:
        raise UserError("--executor and --jobs are for a sweep, and this is one run; give --seed 0,1 or --set NAME=V1,V2")
    from speed_core.runner.batch import run_all

    overrides = {name: values[0] for name, values in grid.items()}
    one = seeds[0] if seeds else None
    reports = run_all(profile, overrides=overrides, seed=one, only=numbers, start=start, cell_timeout=cell_timeout)
    if not reports[-1].ok:
        print(f"{reports[-1].name}: {reports[-1].detail}", file=sys.stderr)
        raise typer.Exit(2 if reports[-1].bad_input else 1)


@app.command()
def study(
    profile: ProfileName = "tiny",
    only: Annotated[
        str,
        typer.Option(
            help="panels, for instance 3a,3c: 3a to 3e of the paper's Fig. 3, T3 and T4 for its tables, E4 for rank and pooling, generators to train those again"
        ),
    ] = "",
    jobs: Annotated[int, typer.Option(min=0, help="points at a time; 0: as many as cores and memory allow")] = 0,
) -> None:
    """Run the sweeps of Fig. 3 and Tables 3 and 4, and further trainings of the generators, over a finished run, then draw notebooks
    10 and 12 again."""
    from speed_core.runner import parallel
    from speed_core.runner.batch import run_all
    from speed_core.runner.paper_sweeps import run_study

    failed = [p.name for p, code in run_study(profile, arguments.words(only), jobs=jobs or parallel.workers()) if code]
    if failed or not all(report.ok for report in run_all(profile, only=["10", "12"])):
        print(f"failed: {', '.join(failed) or 'a notebook'}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def plan(
    profile: ProfileName = "tiny",
    set_: Values = None,
    tokens_per_second: Annotated[float, typer.Option(min=0, help="of your GPU, from benchmarks/generation.py")] = 0.0,
    only: Numbers = "",
    start: FirstNumber = "",
    seed: Annotated[int | None, typer.Option(help="training and sampling seed")] = None,
    why: Annotated[str, typer.Option(metavar="ARTIFACT", help="only what this artifact is made from, and how")] = "",
    gpus: Annotated[int, typer.Option(min=0, help="with --gpu-gb: does the profile fit so many GPUs")] = 0,
    gpu_gb: Annotated[float, typer.Option(min=0, help="memory of each, in GB")] = 0.0,
) -> None:
    """Say what a profile would do: models, counts, teacher calls and cost, GPU-hours, what is already made."""
    from speed_core.runner import preflight
    from speed_core.study import planning
    from speed_core.study.runs import open_run

    numbers, overrides = arguments.words(only), arguments.overrides(set_)
    if why:
        print(planning.why_text(open_run(profile, overrides, seed), why))
        return
    if bool(gpus) != bool(gpu_gb):
        raise UserError("--gpus and --gpu-gb belong together: how many GPUs, and the memory of each; give both")
    print(preflight.plan_text(profile, overrides, tokens_per_second, seed=seed, only=numbers, start=start))
    if gpus:
        preflight.dry_run(open_run(profile, overrides, seed), gpus, gpu_gb, tokens_per_second)


@app.command()
def preflight(profile: ProfileName = "tiny", set_: Values = None) -> None:
    """Check this machine for a profile; ends in "ready" or in numbered remedies."""
    from speed_core.runner import preflight as checks

    if checks.report(profile, arguments.overrides(set_)):
        raise typer.Exit(2)


@app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(help="folder of figures; default: figures/")] = None,
    deep: Annotated[bool, typer.Option(help="take the digests of the inputs of their bytes, not of their manifests")] = False,
    recorded: Annotated[
        bool,
        typer.Option("--recorded", help="compare the run of --profile with the recorded one instead: texts, verdicts, scores"),
    ] = False,
    profile: ProfileName = "tiny",
) -> None:
    """Fail when a figure and its data disagree, or when what it was drawn from has moved since (exit code 1)."""
    from speed_core.plots import provenance
    from speed_core.runner import notebook as executed
    from speed_core.store.run_context import ROOT, runs_folder

    if recorded:
        if folder or deep:
            raise UserError("check --recorded: compares a run, not a folder of figures; leave FOLDER and --deep away")
        from speed_core.runner.recorded import report_later

        print(report_later(profile))
        return
    folder = folder or ROOT / "figures"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds figures")
    problems, remarks = provenance.inspect(folder, runs_folder(), deep)
    problems += executed.changed(folder.resolve().parent / "notebooks")  # a run's folder has both
    print("\n".join([*problems, *remarks, f"{len(list(folder.glob('*.svg')))} figures, {len(problems)} problems"]))
    if problems:
        raise typer.Exit(1)


@app.command()
def domain(
    out: Annotated[Path, typer.Option(help="folder for the data set, the model and the scorecard")],
    profile: ProfileName = "own-domain",
    data: Annotated[Path | None, typer.Option(help="your texts, JSONL as in `evaluate`: what the model is scored on")] = None,
    set_: Values = None,
) -> None:
    """Make a training set and an embedding model for topics of your own (topics.file), and score the model on your texts."""
    from speed_core.runner.own_domain import build
    from speed_core.study.runs import open_run

    build(open_run(profile, arguments.overrides(set_)), out, data)


@app.command()
def card(
    artifact: str,
    out: Path,
    profile: ProfileName = "tiny",
    merged: Annotated[bool, typer.Option("--merged", help="the whole model in place of its adapter")] = False,
) -> None:
    """Write a model's or data set's card for the Hugging Face hub, with its files and mteb's results; pushes nothing."""
    from speed_core.runner import cards
    from speed_core.study.runs import open_run

    written = cards.write(open_run(profile), artifact, out, merged=merged)
    for found in cards.local_paths(out):
        print(f"{found}: a path of this machine; write the model's hub id in its place before you push")
    files = [p for p in out.rglob("*") if p.is_file()]
    print(f"{written}: with {len(files) - 1} files beside it; push the folder with `hf upload`")


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Option(help="a folder, hub id or package:NAME; give it twice to compare two")],
    data: Annotated[
        Path | None, typer.Option(help="your texts, JSONL (speed_core/runner/own_tasks.py says which shapes)")
    ] = None,
    tasks: Annotated[str, typer.Option(help="MTEB tasks or benchmarks by name, with commas between them")] = "",
    out: Annotated[Path, typer.Option(help="folder for scores and figure")] = Path("scorecard"),
    instructed: Annotated[bool, typer.Option(help="queries get the instruction template of this project's models")] = True,
    dtype: Annotated[str, typer.Option(help="to compute in: auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Score one or two models on your own texts or on MTEB tasks, with intervals; two are compared text by text."""
    from speed_core.runner.own_tasks import scorecard

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    scorecard(model, out, data=data, mteb_tasks=names, instructed=instructed, dtype=dtype)


@app.command()
def execute(
    source: Path,
    target: Path,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value, value as JSON")] = None,
    raw: Annotated[list[str] | None, typer.Option("-r", help="name=text, kept as text")] = None,
    file: Annotated[Path | None, typer.Option("-f", help="parameters of a JSON or YAML file")] = None,
    written: Annotated[list[str] | None, typer.Option("-y", help="parameters as YAML")] = None,
    kernel: Annotated[str, typer.Option("-k", help="kernel; the notebook's own without")] = "",
    cwd: Annotated[Path | None, typer.Option(help="folder to run in; the notebook's own without")] = None,
    cell_timeout: CellTimeout = None,
) -> None:
    """Execute any notebook with the same honesty: typed parameters, true failure, no half-written output."""
    from speed_core.runner.notebook import execute as execute_one

    if not source.is_file():
        raise UserError(f"notebook {source}: no such file; give a path to an .ipynb")
    given = arguments.yaml_file(file) if file else {}
    for text in written or []:
        given |= arguments.yaml_values(text, "-y")
    given |= arguments.overrides(parameter) | dict(text.partition("=")[::2] for text in raw or [])
    report = execute_one(source, target, given, cell_timeout=cell_timeout, kernel=kernel, cwd=cwd)
    print(f"{report.name}: {report.status} in {report.seconds:.0f} s {report.detail}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def adapters(target: Path, profile: ProfileName = "tiny") -> None:
    """Write junior, senior and revisor as adapters of the base model, for a server that takes --lora-modules."""
    import shutil

    from speed_core.models import loading
    from speed_core.models.adapters import joined_adapter
    from speed_core.study.runs import open_run

    run = open_run(profile)
    for name in ("junior", "revisor"):
        shutil.copytree(run.store.need(name).weights(), target / name, dirs_exist_ok=True)
    # The senior's adapter belongs to base and junior; joined with the junior's it belongs to the base.
    joined_adapter(run.store.need("junior").weights(), run.store.need("senior").weights(), target / "senior")
    modules = " ".join(f"{name}={target / name}" for name in ("junior", "senior", "revisor"))
    rank = max(json.loads((target / n / "adapter_config.json").read_text())["r"] for n in ("junior", "senior", "revisor"))
    base = run.profile.models.generator
    print(
        f"vllm serve {loading.resolve(base)} --served-model-name {base} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
    )


@app.command(name="export")
def export_(
    target: Path,
    profile: ProfileName = "tiny",
    set_: Values = None,
    whole: Annotated[bool, typer.Option("--whole", help="all that it takes to go on with the run on another machine")] = False,
    weights: Annotated[bool, typer.Option(help="with --whole: the generators' weights too")] = True,
) -> None:
    """Write the request logs of a run (and its training histories, no weights) to one archive and print its digest."""
    from speed_core.runner import replay, run_archive
    from speed_core.study.runs import open_run

    run = open_run(profile, arguments.overrides(set_))
    digest = run_archive.export(run, target, weights=weights) if whole else replay.export_logs(run, target)
    print(f"{target}: sha256 {digest}")


@app.command(name="import")
def import_(
    source: Annotated[
        Path | None, typer.Argument(help="an export; without, the recorded run that ships with the package")
    ] = None,
    rebuild: Annotated[bool, typer.Option(help="rebuild data sets and figures from the logs")] = True,
) -> None:
    """Check an archive of logs, take it in, rebuild its data sets and figures from it; exit code 1 when one differs.

    An archive of `export --whole` is only taken in: `run` goes on where it stopped.
    """
    from speed_core.runner import replay
    from speed_core.runner.batch import run_all
    from speed_core.runner.notebook import environment
    from speed_core.study import ablation_stages
    from speed_core.study.runs import open_run

    source = source or replay.RECORDED
    run, whole = replay.take_in(source, open_run)
    on = f"; go on: python -m speed_core run --profile {run.profile.name}" if whole else ""
    print(f"imported into {run.folder.parent.name}/{run.folder.name}{on}")
    if whole or not rebuild:
        return
    with environment(SPEED_REPLAY="1"):  # the notebooks' kernels inherit it
        reports = run_all(run.profile.name, only=replay.NOTEBOOKS)
        run = open_run(run.profile.name)
        if run.log("raw-junior").is_file():
            ablation_stages.ablation_data(run)
    rows = replay.compare(run, source)
    for name, wanted, here in rows:
        print(f"{name:26} {wanted} {'same' if here == wanted else f'DIFFERENT: {here}'}")
    if not all(report.ok for report in reports) or any(wanted != here for _, wanted, here in rows):
        raise typer.Exit(1)


MOVED = {
    "bundle": "scripts/bundle.py",
    "classroom": "scripts/classroom.py",
    "record": "scripts/record.py",
    "practice-teacher": "tests/faulty_endpoint.py",
}


def _moved(context: typer.Context) -> None:
    """A command of earlier versions: say what to type now."""
    script = MOVED[str(context.info_name)]
    raise UserError(f"{context.info_name}: is a script now; type python {' '.join([script, *context.args])}")


for _name in MOVED:
    _all = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(_name, hidden=True, context_settings=_all)(_moved)


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2; SIGTERM ends as Ctrl-C does, with kernels shut down."""
    with user_errors():
        use_bundled_models()
        app()


if __name__ == "__main__":
    main()

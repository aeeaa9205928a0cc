"""Execute one notebook headlessly, and report a success only where every cell ran.

papermill 2.7 writes "completed" over cells of a killed kernel, accepts parameters that do not exist and
empties the last good output before it starts. So parameters are checked first, and the notebook runs in a
temporary file. It succeeds when every code cell has an execution count and a sentinel cell after the last has
printed its line; only then does the output take its place. A failure is kept beside it as NAME.failed.ipynb.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import nbclient.client
import nbformat
import papermill
import papermill.execute
from papermill.exceptions import PapermillExecutionError

from speed_core.files import UserError, digest, disk_errors, read_text, without_users
from speed_core.store.artifacts import notebook_number

PROGRESS = re.compile(r": making it \(|(?<!\d)\d{1,3}%\|[ #]*\|")
LONGEST_PROGRESS = 1000  # characters of a line that shows progress; a longer line is a result
SENTINEL = "speed-core: every cell ran"
# Run in the kernel first: half of a UTF-16 pair that a cell prints cannot be sent, and ipykernel would lose the output.
PRINTABLE = r"""
def _printable():
    import re
    session = get_ipython().kernel.session
    pack = session.pack

    def escaped(value):
        if isinstance(value, str):
            return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", value)
        if isinstance(value, dict):
            return {escaped(k): escaped(v) for k, v in value.items()}
        return [escaped(v) for v in value] if isinstance(value, (list, tuple)) else value

    session.pack = lambda message: pack(escaped(message))


_printable()
del _printable
"""


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Report:
    """What happened to one notebook; `detail` says where and why it failed."""

    name: str
    status: Status
    seconds: float = 0.0
    detail: str = ""
    bad_input: bool = False  # a cell refused what the reader gave it (UserError)

    @property
    def ok(self) -> bool:
        return self.status == Status.OK


def notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted(p for p in folder.glob("[0-9][0-9]*_*.ipynb") if notebook_number(p))


def _read(path: Path) -> Any:
    """A notebook that somebody else wrote. Raises UserError for a file that is none."""
    try:
        nb = nbformat.reads(read_text(path), as_version=4)
        nb.cells = list(nb.cells)
    except UserError:
        raise
    except Exception as error:  # nbformat raises many types
        raise UserError(f"{path.name}: no notebook ({type(error).__name__}); give a file that Jupyter opens") from None
    return nb


def _tagged(path: Path) -> list[Any]:
    cells = _read(path).cells
    return [c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]


def parameters_of(path: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`; it may hold literals only."""
    cells = _tagged(path)
    if len(cells) != 1:
        raise UserError(f"{path.name}: {len(cells)} cells tagged 'parameters', needs exactly one; tag its parameter cell")
    out: dict[str, Any] = {}
    try:
        body = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise UserError(
            f"{path.name}: line {error.lineno} of the parameters cell is no Python; keep only NAME = literal"
        ) from None
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if not isinstance(target, ast.Name) or value is None:
            raise UserError(f"{path.name}: line {node.lineno} of the parameters cell is no assignment; keep only NAME = literal")
        try:
            out[target.id] = ast.literal_eval(value)
        except ValueError:
            raise UserError(
                f"{path.name}: parameter {target.id!r} is computed, not a literal; move it to the next cell"
            ) from None
    return out


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Refuse an unknown name (with the nearest known) or a value of another type than the default (None takes any)."""
    known = parameters_of(path)
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise UserError(f"parameter {name!r}: {path.name} has none of that name; {hint}")
        default = known[name]
        fits = default is None or (isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool))
        if not fits and not (isinstance(default, float) and type(value) is int):
            raise UserError(
                f"parameter {name!r} of {path.name}: {value!r} is {type(value).__name__}, "
                f"the default {default!r} is {type(default).__name__}; give that type"
            )


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    *,
    cell_timeout: int | None = None,
    kernel: str = "",
    cwd: Path | None = None,
    show: bool = True,
) -> Report:
    """Execute one notebook; `target` changes only if every cell ran.

    `cell_timeout`: seconds that one cell may take (None: no limit). `kernel`: its name, empty for the notebook's own.
    `cwd`: the folder in which it runs, by default the notebook's own.
    """
    if "overrides" in parameters:
        parameters = {**parameters, "overrides": without_users(parameters["overrides"])}
    if parameters or _tagged(source):  # a notebook without parameters is executed as it is
        check_parameters(source, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    started, problem, bad_input = time.time(), "", False
    work = target.with_name(f".{target.stem}.{os.getpid()}.ipynb")
    staged = target.with_name(f".{target.stem}.{os.getpid()}.in.ipynb")
    nb = _read(source)
    nb.cells.append(nbformat.v4.new_code_cell(f"print({SENTINEL!r})", metadata={"tags": ["sentinel"]}))
    try:
        with disk_errors(target):
            nbformat.write(nb, staged)
        # Nobody watches: widgets leave their text alone (`widgets.interactive`). The kernel inherits this environment.
        with environment(SPEED_HEADLESS="1", SPEED_NOTEBOOK=source.name), _cells_may_raise():
            papermill.execute_notebook(
                str(staged),
                str(work),
                parameters=dict(parameters),
                cwd=str(cwd or source.parent),
                progress_bar=False,
                log_output=False,
                stdout_file=sys.stdout if show else None,
                kernel_name=kernel or nb.metadata.get("kernelspec", {}).get("name", "python3"),
                language="python",
                execution_timeout=cell_timeout,
                interrupt_on_timeout=True,
                iopub_timeout=600,  # of nbclient, 4 s: a busy machine takes minutes to read twenty thousand updates that are under way
                coalesce_streams=True,
                # ipykernel warns on every start that it talks TCP, as every local kernel does.
                extra_arguments=["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={PRINTABLE}"],
            )
    except PapermillExecutionError as error:
        bad_input = error.ename in {UserError.__name__, *(kind.__name__ for kind in UserError.__subclasses__())}
        name = UserError.__name__ if bad_input else error.ename
        problem = f"cell {error.exec_count}{_line(error.traceback)}: {name}: {plain(error.evalue)}"
        if error.ename == "KeyboardInterrupt" and cell_timeout:
            problem += f"the cell took longer than {cell_timeout} s (--cell-timeout)"
    except UserError:  # no room for what would be executed
        raise
    except Exception as error:  # a dead kernel, a timeout: papermill raises many types; each is a failed notebook
        problem = f"{_last_started(work)}{type(error).__name__}: {plain(str(error))}"
    except BaseException:  # Ctrl-C or SIGTERM: what ran so far is kept as a failure, and the signal goes on
        _keep(work, target)
        raise
    finally:
        staged.unlink(missing_ok=True)
    if not problem:
        problem = unfinished(work)
    seconds = time.time() - started
    if problem:
        _keep(work, target)
        return Report(source.stem, Status.FAILED, seconds, problem, bad_input)
    done = nbformat.read(work, as_version=4)
    done.cells = [c for c in done.cells if "sentinel" not in c.metadata.get("tags", [])]
    _tidy(done)
    _relinked(done, source.parent.resolve(), target.parent.resolve())
    done.metadata["speed_check"] = digest(done.cells)
    try:
        with disk_errors(target):
            nbformat.write(done, work)
            os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
    target.with_name(f"{target.stem}.failed.ipynb").unlink(missing_ok=True)
    return Report(source.stem, Status.OK, seconds)


def changed(folder: Path) -> list[str]:
    """A line for each executed notebook of a folder that is not as `execute` wrote it. Those of earlier versions are not checked."""
    found = []
    for path in notebooks(folder) if folder.is_dir() else ():
        try:
            nb = nbformat.read(path, as_version=4)
            same = nb.metadata.get("speed_check") in (None, digest(nb.cells))
        except Exception:  # nbformat raises many types for a file that is no notebook any more
            same = False
        if not same:
            found.append(f"{path.name}: changed since it was executed; run it again")
    return found


@contextmanager
def _cells_may_raise() -> Iterator[None]:
    """Make papermill 2.7 treat a cell tagged `raises-exception` as nbclient and Jupyter do: it may fail, and the notebook goes on.
    Make nbclient read long lines in linear time."""
    # nbclient 0.11 tries its pattern at every character of a line, which takes minutes on one of many megabytes. Tried at the line's
    # start only, it finds the same.
    nbclient.client._RGX_CARRIAGERETURN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)
    module = papermill.execute
    own = module.raise_for_execution_errors

    def check(nb: Any, output_path: str) -> None:
        tagged = [c for c in nb.cells if "raises-exception" in c.metadata.get("tags", [])]
        shown = [c.get("outputs") for c in tagged]
        for cell in tagged:
            cell.outputs = [o for o in cell.get("outputs", []) if o.output_type != "error"]
            cell.metadata.get("papermill", {}).pop("exception", None)
        try:
            own(nb, output_path)
        finally:
            for cell, outputs in zip(tagged, shown, strict=True):
                cell.outputs = outputs

    module.raise_for_execution_errors = check
    try:
        yield
    finally:
        module.raise_for_execution_errors = own


def _tidy(nb: Any) -> None:
    """Take out the libraries' progress bars, which are widgets in a kernel: an exported page would wait for them. Fold the progress of
    cells that make many things, so that their results stay in sight."""
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        for output in (o for o in cell.outputs if o.output_type == "stream"):
            output["text"] = fold(output["text"])
    nb.metadata.pop("widgets", None)


def _relinked(nb: Any, here: Path, there: Path) -> None:
    """Rewrite the relative links of the text, pictures too, so that from `there` they lead to what they lead to from `here`."""

    def moved(found: re.Match[str]) -> str:
        to = here / found[1]
        return f"]({os.path.relpath(to, there)})" if to.is_file() else found[0]

    for cell in nb.cells if here != there else ():
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?![a-z]+:|/|#)([^)\s]+)\)", moved, cell.source)


def _shows_progress(line: str) -> bool:
    return len(line) < LONGEST_PROGRESS and bool(PROGRESS.search(line))


def fold(text: str) -> str:
    """A printed text in which each long row of progress lines ("NAME: making it", finished bars) is cut to its ends."""
    out: list[str] = []
    for progress, group in itertools.groupby(text.splitlines(keepends=True), _shows_progress):
        lines = list(group)
        if progress and len(lines) > 12:
            lines = [*lines[:4], f"    ({len(lines) - 8} more lines of progress)\n", *lines[-4:]]
        out += lines
    return "".join(out)


def _keep(work: Path, target: Path) -> None:
    """Put an unfinished notebook beside the last good one. Half of a file, which a full disk leaves, is deleted."""
    try:
        nbformat.read(work, as_version=4)
    except Exception:
        work.unlink(missing_ok=True)
    else:
        os.replace(work, target.with_name(f"{target.stem}.failed.ipynb"))


def plain(text: str) -> str:
    """The last line of a message, without colours, cut to a length that a table can show."""
    return _uncoloured(text.strip().rpartition("\n")[2][:2000])[:400]


def _uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _line(traceback: Sequence[str]) -> str:
    """The line of the cell that failed, of IPython's traceback: ", line `...`", empty when it shows none."""
    found = re.search(r"^-+> ?\d+ (.+)$", _uncoloured("\n".join(traceback)), re.MULTILINE)
    return f", line `{found[1].strip()[:120]}`" if found else ""


def _last_started(work: Path) -> str:
    """ "cell N, `its first line`: " of the last cell that papermill began, empty when there is none."""
    try:
        cells = nbformat.read(work, as_version=4).cells
    except Exception:  # not begun, or half written on a full disk
        cells = []
    code = [c for c in cells if c.cell_type == "code"]
    begun = [(n, c) for n, c in enumerate(code, 1) if c.metadata.get("papermill", {}).get("start_time")]
    return f"cell {begun[-1][0]}, `{begun[-1][1].source.strip().splitlines()[0][:120]}`: " if begun else ""


def unfinished(path: Path) -> str:
    """Why an executed notebook does not count as complete; empty when it does."""
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    for number, cell in enumerate(code, 1):
        if cell.get("execution_count") is None and "skip-execution" not in cell.metadata.get("tags", []):
            return f"code cell {number} never ran (the kernel stopped before it)"
    printed = "".join(o.get("text", "") for o in code[-1].get("outputs", []))
    return "" if SENTINEL in printed else "the last cell did not print the sentinel"


def choose(folder: Path, only: Sequence[str] = (), start: str = "") -> list[Path]:
    """The notebooks whose numbers `only` names (all, when it names none), from number `start` on: "7" is 07 and 07b, "7b" is 07b
    alone. Refuses unknown numbers."""
    found = {notebook_number(p): p for p in notebooks(folder)}
    for option, numbers in (("--only", only), ("--from", [start] if start else [])):
        if unknown := [n for n in numbers if _padded(n) not in found]:
            raise UserError(f"{option} {unknown[0]}: no such notebook; numbers are {', '.join(found)}")
    wanted = {_padded(n) for n in only} or set(found)
    chosen = [p for number, p in found.items() if {number, number[:2]} & wanted and number >= _padded(start)]
    if not chosen:
        raise UserError(f"--only {','.join(only)} --from {start}: leaves no notebook; give one of the two")
    return chosen


def _padded(number: str) -> str:
    """ "7" as "07", "7b" as "07b"."""
    return number.zfill(2 + number[-1:].isalpha())

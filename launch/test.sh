#!/usr/bin/env bash
# Makes .venv with the development tools and runs every check: lint, format, types, layers, tests.
# usage: bash launch/test.sh [pytest option ...]      for example: bash launch/test.sh tests/laws -x; without options all but the tests marked long
#        bash launch/test.sh --vllm [pytest option ...]      instead, the tests of vLLM, which gets an environment of its own (vllm_env.sh)
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

gpu="" marks=()
if ! has_gpu; then gpu=" and not gpu" marks=(-m "not gpu"); fi

if [[ "${1:-}" == --vllm ]]; then
  shift
  export VLLM_VENV="${VLLM_VENV:-$ROOT/.venv-vllm}" RLHF_DIST_VLLM_PYTHON
  RLHF_DIST_VLLM_PYTHON="$VLLM_VENV/bin/python"
  bash launch/vllm_env.sh
  install_package dev
  export_offline_environment
  # The engine in its own environment; then runs in ours, which start it there.
  "$RLHF_DIST_VLLM_PYTHON" -m pytest "${marks[@]}" tests/rollout/test_vllm.py "$@"
  exec "$VENV/bin/python" -m pytest -m vllm tests/distributed tests/benchmarks "$@"
fi

install_package dev
export_offline_environment
export PATH="$VENV/bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports
began=$SECONDS
if (($#)); then
  python -m pytest "${marks[@]}" "$@"
else # runs of several processes wait as much as they compute: they and all the rest go side by side
  status=0 log="$(mktemp)"
  python -m pytest -m "distributed and not long$gpu" >"$log" 2>&1 &
  runs=$!
  trap '[[ -z "$runs" ]] || kill "$runs"; rm -f "$log"' EXIT
  python -m pytest -m "not distributed and not long$gpu" || status=$?
  wait "$runs" || status=$?
  runs=""
  cat "$log"
  if ((status)); then exit "$status"; fi
fi
printf 'tests: %d s\n' $((SECONDS - began))

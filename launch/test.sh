#!/usr/bin/env bash
# Makes .venv with the development tools and runs every check: lint, format, types, layers, tests.
# usage: bash launch/test.sh [pytest option ...]      for example: bash launch/test.sh tests/laws -x
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

install_package dev
export_offline_environment
export PATH="$VENV/bin:$PATH"

marks=()
if ! has_gpu; then marks=(-m "not gpu"); fi

ruff check .
ruff format --check .
mypy
lint-imports
began=$SECONDS
python -m pytest "${marks[@]}" "$@"
printf 'tests: %d s\n' $((SECONDS - began))

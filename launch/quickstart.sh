#!/usr/bin/env bash
# Makes .venv, installs, and runs the built-in demonstration end to end. Safe to repeat: what is installed stays installed.
# usage: bash launch/quickstart.sh [option of rlhf-dist demo ...]
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

install_package ""
export_offline_environment

began=$SECONDS
"$VENV/bin/rlhf-dist" demo --output runs/quickstart "$@"
printf 'demo: %d s; everything it made is in %s\n' $((SECONDS - began)) "$ROOT/runs/quickstart"

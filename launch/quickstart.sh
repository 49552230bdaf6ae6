#!/usr/bin/env bash
# Makes .venv, installs, and runs the built-in demonstration end to end. Safe to repeat: what is installed stays installed.
# usage: bash launch/quickstart.sh [key.path=value for rlhf-dist ppo ...]
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

install_package ""
export_offline_environment

began=$SECONDS
"$VENV/bin/rlhf-dist" toy --output runs/quickstart/task
printf 'task and language model: %d s\n' $((SECONDS - began))

began=$SECONDS
"$VENV/bin/rlhf-dist" ppo --config configs/recipes/quickstart.yaml "$@"
printf 'PPO: %d s\n' $((SECONDS - began))

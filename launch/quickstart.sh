#!/usr/bin/env bash
# Makes .venv, installs, and runs the built-in pipeline end to end: SFT, reward model, PPO, before and after. Safe to repeat.
# usage: bash launch/quickstart.sh [key.path=value for rlhf-dist ppo ...]
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

install_package ""
export_offline_environment
recipes=configs/recipes/quickstart
began=$SECONDS

# stage NAME COMMAND ...: runs it and says how long it took
stage() {
  local name="$1" start=$SECONDS
  shift
  printf '\n== %s ==\n' "$name"
  "$VENV/bin/rlhf-dist" "$@"
  printf '%s: %d s\n' "$name" $((SECONDS - start))
}

stage "task and untrained model" toy --output runs/quickstart/task
stage "1. supervised fine-tuning" sft --config $recipes/sft.yaml
stage "2. reward model" reward --config $recipes/reward.yaml
stage "3. PPO" ppo --config $recipes/ppo.yaml "$@"
printf 'the whole pipeline: %d s\n' $((SECONDS - began))

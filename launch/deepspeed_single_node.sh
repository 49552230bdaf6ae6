#!/usr/bin/env bash
# Runs a stage of rlhf-dist under the deepspeed launcher on this machine: no Ray, no ssh; every engine spans all ranks.
# usage: bash launch/deepspeed_single_node.sh [sft|reward|dpo|ppo] CONFIG [key.path=value ...]      (default: ppo)
#   RANKS         processes to start (default: one a visible GPU, else 2)
#   MASTER_PORT   port of the process group (default: DeepSpeed's, 29500)
# placement.launcher=spmd is set here, for every stage. RANKS decides how many ranks there are: `policy.ranks`, `model.ranks` and the like,
# which only Ray reads, are overwritten with it in the config that is saved with the run.
# Runs in this repository's root, so relative paths in the config start there.
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
stage=ppo
if (($# >= 1)) && is_stage "$1"; then
  stage="$1"
  shift
fi
(($# >= 1)) || die "usage: bash launch/deepspeed_single_node.sh [sft|reward|dpo|ppo] CONFIG [key.path=value ...]"

config="$(config_path "$1")"
shift
deepspeed="$(program deepspeed)"
export_accelerator
cd "$ROOT"

# The launcher drops CUDA_VISIBLE_DEVICES when it is also told a number: with the variable set, the number shortens the variable instead.
ranks=()
if has_gpu && [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
  if [[ -n "${RANKS:-}" ]]; then CUDA_VISIBLE_DEVICES="$(cut -d , -f "1-$RANKS" <<<"$CUDA_VISIBLE_DEVICES")"; fi
  export CUDA_VISIBLE_DEVICES
else
  default=2
  if has_gpu; then default="$(nvidia-smi -L | grep -c '^GPU')"; fi
  ranks=(--num_gpus "${RANKS:-$default}")
fi

# An empty hostfile keeps the launcher on this machine; ranks learn their number from LOCAL_RANK, not from an argument.
exec "$deepspeed" --hostfile /dev/null "${ranks[@]}" ${MASTER_PORT:+--master_port "$MASTER_PORT"} --no_local_rank \
  --module rlhf_dist.cli.main "$stage" --config "$config" placement.launcher=spmd "$@"

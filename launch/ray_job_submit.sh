#!/usr/bin/env bash
# Submits a stage of rlhf-dist to a running Ray cluster (`ray start --head` on a laptop, or a real one) and follows its log.
# usage: bash launch/ray_job_submit.sh [sft|reward|dpo|ppo] CONFIG [key.path=value ...]      (default: ppo)
#   RAY_ADDRESS   the cluster's dashboard (default: http://127.0.0.1:8265)
#   RAY_JOB_ARGS  further options of `ray job submit`, for example "--no-wait --submission-id trial-7"
# placement.launcher=ray is set here, for every stage. Ranks, CPUs and GPUs are those of the config: of `model` for sft, reward and dpo
# (model.ranks=8), of `policy`, `reference`, `value` and `reward` for ppo.
# The job runs in this repository's root, so relative paths in the config start there. All nodes must see the repository, its
# environment, the models and the data under the same paths: a shared filesystem, or the images in docker/.
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
stage=ppo
if (($# >= 1)) && is_stage "$1"; then
  stage="$1"
  shift
fi
(($# >= 1)) || die "usage: bash launch/ray_job_submit.sh [sft|reward|dpo|ppo] CONFIG [key.path=value ...]"

config="$(config_path "$1")"
shift
ray="$(program ray)"
rlhf_dist="$(program rlhf-dist)"
# A cluster whose head found a token file asks for the token, but `ray job submit` sends it only when told so (seen with Ray 2.60).
if [[ -z "${RAY_AUTH_MODE:-}" && -f "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]]; then export RAY_AUTH_MODE=token; fi
read -r -a job_args <<<"${RAY_JOB_ARGS:-}"

exec "$ray" job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" "${job_args[@]}" -- \
  env -C "$ROOT" "$rlhf_dist" "$stage" --config "$config" placement.launcher=ray "$@"

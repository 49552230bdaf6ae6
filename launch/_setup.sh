# shellcheck shell=bash
# Sourced by the scripts beside it, which have set -euo pipefail: one virtual environment, installed once, the same for all of them.
#
# Environment a caller may set:
#   PYTHON            the interpreter to build the environment with (default: python3, else python3.12, 3.11, 3.10)
#   VENV              where the environment lives (default: .venv in the repository)
#   TORCH_INDEX_URL   package index to take torch from (default without a GPU: PyTorch's CPU index where it can be reached)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

die() {
  printf '%s\n' "$*" >&2
  exit 2
}

has_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# The named program of the environment, or the one on PATH (inside the images there is no environment).
program() {
  if [[ -x "$VENV/bin/$1" ]]; then
    printf '%s\n' "$VENV/bin/$1"
  else
    command -v "$1" || die "$1 is not installed: run bash launch/quickstart.sh once, or activate an environment that has rlhf-dist"
  fi
}

# Whether a word names a stage, that is, a verb of rlhf-dist that a launcher can run.
is_stage() {
  case "$1" in sft | reward | dpo | ppo) true ;; *) false ;; esac
}

# A config as an absolute path: as seen from where the caller stands, else from the repository root.
config_path() {
  if [[ -f "$1" ]]; then
    realpath "$1"
  elif [[ -f "$ROOT/$1" ]]; then
    realpath "$ROOT/$1"
  else
    die "there is no config file $1, neither here nor in $ROOT"
  fi
}

supported_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.10, 3.11 or 3.12 found: install one, or name it with PYTHON=/path/to/python"
}

# Where pip should look for torch besides its own indexes. Without a GPU that is PyTorch's CPU index: the build on PyPI brings gigabytes of CUDA along.
torch_index_options() {
  local index="${TORCH_INDEX_URL:-}"
  if [[ -z "$index" ]] && ! has_gpu; then
    if "$VENV/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$TORCH_CPU_INDEX" 2>/dev/null; then
      index="$TORCH_CPU_INDEX"
    else
      printf '%s cannot be reached: torch comes from the indexes pip is configured with\n' "$TORCH_CPU_INDEX" >&2
    fi
  fi
  [[ -z "$index" ]] || printf -- '--extra-index-url\n%s\n' "$index"
}

# install_package EXTRAS: makes the environment and installs torch, then the package (editable) with the extras ("" or "dev").
# Does nothing when the same constraints, setup.cfg and location have been installed before.
install_package() {
  local extras="$1" constraints="$ROOT/constraints-cpu.txt" key began python index_options
  if has_gpu; then constraints="$ROOT/constraints-cuda.txt"; fi
  key="$(cat "$ROOT"/constraints-*.txt "$ROOT/setup.cfg" "$ROOT/pyproject.toml" <(printf '%s %s' "$ROOT" "$constraints") | sha256sum | cut -d ' ' -f 1)"
  if [[ -f "$VENV/.installed-${extras:-base}" && "$(<"$VENV/.installed-${extras:-base}")" == "$key" ]]; then
    return
  fi
  if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(supported_python)"
    "$python" -m venv "$VENV"
  fi
  mapfile -t index_options < <(torch_index_options)

  printf 'Installing torch into %s ...\n' "$VENV"
  began=$SECONDS
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "${index_options[@]}" torch
  printf '  torch: %d s\n' $((SECONDS - began))

  printf 'Installing rlhf-dist%s ...\n' "${extras:+ with the extra $extras}"
  began=$SECONDS
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "${index_options[@]}" -e "$ROOT${extras:+[$extras]}"
  printf '  rlhf-dist and its dependencies: %d s\n' $((SECONDS - began))

  printf '%s' "$key" >"$VENV/.installed-base"
  if [[ -n "$extras" ]]; then printf '%s' "$key" >"$VENV/.installed-$extras"; fi
}

# For runs that need nothing from a model hub: no lookups there, and DeepSpeed on the CPU where there is no GPU.
export_offline_environment() {
  export HF_HUB_OFFLINE=1
  export_accelerator
}

export_accelerator() {
  if ! has_gpu; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
}

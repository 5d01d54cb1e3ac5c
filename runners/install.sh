#!/usr/bin/env bash
# runners/install.sh FILE: install the packages listed in FILE into .venv, by uv where there is one.
# Without an NVIDIA GPU PyTorch comes from its CPU index, .3 GB instead of 5; from PyPI where that does not answer.
set -euo pipefail
: "${TORCH_INDEX=https://download.pytorch.org/whl/cpu}"  # empty: PyPI

install() {
  if command -v uv >/dev/null && uv pip install --quiet --python .venv/bin/python "$@"; then return; fi
  .venv/bin/pip install --quiet "$@"
}

has_torch() { .venv/bin/python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('torch'))"; }
answers() { curl --silent --fail --location --head --max-time 5 --output /dev/null "$1"; }

if ! has_torch && ! command -v nvidia-smi >/dev/null && [[ -n "$TORCH_INDEX" ]] && answers "$TORCH_INDEX/torch/"; then
  echo "No GPU: PyTorch's CPU build, from $TORCH_INDEX"
  # Both from one index: builds for CPUs and for GPUs do not work together.
  install --index-url "$TORCH_INDEX" $(grep -Eo '^torch(vision)?[>=][^ #]*' requirements.txt) || echo "That failed. PyTorch comes from PyPI." >&2
fi
install -r "$1"

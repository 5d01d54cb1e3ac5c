#!/usr/bin/env bash
# Stage 0: install what is missing and check that the dataset is in place.
#   ./runners/0-setup.sh                        install; VOC 2012 is looked for in data/voc12
#   DATASET=shapes ./runners/0-setup.sh         also generate the demo's dataset
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh

make --quiet .venv/installed
PYTHON=.venv/bin/python
if [[ "$DATASET" == shapes ]]; then
  "$PYTHON" -m datasets.shapes --data_dir "$DATA_DIR"
fi
"$PYTHON" - "$DATASET" "$DATA_DIR" "$DOMAIN_TRAIN" "$DOMAIN_TEST" <<'CHECK'

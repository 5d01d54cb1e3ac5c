#!/usr/bin/env bash
# Stage 0: install what is missing and look whether the dataset is in place.
#   ./runners/0-setup.sh                        VOC 2012, in data/voc12 (SETUP.md says what goes where)
#   DATASET=shapes ./runners/0-setup.sh         also generate the demo's dataset
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh

make --quiet .venv/installed
PYTHON=.venv/bin/python

if [[ "$DATASET" == shapes ]]; then
  "$PYTHON" -m datasets.shapes --data_dir "$DATA_DIR" --workers "$WORKERS"
fi
run -m datasets "$DOMAIN_TRAIN" "$DOMAIN_TEST"
printf '\nNext: ./runners/1-csrm.sh\n'

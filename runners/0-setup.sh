#!/usr/bin/env bash
# Stage 0: install what is missing, make the dataset if it can be made, and look it over.
#   ./runners/0-setup.sh                        VOC 2012 and SBD: downloaded to data/voc12, converted
#   DATASET=coco14 ./runners/0-setup.sh         MS COCO 2014: downloaded to data/coco14, converted
#   DATASET=deepglobe PREPARE_FLAGS="--download_dir $HOME/deepglobe" ./runners/0-setup.sh      from files at hand
#   DATASET=folder DATA_DIR=~/birds ./runners/0-setup.sh                                   your own: looked over only
# What is there already is skipped. SETUP.md: machines without internet, what goes where.
here=$(dirname "${BASH_SOURCE[0]}"); [[ -f $here/config/env.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/runners  # sbatch runs a copy
[[ -f $here/config/env.sh ]] || { echo "$here/config/env.sh: no such file. Start from the repository's root." >&2; exit 2; }
source "$here/config/env.sh"
if ((NODE > 0)); then exit; fi  # machine 0 does it for all
stage 0 "installation and data"
printf 'All stages: %s\n' "$TAKES"

make --quiet .venv/installed
PYTHON=.venv/bin/python

case "$DATASET" in
shapes) "$PYTHON" -m datasets.prepare.shapes --data_dir "$DATA_DIR" --workers "$WORKERS" ;;
voc12 | coco14 | deepglobe) run -m datasets.prepare --num_workers "$WORKERS" $PREPARE_FLAGS ;;
esac
run -m datasets.verify "$DOMAIN_TRAIN" "$DOMAIN_TEST" --num_workers "$WORKERS" --output_dir "$REPORT/data" \
  --scored ${DOMAIN_EVAL:+"$DOMAIN_EVAL"} ${DOMAIN_SCORE:+"$DOMAIN_SCORE"}
echo; next_stage 1-csrm.sh

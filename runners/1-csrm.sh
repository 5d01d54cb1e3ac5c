#!/usr/bin/env bash
# Stages 1 and 2: a CAM prior, CSRM, and CSRM's pseudo masks of the training images.
#   ./runners/1-csrm.sh                               VOC 2012
#   DATASET=coco14 ./runners/1-csrm.sh                MS COCO 2014
#   DATASET=folder DATA_DIR=~/birds ./runners/1-csrm.sh
#   PRIOR=weights/puzzle.pth ./runners/1-csrm.sh      start from public weights instead of training a prior
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh
: "${PRIOR:=experiments/models/$TAG_PRIOR.pth}"

RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"
MAPS=experiments/predictions

if [[ "$PRIOR" == "experiments/models/$TAG_PRIOR.pth" ]]; then
  run train_classifier.py --tag "$TAG_PRIOR" --domain_train "$DOMAIN_TRAIN" $RUN_FLAGS $BACKBONE $IMAGE_FLAGS $PRIOR_FLAGS
  run inference.py --tag "$TAG_PRIOR" --domain "$DOMAIN_TRAIN" --save_pseudos false $RUN_FLAGS $VIEW_FLAGS
  score prior_cam "$DOMAIN_EVAL" "$MAPS/$TAG_PRIOR@$DOMAIN_TRAIN/cams" --mode cams
fi

run train_csrm.py --tag "$TAG_CSRM" --domain_train "$DOMAIN_TRAIN" --restore "$PRIOR" \
  $RUN_FLAGS $BACKBONE $IMAGE_FLAGS $CSRM_FLAGS
run inference.py --tag "$TAG_CSRM" --domain "$DOMAIN_TRAIN" --threshold "$THRESHOLD" --crf_t "$CRF_T" $RUN_FLAGS $VIEW_FLAGS
score csrm_cam "$DOMAIN_EVAL" "$MAPS/$TAG_CSRM@$DOMAIN_TRAIN/cams" --mode cams
score pseudo "$DOMAIN_EVAL" "$PSEUDOS"

printf '\nPseudo masks: %s\nNext: ./runners/3-sam-refinement.sh\n' "$PSEUDOS"

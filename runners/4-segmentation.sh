#!/usr/bin/env bash
# Stage 4: DeepLabV3+ on the refined pseudo masks, its predictions on the test split, and the report of all stages.
#   ./runners/4-segmentation.sh
#   MASKS=path/to/pseudo-masks ./runners/4-segmentation.sh     learn other masks than stage 3's
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh
: "${MASKS:=$REFINED}"

RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"
PREDICTIONS=experiments/predictions/$TAG_SEG@$DOMAIN_TEST/masks

run train_segmentation.py --tag "$TAG_SEG" --domain_train "$DOMAIN_TRAIN" --masks_dir "$MASKS" \
  $RUN_FLAGS $BACKBONE_SEG $IMAGE_FLAGS $SEG_FLAGS
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$DOMAIN_TEST" $RUN_FLAGS $VIEW_FLAGS

#!/usr/bin/env bash
# Stage 4: DeepLabV3+ on the refined pseudo masks, its segmentation of the test split, and the report of all stages.
#   ./runners/4-segmentation.sh
#   MASKS=path/to/masks ./runners/4-segmentation.sh       learn other masks than those of stage 3
#   CORRECTED=corrected ./runners/4-segmentation.sh       a second model, with masks that somebody has corrected
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh
: "${MASKS:=$REFINED}"

SECOND=()
if [[ -n "$CORRECTED" ]]; then SECOND=(--corrected_dir "$CORRECTED"); fi
RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"

run train_segmentation.py --tag "$TAG_SEG" --domain_train "$DOMAIN_TRAIN" --masks_dir "$MASKS" \
  ${SECOND[@]+"${SECOND[@]}"} $RUN_FLAGS $BACKBONE_SEG $IMAGE_FLAGS $SEG_FLAGS
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$DOMAIN_TEST" $RUN_FLAGS $VIEW_FLAGS
score "segmentation_val${CORRECTED:+_corrected}" "$DOMAIN_SCORE" "$PREDICTIONS/$TAG_SEG@$DOMAIN_TEST/masks"

# The other columns of the report exist for training images only: some of them are segmented too.
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$SHEET" --max_images 200 $RUN_FLAGS $VIEW_FLAGS
report

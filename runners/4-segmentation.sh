#!/usr/bin/env bash
# Stage 4: DeepLabV3+ on the refined pseudo masks, its segmentation of the test split, and the report of all stages.
#   ./runners/4-segmentation.sh
#   ROUNDS=2 ./runners/4-segmentation.sh                  the model labels its training photographs anew, and a second
#                                                         model learns these masks
#   MASKS=path/to/masks ./runners/4-segmentation.sh       learn other masks than those of stage 3
#   CORRECTED=corrected ./runners/4-segmentation.sh       another model, with masks that somebody has corrected
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh
stage 4 "the final model"
: "${MASKS:=$REFINED}"

CORRECTIONS=()
if [[ -n "$CORRECTED" ]]; then CORRECTIONS=(--corrected_dir "$CORRECTED"); fi
RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"

# train_final: DeepLabV3+ on $MASKS, or finish it.
train_final() {
  run train_segmentation.py --tag "$TAG_SEG" --domain_train "$DOMAIN_TRAIN" --masks_dir "$MASKS" \
    ${CORRECTIONS[@]+"${CORRECTIONS[@]}"} $RUN_FLAGS $BACKBONE_SEG $IMAGE_FLAGS $SEG_FLAGS
}

train_final
FIRST=$TAG_SEG
for ((round = 2; round <= ROUNDS; round++)); do
  run inference.py --tag "$TAG_SEG" --domain "$DOMAIN_TRAIN" --save_cams false --pseudos_from masks --crf_t "$CRF_T" \
    $RUN_FLAGS $VIEW_FLAGS
  MASKS=$PREDICTIONS/$TAG_SEG@$DOMAIN_TRAIN/pseudos-masks-c$CRF_T
  score "relabelled_$round" "$DOMAIN_EVAL" "$MASKS"
  refine "$TAG_SEG" "$MASKS"
  MASKS=$PREDICTIONS/$TAG_SEG@$DOMAIN_TRAIN/sam-$PROPOSALS-$MERGE_MODE
  TAG_SEG=$FIRST-round$round
  train_final
done
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$DOMAIN_TEST" $RUN_FLAGS $VIEW_FLAGS
SUFFIX=${TAG_SEG#"$NAME-deeplab$VARIANT"}  # nothing, -corrected, -round2
score "segmentation_val${SUFFIX//-/_}" "$DOMAIN_SCORE" "$PREDICTIONS/$TAG_SEG@$DOMAIN_TEST/masks"

# The other columns of the report exist for training images only: some of them are segmented too.
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$SHEET" --max_images 200 $RUN_FLAGS $VIEW_FLAGS
report

#!/usr/bin/env bash
# Stage 4: DeepLabV3+ on the refined pseudo masks, its segmentation of the test split, and the report of all stages.
#   ./runners/4-segmentation.sh
#   MASKS=path/to/masks ./runners/4-segmentation.sh       learn other masks than those of stage 3
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh
: "${MASKS:=$REFINED}"

RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"

run train_segmentation.py --tag "$TAG_SEG" --domain_train "$DOMAIN_TRAIN" --masks_dir "$MASKS" \
  $RUN_FLAGS $BACKBONE_SEG $IMAGE_FLAGS $SEG_FLAGS
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$DOMAIN_TEST" $RUN_FLAGS $VIEW_FLAGS
score segmentation_val "$DOMAIN_SCORE" "$PREDICTIONS/$TAG_SEG@$DOMAIN_TEST/masks"

scores=()
for stage in prior_cam csrm_cam pseudo refined segmentation_val; do
  if [[ -f "$REPORT/$stage.json" ]]; then scores+=("$stage=$REPORT/$stage.json"); fi
done

# The other columns of the picture sheet exist for training images only: a few of them are segmented too.
SHEET=${DOMAIN_EVAL:-$DOMAIN_TRAIN}
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$SHEET" --max_images 48 $RUN_FLAGS $VIEW_FLAGS
columns=()
show() { if [[ -d "$2" ]]; then columns+=("$1=$2${3:-}"); fi; }
show "CAM prior" "$PREDICTIONS/$TAG_PRIOR@$DOMAIN_TRAIN/cams" :0.3
show "CSRM CAM" "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/cams" ":$THRESHOLD"
show "Pseudo mask" "$PSEUDOS"
show "Refined" "$REFINED"
show "DeepLabV3+" "$PREDICTIONS/$TAG_SEG@$SHEET/masks"
run report.py --domain "$SHEET" --output_dir "$REPORT" --summary ${scores[@]+"${scores[@]}"} --columns "${columns[@]}"

#!/usr/bin/env bash
# Stage 4: DeepLabV3+ on the refined pseudo masks, its segmentation of the test split, and the report of all stages.
#   ./runners/4-segmentation.sh
#   ROUNDS=2 ./runners/4-segmentation.sh                  a first model labels its training photographs anew, and the final
#                                                         model learns these masks (folder: by default)
#   MASKS=path/to/masks ./runners/4-segmentation.sh       learn other masks than those of stage 3
#   CORRECTED=corrected ./runners/4-segmentation.sh       another model, with masks that somebody has corrected; further
#                                                         corrections need a folder of another name
here=$(dirname "${BASH_SOURCE[0]}"); [[ -f $here/config/env.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/runners  # sbatch runs a copy
[[ -f $here/config/env.sh ]] || { echo "$here/config/env.sh: no such file. Start from the repository's root." >&2; exit 2; }
source "$here/config/env.sh"
stage 4 "the final model"
: "${MASKS:=$REFINED}"
if [[ ! -d "$MASKS" ]]; then
  refuse "$MASKS: no such folder of masks. Run ./runners/3-sam-refinement.sh first, or set MASKS to another."
fi

CORRECTIONS=()
if [[ -n "$CORRECTED" ]]; then CORRECTIONS=(--corrected_dir "$CORRECTED"); fi

# train_model TAG FLAGS...: DeepLabV3+ on $MASKS, or finish it.
train_model() {
  run train_segmentation.py --tag "$1" --domain_train "$DOMAIN_TRAIN" --masks_dir "$MASKS" \
    $RUN_FLAGS $BACKBONE_SEG $IMAGE_FLAGS $SEG_FLAGS "${@:2}"
}

START=()  # a model goes on from the weights of the one before: worth 1.6 points (docs/log.md)
for ((round = 1; round < ROUNDS; round++)); do
  train_model "$TAG_ROUND$round" ${START[@]+"${START[@]}"}
  START=(--restore "experiments/models/$TAG_ROUND$round.pth")
  # A trained model's labels are better than CAMs', so the dense CRF is told to trust them more.
  run inference.py --tag "$TAG_ROUND$round" --domain "$DOMAIN_TRAIN" --save_cams false --pseudos_from masks \
    --crf_t "$CRF_T" --crf_gt_prob 0.9 $RUN_FLAGS $VIEW_FLAGS
  own=$PREDICTIONS/$TAG_ROUND$round@$DOMAIN_TRAIN/pseudos-masks-c$CRF_T
  score "relabelled_$round" "$DOMAIN_EVAL" "$own"
  MASKS=$(relabelled "$round")
  if [[ "$MASKS" != "$own" ]]; then refine "$TAG_ROUND$round" "$own"; fi
done
train_model "$TAG_SEG" ${START[@]+"${START[@]}"} ${CORRECTIONS[@]+"${CORRECTIONS[@]}"}
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$DOMAIN_TEST" $RUN_FLAGS $VIEW_FLAGS $PREDICT_FLAGS
score "segmentation_val${CORRECTION/-/_}" "$DOMAIN_SCORE" "$PREDICTIONS/$TAG_SEG@$DOMAIN_TEST/masks"

# The other columns of the report exist for training images only: some of them are segmented too.
run train_segmentation.py --tag "$TAG_SEG" --predict --domain "$SHEET" --max_images 200 $RUN_FLAGS $VIEW_FLAGS $PREDICT_FLAGS
report

printf '\nFinal model: experiments/models/%s.pth, which has learnt %s\n' "$TAG_SEG" "$MASKS"
echo "Other photographs:" $PYTHON train_segmentation.py --tag "$TAG_SEG" --predict --images FOLDER $VIEW_FLAGS $PREDICT_FLAGS

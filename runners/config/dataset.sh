# One block of settings per dataset; SETUP.md says which variables can be set in the environment. The numbers of voc12 and coco14 are
# the published ones. Variables that end in _FLAGS, and BACKBONE*, are lists of flags, split at blanks: a path with blanks
# in them needs a link without (ln -s "/content/drive/My Drive" drive). All other paths may have blanks; NAME and DOMAIN_* may not.
#
# DOMAIN_TRAIN  images and labels to learn from        DOMAIN_EVAL   the part of it whose masks score the pseudo masks
# DOMAIN_TEST   images the final model segments        DOMAIN_SCORE  DOMAIN_TEST if it has masks
# Scores in the comments are mIoU, %.
# An empty DOMAIN_EVAL or DOMAIN_SCORE says that there are no masks: nothing is scored.

# choose NAME VALUE: what the name of an experiment does not mention. Of several, the first counts.
choose() {
  local chosen="CHOSEN_$1"
  if [[ -z "${!chosen:-}" ]]; then printf -v "$chosen" %s "$2"; fi
  if [[ -z "${!1:-}" ]]; then printf -v "$1" %s "$2"; fi
}

# test_on SPLIT: the split that the final model segments, if no other is chosen. Of others nobody knows whether they have masks.
test_on() {
  : "${DOMAIN_TEST:=$1}"
  if [[ "$DOMAIN_TEST" == "$1" ]]; then : "${DOMAIN_SCORE=$1}"; fi
}

REPORTS=experiments/reports/$NAME PREDICTIONS=experiments/predictions

case "$DATASET" in
voc12)
  # Published: CAM prior 53.7 (vanilla), 61.5 (P-OC), 62.9 (P-NOC) on train, with ResNeSt-269; final model 75.0 on test.
  # Not measured with this code; hours on a GPU are not known either.
  : "${DATA_DIR:=data/voc12}"
  : "${DOMAIN_TRAIN:=train_aug}" "${DOMAIN_EVAL=train}"; test_on val
  : "${IMAGE_FLAGS:=--image_size 512 --min_image_size 320 --max_image_size 640}"
  : "${BACKBONE:=--architecture resnest101e}" "${BACKBONE_SEG:=--architecture resnest269e}"
  : "${PRIOR_FLAGS:=--lr 0.1}"
  : "${CSRM_FLAGS:=--batch_size 32 --max_epoch 15 --max_steps 46 --c2s_fg 0.30 --contra_low_rank 3 --contra_high_rank 6}"
  : "${SEG_FLAGS:=--batch_size 32 --max_epoch 50 --lr 0.007}"
  ;;
coco14)
  # Published: CAM prior 33.7 (vanilla), 38.5 (P-OC), 40.7 (P-NOC) on train2014, with ResNeSt-269; final model 50.5 on
  # val2014. Not measured with this code; hours on a GPU are not known either.
  : "${DATA_DIR:=data/coco14}"
  : "${DOMAIN_TRAIN:=train2014}" "${DOMAIN_EVAL=$DOMAIN_TRAIN}"; test_on val2014
  : "${IMAGE_FLAGS:=--image_size 640 --min_image_size 400 --max_image_size 800}"
  : "${BACKBONE:=--architecture resnest269e}" "${BACKBONE_SEG:=--architecture resnest269e}"
  : "${PRIOR_FLAGS:=--lr 0.05 --batch_size 16 --accumulate_steps 2}"
  : "${CSRM_FLAGS:=--batch_size 32 --max_epoch 15 --max_steps 256 --c2s_fg 0.35 --contra_low_rank 3 --contra_high_rank 12}"
  : "${SEG_FLAGS:=--batch_size 16 --max_epoch 15 --lr 0.004}"
  ;;
folder)
  # Measured with PRESET=small on 800 photographs of six animals, one CPU core, seeds 0, 1, 2 (docs/log.md): prior's CAMs
  # 44.2, 44.8, 44.6, pseudo masks 62.0, 64.7, 62.4, those of the first round 67.6, 70.4, 67.7; final model 66.5, 66.2,
  # 67.2 on val.
  : "${DATA_DIR:?set DATA_DIR to the folder that holds images/ and labels.csv}"
  # Without a val split, the final model segments the training photographs. Where there are lists, folders are no splits.
  LISTS=("$DATA_DIR"/splits/*.txt)
  if [[ -f "$DATA_DIR/splits/val.txt" || ! -f "${LISTS[0]}" && -d "$DATA_DIR/images/train" && -d "$DATA_DIR/images/val" ]]; then
    : "${DOMAIN_TEST:=val}"
  fi
  : "${DOMAIN_TRAIN:=train}"; : "${DOMAIN_TEST:=$DOMAIN_TRAIN}"
  if [[ -d "$DATA_DIR/masks" ]]; then : "${DOMAIN_EVAL=$DOMAIN_TRAIN}" "${DOMAIN_SCORE=$DOMAIN_TEST}"; fi
  LABEL_FLAGS="--c2s_fg auto --c2s_bg auto --self_training auto --teacher_labels relative --s2c_sigma 0.6 --w_s2c 0.15 --w_contra 0.1"
  # L_c2s learns the prior's CAMs, which are means over scales, instead of CSRM's own of one view: then self-training pays
  # (docs/log.md). Weights of others as PRIOR have made no CAM files.
  case "$PRIOR" in
  vanilla | puzzle | poc | pnoc) LABEL_FLAGS+=" --c2s_labels $PREDICTIONS/$TAG_PRIOR@$DOMAIN_TRAIN/cams" ;;
  esac
  # Schedules count steps, so that 45 photographs are learnt like 4,500.
  case "$PRESET" in
  small)  # one CPU core: 800 photographs in about an hour; docs/log.md has the trials behind the flags of CSRM
    TAKES="about an hour on one CPU core with 800 photographs"
    : "${IMAGE_FLAGS:=--image_size 225 --min_image_size 160 --max_image_size 320}"
    : "${BACKBONE:=--architecture mobilenetv2_100 --mode fix}"
    START_SEG=""  # the final model learns from where CSRM ended: worth 3 points and more in so few steps (docs/log.md)
    if [[ -f "experiments/models/$TAG_CSRM.pth" ]]; then START_SEG="--restore experiments/models/$TAG_CSRM.pth"; fi
    : "${BACKBONE_SEG:=$BACKBONE --decoder_channels 64 $START_SEG}"
    : "${PRIOR_FLAGS:=--batch_size 16 --max_epoch 8 --max_steps 40 --lr 0.003 --augment none}"
    : "${CSRM_FLAGS:=--decoder_channels 64 --batch_size 8 --max_epoch 8 --max_steps 30 --optimizer adamw --lr 0.0001 --wd 0.01 --warmup_epochs 5 $LABEL_FLAGS}"
    : "${SEG_FLAGS:=--batch_size 16 --max_epoch 4 --max_steps 50 --optimizer adamw --lr 0.0001 --wd 0.01 --max_image_size 400}"
    ;;
  standard)  # one GPU
    : "${IMAGE_FLAGS:=--image_size 321 --min_image_size 240 --max_image_size 480}"
    : "${BACKBONE:=--architecture resnet50}" "${BACKBONE_SEG:=--architecture resnet50}"
    : "${PRIOR_FLAGS:=--max_epoch 15 --max_steps 46 --lr 0.01}" "${SEG_FLAGS:=--max_epoch 15 --max_steps 46}"
    : "${CSRM_FLAGS:=--max_epoch 15 --max_steps 46 --warmup_epochs 8 $LABEL_FLAGS}"
    ;;
  *) refuse "PRESET=$PRESET: choose small or standard" ;;
  esac
  : "${PREDICT_FLAGS:=--reading relative}"  # .5 to 4 points above argmax for models of pseudo masks (docs/log.md)
  choose PSEUDOS_FROM masks; choose THRESHOLD auto
  if [[ -z "${MASKS:-}" ]]; then choose ROUNDS 2; fi
  ;;
shapes)
  # Measured, seeds 0, 1, 2: prior 51.7, 51.3, 50.3; CSRM's CAMs 65.7, 63.2, 62.3; pseudo masks 87.6, 87.8, 85.1; final
  # model 89.2, 89.5, 88.5 on val. About 8 minutes in all on two CPU cores (README.md, docs/log.md).
  # A tiny network without pretrained weights, and schedules for two CPU cores and ten minutes.
  TAKES="about 8 minutes on two CPU cores"; DONE_BEFORE=([3]=71 [4]=76)  # per cent of that
  : "${DATA_DIR:=data/shapes}" 
  case "$NAME" in shapes | shapes-*) REPORTS=experiments/demo${NAME#shapes} ;; esac
  : "${DOMAIN_TRAIN:=train}" "${DOMAIN_EVAL=$DOMAIN_TRAIN}"; test_on val
  : "${IMAGE_FLAGS:=--image_size 97 --min_image_size 73 --max_image_size 129 --optimizer adamw --wd 0.01}"
  : "${BACKBONE:=--architecture test_resnet --backbone_weights none --trainable_stem --dilated}"
  : "${BACKBONE_SEG:=$BACKBONE --decoder_channels 64 --restore experiments/models/$TAG_CSRM.pth}"
  : "${PRIOR_FLAGS:=--batch_size 32 --max_epoch 20 --lr 0.003 --lr_alpha_scratch 1 --lr_alpha_bias 1 --augment none}"
  : "${CSRM_FLAGS:=--decoder_channels 64 --batch_size 16 --max_epoch 12 --max_steps 25 --warmup_epochs 6 --c2s_fg 0.25 --lr 0.001 --lr_alpha_scratch 3}"
  : "${REFINE_FLAGS:=--region_min_contrast 45 --inside_threshold 0.4}"
  : "${SEG_FLAGS:=--batch_size 16 --max_epoch 8 --lr 0.003 --lr_alpha_scratch 1 --min_image_size 80 --max_image_size 160}"
  : "${VIEW_FLAGS:=--scales 1}"
  choose PSEUDOS_FROM masks; choose THRESHOLD 0.25
  ;;
deepglobe)
  # Neither published nor measured: the settings are a guess.
  : "${DATA_DIR:=data/deepglobe}"
  : "${DOMAIN_TRAIN:=train}" "${DOMAIN_EVAL=$DOMAIN_TRAIN}"; test_on val
  : "${IMAGE_FLAGS:=--image_size 512 --min_image_size 448 --max_image_size 640}"
  : "${BACKBONE:=--architecture resnet50}" "${BACKBONE_SEG:=--architecture resnet50}"
  # 46 steps per epoch as for VOC, however many images there are: the segmentation branch needs its warm-up.
  : "${PRIOR_FLAGS:=--lr 0.01}" "${CSRM_FLAGS:=--max_steps 46}" "${SEG_FLAGS:=}"
  ;;
*) refuse "DATASET=$DATASET: choose voc12, coco14, folder, shapes or deepglobe" ;;
esac

: "${DOMAIN_EVAL=}" "${DOMAIN_SCORE=}"
for variable in NAME DOMAIN_TRAIN DOMAIN_EVAL DOMAIN_TEST DOMAIN_SCORE; do  # they get into lists of flags
  if [[ "${!variable}" == *[[:space:]]* ]]; then
    refuse "$variable=${!variable}: blanks are not possible in it. Choose a name without."
  fi
done
: "${TAKES:=not measured yet}"                # stage 0 says it of all stages
: "${VIEW_FLAGS:=}"                           # test-time scales and flip
: "${PREDICT_FLAGS:=}"                        # where the final model predicts without labels
choose PSEUDOS_FROM cams                      # cams, or masks: CSRM's segmentation branch
choose THRESHOLD 0.4                          # background threshold on the CAMs, or auto
choose CRF_T 10                               # dense CRF iterations of the pseudo masks
: "${PREPARE_FLAGS:=}"                        # of datasets.prepare: --download_dir DIR, --mirror URL
: "${SAM_CHECKPOINT:=}" "${SAM_TYPE:=vit_h}"  # Segment Anything's weights, and, of the first, the network
choose MERGE_MODE max_iou_imp2; : "${REFINE_FLAGS:=}"
choose ROUNDS 1                               # stage 4: models in a row, each on masks that the one before made
check_count ROUNDS
: "${CORRECTED:=}"                            # stage 4: folder of corrected masks (docs/review.md)
if [[ -n "$SAM_CHECKPOINT" ]]; then : "${PROPOSALS:=sam}"; fi
choose PROPOSALS regions                      # regions, sam (where there is a checkpoint), sam2, sam3 or files

if [[ "$THRESHOLD" != auto ]]; then  # as inference.py names the folder
  THRESHOLD=$(LC_ALL=C; printf %g "$THRESHOLD" 2>/dev/null || refuse "THRESHOLD=$THRESHOLD: must be auto, or a number such as 0.3.")
fi

# What is not as chosen above is part of the names, so that experiments that differ in it do not meet.
PSEUDO_VARIANT="" VARIANT=""
if [[ "$PSEUDOS_FROM" != "$CHOSEN_PSEUDOS_FROM" ]]; then PSEUDO_VARIANT+=-$PSEUDOS_FROM; fi
if [[ "$PSEUDOS_FROM" == cams && "$THRESHOLD" != "$CHOSEN_THRESHOLD" ]]; then PSEUDO_VARIANT+=-t$THRESHOLD; fi
if [[ "$CRF_T" != "$CHOSEN_CRF_T" ]]; then PSEUDO_VARIANT+=-c$CRF_T; fi
VARIANT=$PSEUDO_VARIANT
if [[ "$PROPOSALS" != "$CHOSEN_PROPOSALS" ]]; then VARIANT+=-$PROPOSALS; fi
if [[ "$MERGE_MODE" != "$CHOSEN_MERGE_MODE" ]]; then VARIANT+=-$MERGE_MODE; fi
if [[ -n "${MASKS:-}" ]]; then VARIANT=-$(basename "$MASKS"); fi
TAG_ROUND=$TAG_SEG$VARIANT-round  # and a number: the models before the final one, the same for more rounds and for fewer
if [[ "$ROUNDS" != "$CHOSEN_ROUNDS" ]]; then VARIANT+=-rounds$ROUNDS; fi
: "${REPORT:=$REPORTS$VARIANT}"  # scores of every stage, their table, the picture sheet
TAG_SEG=$TAG_SEG$VARIANT TAG_REFINED=$TAG_CSRM$PSEUDO_VARIANT
CORRECTION=""  # -corrected, and the folder's name if that is another
if [[ -n "$CORRECTED" ]]; then CORRECTION=-corrected-$(basename "$CORRECTED"); fi
if [[ "$CORRECTION" == -corrected-corrected ]]; then CORRECTION=-corrected; fi
TAG_SEG=$TAG_SEG$CORRECTION
SHEET=${DOMAIN_EVAL:-$DOMAIN_TRAIN}  # the split whose images the report shows
if [[ "$PSEUDOS_FROM" == cams ]]; then PSEUDOS=t$THRESHOLD; else PSEUDOS=masks; fi
PSEUDOS=$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/pseudos-$PSEUDOS-c$CRF_T
# merged TAG: where refine_sam.py puts the masks that it makes of those of TAG.
merged() { printf %s "$PREDICTIONS/$1@$DOMAIN_TRAIN/sam-$PROPOSALS-$MERGE_MODE"; }
REFINED=$(merged "$TAG_REFINED")
LEARNT=${MASKS:-}  # if these are no masks of the runners
# relabelled ROUND: the masks that a round's model makes for the next one. Image regions do not refine them: that costs
# .4 to 1.6 points (docs/log.md).
relabelled() {
  if [[ "$PROPOSALS" != regions ]]; then merged "$TAG_ROUND$1"; return; fi
  printf %s "$PREDICTIONS/$TAG_ROUND$1@$DOMAIN_TRAIN/pseudos-masks-c$CRF_T"
}
RELABELLED=$(relabelled $((ROUNDS - 1)))  # with ROUNDS above 1

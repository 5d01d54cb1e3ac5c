# One block of settings per dataset; every variable can be set in the environment. The numbers of voc12 and coco14 are
# the published ones. DOMAIN_EVAL is the part of DOMAIN_TRAIN whose masks score the pseudo masks (never train them);
# empty: there are none. Variables that end in _FLAGS, and BACKBONE*, are lists of flags, split at blanks.

case "$DATASET" in
voc12)
  : "${DATA_DIR:=data/voc12}" "${DOMAIN_TRAIN:=train_aug}" "${DOMAIN_EVAL=train}" "${DOMAIN_TEST:=val}"
  : "${IMAGE_FLAGS:=--image_size 512 --min_image_size 320 --max_image_size 640}"
  : "${BACKBONE:=--architecture resnest101e}" "${BACKBONE_SEG:=--architecture resnest269e}"
  : "${PRIOR_FLAGS:=--lr 0.1}"
  : "${CSRM_FLAGS:=--batch_size 32 --max_epoch 15 --max_steps 46 --c2s_fg 0.30 --contra_low_rank 3 --contra_high_rank 6}"
  : "${SEG_FLAGS:=--batch_size 32 --max_epoch 50 --lr 0.007}"
  ;;
coco14)
  : "${DATA_DIR:=data/coco14}" "${DOMAIN_TRAIN:=train2014}" "${DOMAIN_EVAL=train2014}" "${DOMAIN_TEST:=val2014}"
  : "${IMAGE_FLAGS:=--image_size 640 --min_image_size 400 --max_image_size 800}"
  : "${BACKBONE:=--architecture resnest269e}" "${BACKBONE_SEG:=--architecture resnest269e}"
  : "${PRIOR_FLAGS:=--lr 0.05 --batch_size 16 --accumulate_steps 2}"
  : "${CSRM_FLAGS:=--batch_size 32 --max_epoch 15 --max_steps 256 --c2s_fg 0.35 --contra_low_rank 3 --contra_high_rank 12}"
  : "${SEG_FLAGS:=--batch_size 16 --max_epoch 15 --lr 0.004}"
  ;;
folder)
  : "${DATA_DIR:?set DATA_DIR to the folder that holds images/ and labels.csv}"
  if [[ -d "$DATA_DIR/masks" ]]; then : "${DOMAIN_EVAL=train}"; else : "${DOMAIN_EVAL=}"; fi
  : "${DOMAIN_TRAIN:=train}" "${DOMAIN_TEST:=val}"
  : "${IMAGE_FLAGS:=--image_size 320 --min_image_size 240 --max_image_size 480}"
  : "${BACKBONE:=--architecture resnet50}" "${BACKBONE_SEG:=--architecture resnet50}"
  : "${PRIOR_FLAGS:=--lr 0.01}" "${CSRM_FLAGS:=}" "${SEG_FLAGS:=}"
  ;;
shapes)
  : "${DATA_DIR:=data/shapes}" "${DOMAIN_TRAIN:=train}" "${DOMAIN_EVAL=train}" "${DOMAIN_TEST:=val}"
  : "${REPORT:=experiments/demo${NAME#shapes}}"
  # A tiny network without pretrained weights, wide learning rates, short schedules: for two CPU cores and ten minutes.
  : "${IMAGE_FLAGS:=--image_size 128 --min_image_size 96 --max_image_size 160}"
  : "${BACKBONE:=--architecture test_resnet --backbone_weights none --trainable_stem}"
  : "${BACKBONE_SEG:=$BACKBONE --decoder_channels 64}"
  : "${PRIOR_FLAGS:=--batch_size 32 --max_epoch 20 --lr 0.05 --lr_alpha_scratch 2}"
  : "${CSRM_FLAGS:=--decoder_channels 64 --batch_size 16 --max_epoch 5 --lr 0.01}"
  : "${SEG_FLAGS:=--batch_size 16 --max_epoch 10 --lr 0.01}"
  : "${VIEW_FLAGS:=--scales 1,1.5}"
  ;;
*)
  echo "DATASET=$DATASET: choose voc12, coco14, folder or shapes" >&2
  exit 2
  ;;
esac

: "${REPORT:=experiments/reports/$NAME}"  # scores of every stage, their table, the picture sheet
: "${VIEW_FLAGS:=}"                       # test-time scales and flip
: "${THRESHOLD:=0.4}"                     # background threshold of the pseudo masks
: "${CRF_T:=10}"                          # dense CRF iterations of the pseudo masks
PSEUDOS=experiments/predictions/$TAG_CSRM@$DOMAIN_TRAIN/pseudos-t$THRESHOLD-c$CRF_T

#!/usr/bin/env bash
# Stages 1 and 2: a CAM prior, CSRM, and CSRM's pseudo masks of the training images.
#   ./runners/1-csrm.sh                                        VOC 2012
#   DATASET=coco14 ./runners/1-csrm.sh                         MS COCO 2014
#   DATASET=folder DATA_DIR=~/birds ./runners/1-csrm.sh        your own photographs
#   PRIOR=pnoc ./runners/1-csrm.sh                             another prior than vanilla: puzzle, poc or pnoc
#   PRIOR=weights/puzzle.pth ./runners/1-csrm.sh               public weights instead of a prior trained here
here=$(dirname "${BASH_SOURCE[0]}"); [[ -f $here/config/env.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/runners  # sbatch runs a copy
[[ -f $here/config/env.sh ]] || { echo "$here/config/env.sh: no such file. Start from the repository's root." >&2; exit 2; }
source "$here/config/env.sh"
stage 1 "CAM prior (1), CSRM and its pseudo masks (2)"

# train_prior TAG METHOD FLAGS...: train a classifier, or finish it; a finished one is left as it is.
train_prior() {
  run train_classifier.py --tag "$1" --method "$2" "${@:3}" --domain_train "$DOMAIN_TRAIN" \
    $RUN_FLAGS $BACKBONE $IMAGE_FLAGS $PRIOR_FLAGS
}

case "$PRIOR" in
vanilla | puzzle | poc | pnoc)
  ORDINARY=()
  if [[ "$PRIOR" == p*oc ]]; then
    if [[ -z "${OC_WEIGHTS:-}" ]]; then
      OC_WEIGHTS=experiments/models/$TAG_VANILLA.pth
      train_prior "$TAG_VANILLA" vanilla
    fi
    ORDINARY=(--oc_weights "$OC_WEIGHTS")
  fi
  train_prior "$TAG_PRIOR" "$PRIOR" ${ORDINARY[@]+"${ORDINARY[@]}"}  # bash 3.2 takes an empty list for an unset one
  run inference.py --tag "$TAG_PRIOR" --domain "$DOMAIN_TRAIN" --save_pseudos false $RUN_FLAGS $VIEW_FLAGS
  score prior_cam "$DOMAIN_EVAL" "$PREDICTIONS/$TAG_PRIOR@$DOMAIN_TRAIN/cams" --mode cams
  PRIOR=experiments/models/$TAG_PRIOR.pth
  ;;
*)
  if [[ ! -f "$PRIOR" ]]; then
    refuse "PRIOR=$PRIOR: no such file. Choose vanilla, puzzle, poc, pnoc or a file of weights."
  fi
  ;;
esac

run train_csrm.py --tag "$TAG_CSRM" --domain_train "$DOMAIN_TRAIN" --restore "$PRIOR" \
  $RUN_FLAGS $BACKBONE $IMAGE_FLAGS $CSRM_FLAGS
run inference.py --tag "$TAG_CSRM" --domain "$DOMAIN_TRAIN" --pseudos_from "$PSEUDOS_FROM" --threshold "$THRESHOLD" \
  --crf_t "$CRF_T" $RUN_FLAGS $VIEW_FLAGS
score csrm_cam "$DOMAIN_EVAL" "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/cams" --mode cams
score pseudo "$DOMAIN_EVAL" "$PSEUDOS"
report

printf '\nPseudo masks: %s\n' "$PSEUDOS"
next_stage 3-sam-refinement.sh

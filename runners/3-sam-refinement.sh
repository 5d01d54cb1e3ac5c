#!/usr/bin/env bash
# Stage 3: pseudo masks refined with mask proposals.
#   SAM_CHECKPOINT=weights/sam_vit_h_4b8939.pth ./runners/3-sam-refinement.sh      Segment Anything
#   ./runners/3-sam-refinement.sh                                                  weight-free image regions
source "$(dirname "${BASH_SOURCE[0]}")/config/env.sh"
source runners/config/dataset.sh

SAM=()
if [[ "$PROPOSALS" == sam ]]; then SAM=(--checkpoint "$SAM_CHECKPOINT" --model_type "$SAM_TYPE"); fi
run refine_sam.py --tag "$TAG_CSRM" --domain "$DOMAIN_TRAIN" --pseudo_dir "$PSEUDOS" --device "$DEVICE" \
  --num_workers "$WORKERS" --proposals "$PROPOSALS" --mode "$MERGE_MODE" ${SAM[@]+"${SAM[@]}"} $REFINE_FLAGS
score refined "$DOMAIN_EVAL" "$REFINED"
report

printf '\nRefined pseudo masks: %s\nNext: ./runners/4-segmentation.sh\n' "$REFINED"

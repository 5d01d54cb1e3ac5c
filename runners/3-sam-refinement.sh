#!/usr/bin/env bash
# Stage 3: pseudo masks refined with mask proposals.
#   SAM_CHECKPOINT=weights/sam_vit_h_4b8939.pth ./runners/3-sam-refinement.sh      Segment Anything
#   PROPOSALS=sam2 SAM_CHECKPOINT=facebook/sam2.1-hiera-large ./runners/3-sam-refinement.sh      Segment Anything 2 (or 3)
#   ./runners/3-sam-refinement.sh                                                  weight-free image regions
here=$(dirname "${BASH_SOURCE[0]}"); [[ -f $here/config/env.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/runners  # sbatch runs a copy
[[ -f $here/config/env.sh ]] || { echo "$here/config/env.sh: no such file. Start from the repository's root." >&2; exit 2; }
source "$here/config/env.sh"
stage 3 "pseudo masks refined"

refine "$TAG_REFINED" "$PSEUDOS"
score refined "$DOMAIN_EVAL" "$REFINED"
report

printf '\nRefined pseudo masks: %s\n' "$REFINED"
next_stage 4-segmentation.sh

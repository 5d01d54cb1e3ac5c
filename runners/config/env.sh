# Where and how the stages run. Every variable can be set in the environment: DEVICE=cpu ./runners/1-csrm.sh
# Sourced by the runners; works under bash and under sbatch (submit from the repository's root).

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"

: "${DATASET:=voc12}"       # voc12, coco14, folder, shapes or deepglobe: picks a block in dataset.sh
: "${DEVICE:=auto}"         # auto, cpu, cuda or cuda:N
if [[ "$DEVICE" == cpu ]] || ! command -v nvidia-smi >/dev/null; then : "${PRESET:=small}"; fi
: "${PRESET:=standard}"     # of DATASET=folder: small (two CPU cores) or standard (a GPU)
: "${GPUS:=1}"              # of this machine; above 1, training and prediction are shared by as many processes
: "${WORKERS:=$(nproc 2>/dev/null || sysctl -n hw.ncpu)}"  # loader and helper processes: one per core (Linux, macOS)
: "${SEED:=0}"
: "${PRIOR:=vanilla}"       # CAM prior that CSRM starts from: vanilla, puzzle, poc or pnoc, or a file of weights

if [[ "$SEED" == 0 ]]; then : "${NAME:=$DATASET}"; else : "${NAME:=$DATASET-seed$SEED}"; fi
TAG_VANILLA=$NAME-prior  # poc and pnoc need a vanilla classifier, and find the one of the same experiment
case "$PRIOR" in puzzle | poc | pnoc) NAME=$NAME-$PRIOR ;; esac
TAG_PRIOR=$NAME-prior TAG_CSRM=$NAME-csrm TAG_SEG=$NAME-deeplab  # checkpoints and predictions are called after these

PYTHON=python3
if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi

# run SCRIPT FLAGS...: show the command, then run it on the dataset; on several GPUs if the script can. The report lists
# it with its time and exit code.
run() {
  local launcher=("$PYTHON")
  case "$GPUS $1" in
  "1 "*) ;;
  *" train_"*.py | *" inference.py") launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS") ;;
  esac
  local command=("${launcher[@]}" "$@" --dataset "$DATASET" --data_dir "$DATA_DIR")
  printf '\n$'; printf ' %q' "${command[@]}"; printf '\n'
  local start began=$SECONDS code=0
  start=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  "${command[@]}" || code=$?
  mkdir -p "$REPORT"
  { printf '%s\t%d\t%d\t' "$start" $((SECONDS - began)) "$code"; printf '%q ' "${command[@]}"; echo; } >> "$REPORT/commands.tsv"
  return "$code"
}

# score STAGE DOMAIN FOLDER FLAGS...: evaluate the predictions in FOLDER; the report of the last stage collects the
# scores. Without a DOMAIN there is no ground truth, and nothing to do.
score() {
  if [[ -n "$2" ]]; then
    run evaluate.py --domain "$2" --pred_dir "$3" --output "$REPORT/$1.json" --num_workers "$WORKERS" "${@:4}"
  fi
}

# refine TAG FOLDER: proposals of the training images, made once, and the masks in FOLDER merged with them.
refine() {
  local sam=()
  if [[ "$PROPOSALS" == sam* ]]; then sam=(--checkpoint "$SAM_CHECKPOINT" --model_type "$SAM_TYPE"); fi
  if [[ "$1" != "$TAG_CSRM" ]]; then
    sam+=(--proposals_dir "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/proposals-$PROPOSALS")
  fi
  run refine_sam.py --tag "$1" --domain "$DOMAIN_TRAIN" --pseudo_dir "$2" --device "$DEVICE" --num_workers "$WORKERS" \
    --proposals "$PROPOSALS" --mode "$MERGE_MODE" ${sam[@]+"${sam[@]}"} $REFINE_FLAGS
}

# report: the page, picture sheet and review queue of the stages so far.
report() {
  local stage tag scores=() tags=() columns=() review=()
  for stage in prior_cam csrm_cam pseudo refined relabelled_{2..9} segmentation_val{,_corrected}{,_round{2..9}}; do
    if [[ -f "$REPORT/$stage.json" ]]; then scores+=("$stage=$REPORT/$stage.json"); fi
  done
  for tag in "$TAG_PRIOR" "$TAG_CSRM" "$TAG_SEG"; do
    if [[ -d "experiments/logs/$tag" ]]; then tags+=("$tag"); fi
  done
  show() { if [[ -d "$2" ]]; then columns+=("$1=$2${3:-}"); fi; }
  show "CAM prior" "$PREDICTIONS/$TAG_PRIOR@$DOMAIN_TRAIN/cams" :0.3
  show "CSRM CAM" "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/cams" ":${THRESHOLD/auto/0.4}"
  show "Pseudo mask" "$PSEUDOS"
  show "Refined" "$REFINED"
  show "DeepLabV3+" "$PREDICTIONS/$TAG_SEG@$SHEET/masks"
  if [[ -d "$REFINED" ]]; then review=(--review Refined); elif [[ -d "$PSEUDOS" ]]; then review=(--review "Pseudo mask"); fi
  run report.py --domain "$SHEET" --output_dir "$REPORT" --num_workers "$WORKERS" --summary ${scores[@]+"${scores[@]}"} \
    --tags ${tags[@]+"${tags[@]}"} --columns ${columns[@]+"${columns[@]}"} ${review[@]+"${review[@]}"}
}

# Where and how the stages run. The variables of SETUP.md can be set in the environment: DEVICE=cpu ./runners/1-csrm.sh
# Sourced by the runners, and sources dataset.sh; works under bash, sbatch and srun (submit from the repository's root).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# refuse LINE: what is wrong with a variable or file, and the remedy.
refuse() { echo "$1" >&2; exit 2; }

if (($#)); then refuse "$1: the runners take variables, no flags (SETUP.md). Instead of --tag or --overwrite: export NAME=another"; fi

# check_count NAME: the variable counts something.
check_count() { if [[ ! "${!1}" =~ ^[1-9][0-9]*$ ]]; then refuse "$1=${!1}: must be a whole number from 1."; fi; }

: "${DATASET:=voc12}"       # voc12, coco14, folder, shapes or deepglobe: picks a block in dataset.sh
: "${DEVICE:=auto}"         # auto, cpu, cuda or cuda:N
if [[ "$DEVICE" == cpu ]] || ! command -v nvidia-smi >/dev/null; then : "${PRESET:=small}"; fi
: "${PRESET:=standard}"     # of DATASET=folder: small (two CPU cores) or standard (a GPU)
: "${GPUS:=1}"              # of a machine; above 1, all but stage 0 and the report is shared by as many processes
: "${NODES:=1}" "${NODE:=${SLURM_NODEID:-0}}"  # machines that run this runner together, and which of them this is
check_count GPUS; check_count NODES
if ((NODES > 1)); then
  : "${MASTER_ADDR:?set it to the host name of machine 0}" "${MASTER_PORT:=29400}"
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # with PyTorch's shared store, a machine that comes again is not told of it
else
  NODE=0
fi
: "${RESTARTS:=0}"          # how often processes start again, at the last checkpoint, after one of them has died
# Loader and helper processes: one per core (Linux, macOS), however many threads OpenMP may have, which nproc would count.
: "${WORKERS:=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || sysctl -n hw.ncpu)}"
: "${SEED:=0}"
RUN_FLAGS="--device $DEVICE --seed $SEED --num_workers $WORKERS"
: "${PRIOR:=vanilla}"       # CAM prior that CSRM starts from: vanilla, puzzle, poc or pnoc, or a file of weights

if [[ "$SEED" == 0 ]]; then : "${NAME:=$DATASET}"; else : "${NAME:=$DATASET-seed$SEED}"; fi
TAG_VANILLA=$NAME-prior  # poc and pnoc need a vanilla classifier, and find the one of the same experiment
case "$PRIOR" in puzzle | poc | pnoc) NAME=$NAME-$PRIOR ;; esac
TAG_PRIOR=$NAME-prior TAG_CSRM=$NAME-csrm TAG_SEG=$NAME-deeplab  # checkpoints and predictions are called after these

: "${PYTHON:=python3}"
if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi

# stage NUMBER TITLE: the heading of a runner. In the demo also how long the rest takes, by what is done already.
stage() {
  printf '\n== Stage %s of 4: %s ==\n' "$1" "$2"
  if [[ -n "${DONE_BEFORE[$1]:-}" && -f "$REPORT/commands.tsv" ]]; then
    awk -F '\t' -v done="${DONE_BEFORE[$1]}" '/datasets.verify/ { spent = 0 } { spent += $2 }
      END { printf "%d %% done; about %.0f min to go\n", done, spent * (100 / done - 1) / 60 }' "$REPORT/commands.tsv"
  fi
}

# next_stage RUNNER: the line that names it. It can be pasted, also where DATASET and DATA_DIR are not exported.
next_stage() {
  printf 'Next: DATASET=%q DATA_DIR=%q ./runners/%s   # with the other variables that you have set\n' "$DATASET" "$DATA_DIR" "$1"
}

RUNS=0

# run SCRIPT FLAGS...: show the command, then run it on the dataset; by several processes and machines if the script
# can, else on machine 0. The report lists it with its time and exit code.
run() {
  local launcher=("$PYTHON")
  RUNS=$((RUNS + 1))
  case "$1" in
  train_*.py | inference.py | refine_sam.py | evaluate.py)
    if ((NODES * GPUS > 1)); then
      launcher+=(-m torch.distributed.run --nproc_per_node "$GPUS" --max_restarts "$RESTARTS")
    fi
    if ((NODES > 1)); then  # a meeting point for each command: the one before may not be gone yet
      launcher+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_id "$NAME-$RUNS" --rdzv_endpoint
        "$MASTER_ADDR:$((MASTER_PORT + RUNS))" --rdzv_conf "is_host=$((NODE == 0)),read_timeout=600")
    elif ((GPUS > 1)); then
      launcher+=(--standalone)
    fi
    ;;
  *) if ((NODE > 0)); then return; fi ;;
  esac
  local command=("${launcher[@]}" "$@" --dataset "$DATASET" --data_dir "$DATA_DIR")
  printf '\n$'; printf ' %q' "${command[@]}"; printf '\n'
  local start began=$SECONDS code=0
  start=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  "${command[@]}" || code=$?
  if ((NODE == 0)); then
    mkdir -p "$REPORT"
    { printf '%s\t%d\t%d\t' "$start" $((SECONDS - began)) "$code"; printf '%q ' "${command[@]}"; echo; } >> "$REPORT/commands.tsv"
  fi
  if ((code == 2)) && [[ " $* " == *" --tag "* ]]; then
    printf 'In a runner --tag comes from NAME, other flags from other variables (SETUP.md). To pass --overwrite, add it to the command above and run that.\n' >&2
  fi
  if ((code == 2)) && [[ "$1" == evaluate.py ]]; then
    printf 'To go on without scores, where masks are missing: export DOMAIN_EVAL= DOMAIN_SCORE=\n' >&2
  fi
  if ((code && NODES > 1)); then
    printf '%s: exit code %d on machine %d of %d. To continue, start the runner again on all of them.\n' \
      "$1" "$code" "$NODE" "$NODES" >&2
  fi
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
  if [[ "$PROPOSALS" == sam* ]]; then sam=(${SAM_CHECKPOINT:+--checkpoint "$SAM_CHECKPOINT"} --model_type "$SAM_TYPE"); fi
  if [[ "$1" != "$TAG_CSRM" ]]; then
    sam+=(--proposals_dir "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/proposals-$PROPOSALS")
  fi
  run refine_sam.py --tag "$1" --domain "$DOMAIN_TRAIN" --pseudo_dir "$2" --device "$DEVICE" --num_workers "$WORKERS" \
    --proposals "$PROPOSALS" --mode "$MERGE_MODE" ${sam[@]+"${sam[@]}"} $REFINE_FLAGS
}

# report: the page, picture sheet and review queue of the stages so far.
report() {
  local file tag scores=() tags=() columns=() review=() prior=prior_cam
  # A prior of the same NAME, trained before, is not the one that CSRM has started from.
  if [[ -f "$PRIOR" && ! "$PRIOR" -ef "experiments/models/$TAG_PRIOR.pth" ]]; then prior=""; fi
  for file in "$REPORT"/{$prior,csrm_cam,pseudo,refined,relabelled_{1..8},segmentation_val{,_corrected{,-*}}}.json; do
    if [[ -f "$file" ]]; then scores+=("$(basename "$file" .json)=$file"); fi
  done
  for tag in ${prior:+"$TAG_PRIOR"} "$TAG_CSRM" "$TAG_SEG"; do
    if [[ -d "experiments/logs/$tag" ]]; then tags+=("$tag"); fi
  done
  show() { if [[ -d "$2" ]]; then columns+=("$1=$2${3:-}"); fi; }
  # The last of them are the ones that the final model learns.
  show_masks() { show "$@"; if [[ -d "$2" ]]; then review=(--review "$1"); fi; }
  show "CAM prior" "${prior:+$PREDICTIONS/$TAG_PRIOR@$DOMAIN_TRAIN/cams}" :0.3
  show "CSRM CAM" "$PREDICTIONS/$TAG_CSRM@$DOMAIN_TRAIN/cams" ":${THRESHOLD/auto/0.4}"
  show_masks "Pseudo mask" "$PSEUDOS"
  show_masks "Refined" "$REFINED"
  show_masks "Learnt" "$LEARNT"
  show_masks "Relabelled" "$RELABELLED"
  show "DeepLabV3+" "$PREDICTIONS/$TAG_SEG@$SHEET/masks"
  run report.py --domain "$SHEET" --output_dir "$REPORT" --num_workers "$WORKERS" --summary ${scores[@]+"${scores[@]}"} \
    --tags ${tags[@]+"${tags[@]}"} --columns ${columns[@]+"${columns[@]}"} ${review[@]+"${review[@]}"}
}

source runners/config/dataset.sh

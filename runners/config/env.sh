# Where and how the stages run. Every variable can be set in the environment: DEVICE=cpu ./runners/1-csrm.sh
# Sourced by the runners; works under bash and under sbatch (submit from the repository's root).

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"

: "${DATASET:=voc12}"       # voc12, coco14, folder, shapes or deepglobe: picks a block in dataset.sh
: "${DEVICE:=auto}"         # auto, cpu, cuda or cuda:N
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

# run SCRIPT FLAGS...: show the command, then run it on the dataset; on several GPUs if the script can.
run() {
  local launcher=("$PYTHON")
  case "$GPUS $1" in
  "1 "*) ;;
  *" train_"*.py | *" inference.py") launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS") ;;
  esac
  local command=("${launcher[@]}" "$@" --dataset "$DATASET" --data_dir "$DATA_DIR")
  printf '\n$'; printf ' %q' "${command[@]}"; printf '\n'
  "${command[@]}"
}

# score STAGE DOMAIN FOLDER FLAGS...: evaluate the predictions in FOLDER; the report of the last stage collects the
# scores. Without a DOMAIN there is no ground truth, and nothing to do.
score() {
  if [[ -n "$2" ]]; then
    run evaluate.py --domain "$2" --pred_dir "$3" --output "$REPORT/$1.json" --num_workers "$WORKERS" "${@:4}"
  fi
}

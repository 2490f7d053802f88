#!/usr/bin/env bash
#SBATCH --job-name=pretrain_retro --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Pretrain a decoder that reads neighbors, on the documents of a retrieval database. The recipe is in
# examples/configs/retro_843m.yaml; docs/retro.md explains it.
#
#   bash examples/pretrain_retro.sh [OPTIONS]     or     sbatch examples/pretrain_retro.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train": --model.retro.num_neighbors 0 trains the decoder alone on the same
# samples, --checkpoint.load CHECKPOINT --model.retro.gate null fits one that was trained without neighbors. From the
# environment:
#   PROJECT_DIR       directory of the database, from examples/build_retro_db.sh
#   OUTPUT_DIR        default: runs/retro_843m
#   NNODES            default: 1
#   GPUS_PER_NODE     default: 8
#   MAX_RESTARTS      default: 0; see docs/recovery.md
#   DRY_RUN=1         print the resolved configuration and end
#   SCALE=tiny        the same in miniature on two CPU processes, database included
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python retro

NODES="${NNODES:-${SLURM_NNODES:-1}}" PROCESSES="${GPUS_PER_NODE:-8}"
RECIPE=(--config "$ROOT/examples/configs/retro_843m.yaml")
if [[ "${SCALE:-}" == tiny ]]; then
    NODES=1 PROCESSES=2
    PROJECT_DIR="${PROJECT_DIR:-runs/retro_db_tiny}"
    [[ "${DRY_RUN:-0}" == 1 ]] || SCALE=tiny PROJECT_DIR="$PROJECT_DIR" bash "$HERE/build_retro_db.sh"
    RECIPE+=(--config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --model.retro.num_neighbors 2
        --model.retro.layers "[1]" --data.tokens_per_row 513 --training.generative_rows 4)
else
    required PROJECT_DIR "the directory of the database (examples/build_retro_db.sh)"
fi
stand_in_documents "$PROJECT_DIR"
run_training "$NODES" "$PROCESSES" "${RECIPE[@]}" --data.retro_project "$PROJECT_DIR" \
    --output_dir "${OUTPUT_DIR:-runs/retro_843m${SCALE:+_$SCALE}}" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=pretrain_model --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Pretrain Retro with the options of Megatron-LM's script of this name, which become those of "megatron-grit train".
#
#   bash tools/retro/examples/pretrain_model.sh --retro-project-dir DIR --retro-add-retriever --num-layers 24 \
#       --hidden-size 1024 --num-attention-heads 16 --seq-length 4096 --global-batch-size 256 --train-samples 25000000 \
#       --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-samples 16667 --bf16 --save runs/retro
#
# Without --retro-add-retriever the decoder is trained alone on the same samples. --load GPT --finetune fits a decoder
# that was trained without neighbors (add --model.retro.gate null for one that begins with its loss); without --finetune
# a run resumes from --save. What is not given has Megatron-LM's default. An option that nothing trained depends on is
# named and passed over; any other that is not known ends the script with a line that says what to write. Options with a
# dot, such as --model.retro.layers, are those of "megatron-grit train".
#
# From the environment: NNODES, GPUS_PER_NODE, MAX_RESTARTS, DRY_RUN=1 and SCALE=tiny, as for
# examples/pretrain_retro.sh; SCALE=tiny needs no options, and takes those that are given.
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/examples"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python retro

NODES="${NNODES:-${SLURM_NNODES:-1}}" PROCESSES="${GPUS_PER_NODE:-8}" RECIPE=()
if is_tiny; then
    NODES=1 PROCESSES=2 PROJECT_DIR="${PROJECT_DIR:-runs/retro_db_tiny}"
    set -- --retro-project-dir "$PROJECT_DIR" --retro-add-retriever --num-layers 2 --hidden-size 64 \
        --num-attention-heads 4 --seq-length 512 --global-batch-size 4 --train-iters 4 --lr 1e-3 \
        --model.retro.layers "[1]" --parallel.device cpu --save runs/pretrain_model_tiny "$@"
fi
# One argument a line: none of them holds a line break.
OPTIONS="$("$PYTHON" - "$@" <<'EOT'
import sys
from megatron_grit.config.database.megatron_training import training_options
from megatron_grit.errors import ConfigError
try:
    options, passed = training_options(sys.argv[1:])
except ConfigError as error:
    sys.exit(f"pretrain_model.sh: error: {error}")
if passed:
    print("== without meaning here:", *passed, file=sys.stderr)
print("\n".join(options))
EOT
)" || exit 2
DATABASE="" before=""
while IFS= read -r option; do
    [[ "$before" != --data.retro_project ]] || DATABASE="$option"
    RECIPE+=("$option") before="$option"
done <<<"$OPTIONS"
# One that an option names is somebody's own.
if is_tiny && [[ "${DRY_RUN:-0}" != 1 && "$DATABASE" == "$PROJECT_DIR" ]]; then
    PROJECT_DIR="$PROJECT_DIR" bash "$HERE/build_retro_db.sh"
fi
stand_in_documents "$DATABASE"
run_training "$NODES" "$PROCESSES" "${RECIPE[@]}"

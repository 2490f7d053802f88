#!/usr/bin/env bash
#SBATCH --job-name=sgpt_nli --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# SGPT on natural language inference (arXiv 2202.08904): GPT-J learns to embed sentences by its biases alone. The
# recipe is in examples/configs/sgpt_nli.yaml; docs/sgpt.md has the options of SGPT's own scripts.
#
#   bash examples/train_sgpt_nli.sh [OPTIONS]     or     sbatch examples/train_sgpt_nli.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --optimizer.lr 1e-4. From the environment:
#   MODEL             GPT-J, GPT-Neo or another model with biases: directory of its Hugging Face files
#   EMBEDDING_DATA    prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       python tools/preprocess/convert_allnli.py --input AllNLI.tsv.gz --output nli.jsonl
#                       python tools/preprocess/build_grit.py --input nli.jsonl --output-prefix nli \
#                           --tokenizer MODEL --query-max-len 75 --passage-max-len 75
#   EPOCHS            default: 1
#   OUTPUT_DIR        default: runs/sgpt_nli
#   GPUS_PER_NODE     default: 8
#   MAX_RESTARTS      default: 0; see docs/recovery.md
#   DRY_RUN=1         print the resolved configuration and end
#   SCALE=tiny        the same in miniature on two CPU processes, with text that every machine has
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python

tiny_sgpt() {
    tiny_texts nli "$1"
    "$PYTHON" "$ROOT/tools/preprocess/convert_allnli.py" --input "$1/AllNLI.tsv" --output "$1/nli.jsonl"
    tiny_records "$1" nli --query-max-len 75 --passage-max-len 75
}

train_sgpt sgpt_nli 1024 1 "$@"

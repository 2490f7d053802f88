#!/usr/bin/env bash
#SBATCH --job-name=sgpt_msmarco --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# SGPT on MS MARCO (arXiv 2202.08904): GPT-J learns to search by its biases alone, with brackets around queries and
# passages. The recipe is in examples/configs/sgpt_msmarco.yaml; docs/sgpt.md has the options of SGPT's own scripts.
#
#   bash examples/train_sgpt_msmarco.sh [OPTIONS]     or     sbatch examples/train_sgpt_msmarco.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --optimizer.lr 1e-4. From the environment:
#   MODEL             GPT-J, GPT-Neo or another model with biases: directory of its Hugging Face files
#   EMBEDDING_DATA    prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       python tools/preprocess/convert_msmarco.py --queries queries.train.tsv --corpus collection.tsv \
#                           --negatives msmarco-hard-negatives.jsonl.gz --scores scores.jsonl --output msmarco.jsonl
#                       python tools/preprocess/build_grit.py --input msmarco.jsonl --output-prefix msmarco \
#                           --tokenizer MODEL --query-max-len 298 --passage-max-len 298
#   EPOCHS            default: 10
#   OUTPUT_DIR        default: runs/sgpt_msmarco
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
    tiny_texts msmarco "$1"
    "$PYTHON" "$ROOT/tools/preprocess/convert_msmarco.py" --queries "$1/queries.tsv" --corpus "$1/corpus.tsv" \
        --negatives "$1/negatives.jsonl" --output "$1/msmarco.jsonl"
    tiny_records "$1" msmarco --query-max-len 298 --passage-max-len 298
}

TINY_ARGS=(--optimizer.warmup_steps 1)
train_sgpt sgpt_msmarco 256 10 "$@"

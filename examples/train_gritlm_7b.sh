#!/usr/bin/env bash
#SBATCH --job-name=gritlm_7b --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# GritLM-7B: Mistral-7B learns to embed and to generate at once, on one node of 8 GPUs. The recipe is in
# examples/configs/gritlm_7b.yaml.
#
#   bash examples/train_gritlm_7b.sh [OPTIONS]     or     sbatch examples/train_gritlm_7b.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --training.steps 100. From the environment:
#   EMBEDDING_DATA    prefixes of indexed files from tools/preprocess/build_grit.py, separated by spaces
#   GENERATIVE_DATA   likewise
#   TOKENIZER         file or directory of the tokenizer that the data was made with
#   CHECKPOINT        base weights: megatron-grit convert --from Mistral-7B-v0.1 --to CHECKPOINT
#   OUTPUT_DIR        default: runs/gritlm_7b
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

TINY_ARGS=(--model tiny_mistral)
train_gritlm gritlm_7b 1 "$@"

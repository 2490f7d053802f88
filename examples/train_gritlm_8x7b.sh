#!/usr/bin/env bash
#SBATCH --job-name=gritlm_8x7b --nodes=32 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# GritLM-8x7B: Mixtral-8x7B learns to embed and to generate at once, on 32 nodes of 8 GPUs. The recipe is in
# examples/configs/gritlm_8x7b.yaml.
#
#   sbatch examples/train_gritlm_8x7b.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --training.steps 100. From the environment:
#   EMBEDDING_DATA    prefixes of indexed files from tools/preprocess/build_grit.py, separated by spaces
#   GENERATIVE_DATA   likewise
#   TOKENIZER         file or directory of the tokenizer that the data was made with
#   CHECKPOINT        base weights: megatron-grit convert --from Mixtral-8x7B-v0.1 --to CHECKPOINT
#   OUTPUT_DIR        default: runs/gritlm_8x7b
#   GPUS_PER_NODE     default: 8
#   NNODES            default: the nodes of the SLURM job, else 32
#   RDZV_ENDPOINT     HOST:PORT of one node, to start without SLURM: run this script on every node
#   MAX_RESTARTS      default: 0; see docs/recovery.md
#   DRY_RUN=1         print the resolved configuration and end
#   SCALE=tiny        the same in miniature on two CPU processes, with text that every machine has
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python

# Tensor parallel size 4 does not fit into two processes; expert parallel size 2 stays.
TINY_ARGS=(--model tiny_mixtral --parallel.tensor 1 --parallel.sequence_parallel false)
train_gritlm gritlm_8x7b "${NNODES:-${SLURM_NNODES:-32}}" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=finetune_im --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Instruction Modelling (arXiv 2405.14394): a base model is tuned on conversations with the loss over instructions too,
# not over what the template puts around them. The recipe is in examples/configs/finetune_im.yaml; with --loss.labels it
# the same run is the paper's baseline, on answers alone.
#
#   bash examples/finetune_im.sh [OPTIONS]     or     sbatch examples/finetune_im.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --loss.role_weights.user 0.5. From the environment:
#   MODEL             base model: directory of its Hugging Face files
#   GENERATIVE_DATA   prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       python tools/preprocess/build_sft.py --input lima.jsonl --output-prefix lima \
#                           --tokenizer MODEL --template tulu --generative-max-len 2048
#   EPOCHS            default: 2
#   OUTPUT_DIR        default: runs/finetune_im
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

train_sft finetune_im 128 2 "$@"

#!/usr/bin/env bash
#SBATCH --job-name=finetune_tulu --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Supervised fine-tuning by Tulu 2's recipe (arXiv 2311.10702) for models of 7 and 13 billion parameters: answers are
# trained, each of their tokens alike. The recipe is in examples/configs/finetune_tulu.yaml.
#
#   bash examples/finetune_tulu.sh [OPTIONS]     or     sbatch examples/finetune_tulu.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --optimizer.lr 1e-5. From the environment:
#   MODEL             base model: directory of its Hugging Face files
#   GENERATIVE_DATA   prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       python tools/preprocess/build_sft.py --input tulu_v2.jsonl --output-prefix tulu_v2 \
#                           --tokenizer MODEL --template tulu --generative-max-len 8192
#   EPOCHS            default: 2
#   OUTPUT_DIR        default: runs/finetune_tulu
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

train_sft finetune_tulu 128 2 "$@"

#!/usr/bin/env bash
#SBATCH --job-name=train_reward --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# A reward model on pairs of answers (docs/rewards.md). The recipe is in examples/configs/train_reward.yaml.
#
#   bash examples/train_reward.sh [OPTIONS]     or     sbatch examples/train_reward.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --reward.margin 0.5 or --adapter.kind lora. From the environment:
#   MODEL             model that follows instructions: directory of its Hugging Face files
#   PREFERENCE_DATA   prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       python tools/preprocess/build_preference.py --input pairs.jsonl --output-prefix pairs \
#                           --tokenizer MODEL --template tulu
#   EPOCHS            default: 1
#   OUTPUT_DIR        default: runs/train_reward
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

PREFERENCE_KIND=reward
train_preferences train_reward 128 1 pairs "$@"

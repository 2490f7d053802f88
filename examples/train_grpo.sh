#!/usr/bin/env bash
#SBATCH --job-name=train_grpo --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Policy gradients (GRPO) on one round of completions that were sampled and rewarded; docs/rl.md has the other parts of a
# round. The recipe is in examples/configs/train_grpo.yaml.
#
#   bash examples/train_grpo.sh [OPTIONS]     or     sbatch examples/train_grpo.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit train", such as --rollout.kl_weight 0.04. From the environment:
#   MODEL             the model that sampled: directory of its Hugging Face files
#   ROLLOUTS          prefixes of indexed files, separated by spaces, made with MODEL's tokenizer:
#                       megatron-grit rollouts --prompts gsm8k.jsonl --endpoint http://127.0.0.1:8000/v1 --n 8 \
#                           --reward math-verify --output round1.jsonl
#                       megatron-grit build-rollouts --input round1.jsonl --output-prefix round1 --tokenizer MODEL
#   EPOCHS            how often each completion is used; default: 1
#   OUTPUT_DIR        default: runs/train_grpo
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

# tiny_rollouts DIRECTORY: answers of conversations, right ones and those to other questions, rewarded by --reward exact; a
# tokenizer, and the indexed file. Sets ROLLOUTS and TOKENIZER.
tiny_rollouts() {
    ROLLOUTS="$1/rollouts" TOKENIZER="$1/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    tiny_texts grit "$1"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$1/tokenizer" \
        --input "$1/generative.jsonl"
    "$PYTHON" - "$1" <<'END'
import json, sys
folder = sys.argv[1]
asked = []
for line in open(f"{folder}/generative.jsonl", encoding="utf-8"):
    text = json.loads(line).get("text")
    if isinstance(text, list) and len(text) == 2:
        asked.append([part[:200] for part in text])
with open(f"{folder}/answered.jsonl", "w", encoding="utf-8") as file:
    for place, (question, right) in enumerate(asked):
        others = [asked[(place + step) % len(asked)][1] for step in (0, 3, 7, 11)]
        line = {"messages": [{"role": "user", "content": question}], "answer": right, "completions": others}
        file.write(json.dumps(line) + "\n")
END
    "$PYTHON" -m megatron_grit.cli.main rollouts --completions "$1/answered.jsonl" --reward exact --output "$1/rewarded.jsonl"
    "$PYTHON" -m megatron_grit.cli.main build-rollouts --overwrite --input "$1/rewarded.jsonl" --output-prefix "$ROLLOUTS" \
        --tokenizer "$TOKENIZER" --template tulu --max-length 512
}

name=train_grpo processes="${GPUS_PER_NODE:-8}"
recipe=(--config "$ROOT/examples/configs/$name.yaml")
if is_tiny; then
    name="${name}_tiny" processes=2
    recipe+=(--config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --checkpoint.resume false)
    recipe+=(--rollout.batch_size 16 --parallel.tensor 1 --parallel.sequence_parallel false)
    tiny_rollouts "${OUTPUT_DIR:=runs/$name}/data"
    recipe+=(--data.tokenizer "$TOKENIZER")
else
    required MODEL "the directory of the Hugging Face files of the model that sampled"
    required ROLLOUTS "the prefixes of the data (see the top of this file)"
    tune_model ROLLOUTS "megatron-grit build-rollouts" 512 "${EPOCHS:-1}" --model mistral_7b
fi
# Prefixes are words: shellcheck disable=SC2086
run_training 1 "$processes" "${recipe[@]}" --rollout.data "$(yaml_list $ROLLOUTS)" --output_dir "${OUTPUT_DIR:=runs/$name}" "$@"

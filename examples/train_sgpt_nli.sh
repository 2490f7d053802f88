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

# tiny_nli DIRECTORY: a table of AllNLI's form from Python's help texts, its tokenizer and its indexed file.
tiny_nli() {
    local directory="$1"
    EMBEDDING_DATA="$directory/nli" TOKENIZER="$directory/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    mkdir -p "$directory"
    "$PYTHON" - "$directory/AllNLI.tsv" <<'EOF'
import re, sys
from pydoc_data.topics import topics
texts = {name: re.split(r"(?<=[.:])\s+", " ".join(text.split()))[1:4] for name, text in sorted(topics.items())}
groups = [group for group in texts.values() if len(group) == 3 and all(20 < len(text) < 300 for text in group)][:40]
with open(sys.argv[1], "w") as table:
    print("split", "dataset", "filename", "sentence1", "sentence2", "label", sep="\t", file=table)
    for group, other in zip(groups, groups[1:] + groups[:1]):
        for text, label in ((group[1], "entailment"), (group[2], "entailment"), (other[0], "contradiction")):
            print("train", "help", "topics", group[0], text, label, sep="\t", file=table)
EOF
    "$PYTHON" "$ROOT/tools/preprocess/convert_allnli.py" --input "$directory/AllNLI.tsv" --output "$directory/nli.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$directory/tokenizer" \
        --input "$directory/nli.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/build_grit.py" --overwrite --tokenizer "$TOKENIZER" \
        --query-max-len 75 --passage-max-len 75 --input "$directory/nli.jsonl" --output-prefix "$EMBEDDING_DATA"
}

RECIPE_ARGS=(--config "$ROOT/examples/configs/sgpt_nli.yaml")
if [[ "${SCALE:-}" == tiny ]]; then
    OUTPUT_DIR="${OUTPUT_DIR:-runs/sgpt_nli_tiny}"
    PROCESSES=2
    RECIPE_ARGS+=(--config "$ROOT/examples/configs/sgpt_tiny.yaml" --config "$ROOT/examples/configs/tiny.yaml")
    tiny_nli "$OUTPUT_DIR/data"
    MODEL_ARGS=(--data.tokenizer "$TOKENIZER" --checkpoint.resume false)
else
    required MODEL "the directory of GPT-J's Hugging Face files"
    required EMBEDDING_DATA "the prefixes of the data (see the top of this file)"
    OUTPUT_DIR="${OUTPUT_DIR:-runs/sgpt_nli}"
    PROCESSES="${GPUS_PER_NODE:-8}"
    MODEL_ARGS=(--model.pretrained "$MODEL")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        # Its shape is in its files, which need not be there.
        [[ -f "$MODEL/config.json" ]] || MODEL_ARGS=(--config "$ROOT/examples/configs/gptj_6b.yaml" --data.tokenizer "$MODEL")
    else
        # Prefixes are words: shellcheck disable=SC2086
        STEPS="$(epochs_to_steps 1024 "${EPOCHS:-1}" $EMBEDDING_DATA)" || exit $?
        RECIPE_ARGS+=(--training.steps "$STEPS")
    fi
fi

# shellcheck disable=SC2086
run_training 1 "$PROCESSES" "${RECIPE_ARGS[@]}" "${MODEL_ARGS[@]}" \
    --data.embedding "$(yaml_list $EMBEDDING_DATA)" --output_dir "$OUTPUT_DIR" "$@"

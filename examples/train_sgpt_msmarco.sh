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

# tiny_msmarco DIRECTORY: queries, passages and scored negatives from Python's help texts, a tokenizer and indexed file.
tiny_msmarco() {
    local directory="$1"
    EMBEDDING_DATA="$directory/msmarco" TOKENIZER="$directory/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    mkdir -p "$directory"
    "$PYTHON" - "$directory" <<'EOF'
import json, pathlib, sys
from pydoc_data.topics import topics
folder = pathlib.Path(sys.argv[1])
texts = [(name, " ".join(text.split())[:600]) for name, text in sorted(topics.items())][:48]
with open(folder / "queries.tsv", "w") as queries, open(folder / "corpus.tsv", "w") as corpus, open(
    folder / "negatives.jsonl", "w"
) as negatives:
    for number, (name, text) in enumerate(texts):
        print(number, f"what is {name}", sep="\t", file=queries)
        print(number, text, sep="\t", file=corpus)
        mined = [{"pid": (number + step) % len(texts), "ce-score": 8.0 - 2 * step} for step in range(1, 7)]
        print(json.dumps({"qid": number, "pos": [{"pid": number, "ce-score": 8.0}], "neg": {"bm25": mined}}), file=negatives)
EOF
    "$PYTHON" "$ROOT/tools/preprocess/convert_msmarco.py" --queries "$directory/queries.tsv" \
        --corpus "$directory/corpus.tsv" --negatives "$directory/negatives.jsonl" --output "$directory/msmarco.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$directory/tokenizer" \
        --input "$directory/msmarco.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/build_grit.py" --overwrite --tokenizer "$TOKENIZER" \
        --query-max-len 298 --passage-max-len 298 --input "$directory/msmarco.jsonl" --output-prefix "$EMBEDDING_DATA"
}

RECIPE_ARGS=(--config "$ROOT/examples/configs/sgpt_msmarco.yaml")
if [[ "${SCALE:-}" == tiny ]]; then
    OUTPUT_DIR="${OUTPUT_DIR:-runs/sgpt_msmarco_tiny}"
    PROCESSES=2
    RECIPE_ARGS+=(--config "$ROOT/examples/configs/sgpt_tiny.yaml" --config "$ROOT/examples/configs/tiny.yaml"
        --optimizer.warmup_steps 1)
    tiny_msmarco "$OUTPUT_DIR/data"
    MODEL_ARGS=(--data.tokenizer "$TOKENIZER" --checkpoint.resume false)
else
    required MODEL "the directory of GPT-J's Hugging Face files"
    required EMBEDDING_DATA "the prefixes of the data (see the top of this file)"
    OUTPUT_DIR="${OUTPUT_DIR:-runs/sgpt_msmarco}"
    PROCESSES="${GPUS_PER_NODE:-8}"
    MODEL_ARGS=(--model.pretrained "$MODEL")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        # Its shape is in its files, which need not be there.
        [[ -f "$MODEL/config.json" ]] || MODEL_ARGS=(--config "$ROOT/examples/configs/gptj_6b.yaml" --data.tokenizer "$MODEL")
    else
        # Prefixes are words: shellcheck disable=SC2086
        STEPS="$(epochs_to_steps 256 "${EPOCHS:-10}" $EMBEDDING_DATA)" || exit $?
        RECIPE_ARGS+=(--training.steps "$STEPS")
    fi
fi

# shellcheck disable=SC2086
run_training 1 "$PROCESSES" "${RECIPE_ARGS[@]}" "${MODEL_ARGS[@]}" \
    --data.embedding "$(yaml_list $EMBEDDING_DATA)" --output_dir "$OUTPUT_DIR" "$@"

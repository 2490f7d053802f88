#!/usr/bin/env bash
# Retro's whole path in a few minutes on two CPU cores: text in, a database that the model itself embeds, a decoder that
# reads it beside one that does not, tuning on questions, answers, and a report.
#
#   bash examples/quickstart_retro.sh [OUT_DIR]      OUT_DIR is runs/quickstart_retro where it is not given
#
# The same command resumes a stopped run. docs/retro.md explains it.
#
#   QUICKSTART_DATA=DIR  folder with xquad_en_part1.json and wikitext2_valid.txt; none: Python's own documentation is
#                        the text. Default: ../shared/data beside this checkout where it has them, else none
#   QUICKSTART_STEPS=N   training steps of each decoder, instead of those of configs/quickstart_retro.yaml
#   SCALE=tiny           four steps of each training on a part of the text, to see it run
#   DRY_RUN=1            resolve and print the configuration of the decoder that reads, and end
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CONFIG="$ROOT/examples/configs/quickstart_retro.yaml"
PREPROCESS="$ROOT/tools/preprocess"
# Near copies stay in the database, so that the report can tell what they are worth.
DATABASE=(--chunk_length 32 --min_chunk_tokens 16 --duplicates keep --max_overlap null --num_neighbors_query 50
    --num_neighbors_save 4 --query_instruction "Find the passage")

[[ $# -le 1 && "${1:-}" != -* ]] || die "usage: bash examples/quickstart_retro.sh [OUT_DIR]"
SCALE="${SCALE:-full}"
STEPS="${QUICKSTART_STEPS:-$(sed -n 's/^  steps: //p' "$CONFIG")}"
case "$SCALE" in
    full) GRIT_STEPS=60 PAIRS=32 SFT_STEPS=120 TEXTS=() ;;
    tiny) STEPS="${QUICKSTART_STEPS:-4}" GRIT_STEPS=4 PAIRS=8 SFT_STEPS=4 TEXTS=(--num-passages 24) ;;
    *) die "SCALE is full or tiny, not '$SCALE'" ;;
esac
[[ "$STEPS" =~ ^[1-9][0-9]*$ ]] || die "QUICKSTART_STEPS is a number of steps from 1 on, not '$STEPS'"
DATA="${QUICKSTART_DATA:-$ROOT/../shared/data}"
for name in xquad_en_part1.json wikitext2_valid.txt; do
    [[ -f "$DATA/$name" ]] && continue
    [[ -z "${QUICKSTART_DATA:-}" || "$DATA" == none ]] || die "QUICKSTART_DATA $DATA has no $name"
    DATA=none
done
OUT="${1:-runs/quickstart_retro}"

# The engine says at every start that it does without its CUDA extensions.
export PYTHONWARNINGS="ignore:Transformer Engine and Apex are not installed${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

# In a shell of its own: it sets the threads of a process.
train() { (run_training 1 2 --config "$CONFIG" "$@"); }

corpus() {
    if [[ "$DATA" != none ]]; then
        TEXTS+=(--data "$DATA")
    else
        "$PYTHON" "$ROOT/examples/pydoc_corpus.py" --output-dir "$OUT/pydoc" || return
        TEXTS+=(--pydoc "$OUT/pydoc")
    fi
    "$PYTHON" "$ROOT/examples/retro_texts.py" "${TEXTS[@]}" --output-dir "$OUT/corpus"
}

tokenizer() {
    "$PYTHON" "$PREPROCESS/train_tokenizer.py" --vocab-size 2048 --output-prefix "$OUT/tokenizer" \
        --input "$OUT/corpus/documents.jsonl"
}

indexed_files() {
    local name
    for name in documents heldout; do
        "$PYTHON" "$PREPROCESS/preprocess_data.py" --workers 1 --overwrite --append-eod \
            --tokenizer-model "$OUT/tokenizer.model" --input "$OUT/corpus/$name.jsonl" \
            --output-prefix "$OUT/data/$name" || return
    done
    "$PYTHON" "$PREPROCESS/build_grit.py" --workers 1 --overwrite --tokenizer "$OUT/tokenizer.model" \
        --query-max-len 48 --passage-max-len 256 --input "$OUT/corpus/pairs.jsonl" --output-prefix "$OUT/data/pairs"
}

# A model that embeds and generates. It embeds the database, and each of the decoders begins with its weights.
grit() {
    train --data.tokenizer "$OUT/tokenizer.model" --data.embedding "$(yaml_list "$OUT/data/pairs")" \
        --data.generative "$(yaml_list "$OUT/data/documents_text_document")" --data.tokens_per_row 4096 \
        --training.objective unified --training.embedding_batch_size "$PAIRS" --training.generative_batch_size 16 \
        --training.steps "$GRIT_STEPS" --output_dir "$OUT/grit"
}

database() {
    (run_job 1 2 "$ROOT/tools/retro/build_db.py" --project-dir "$OUT/db" --tasks build "${DATABASE[@]}" \
        --data_paths "$(yaml_list "$OUT/data/documents_text_document")" \
        --query_paths "$(yaml_list "$OUT/data/documents_text_document" "$OUT/data/heldout_text_document")" \
        --tokenizer "$OUT/tokenizer.model" --embedder "$OUT/grit") || return
    "$PYTHON" "$ROOT/tools/retro/inspect_db.py" --project-dir "$OUT/db" | tee "$OUT/database.txt"
}

# decoder NAME OPTION...: all of them see the same samples in the same order.
decoder() {
    local name="$1"
    shift
    train --data.retro_project "$OUT/db" --data.valid "$(yaml_list "$OUT/data/heldout_text_document")" \
        --checkpoint.load "$OUT/grit" --training.steps "$STEPS" --output_dir "$OUT/$name" "$@"
}

READS=(--model.retro.num_neighbors 1)

# Behind a gate that is closed at the start the decoder alone is measured beside the neighbors, by overlap with them.
gpt_by_overlap() {
    decoder gpt_by_overlap "${READS[@]}" --model.retro.gate null --checkpoint.load "$OUT/gpt" --training.skip_train true
}

sft() {
    echo 'DATA_BLEND="1.0 squad"' >"$OUT/blend.sh"
    DATA_ROOT="$OUT/corpus" OUTPUT_DIR="$OUT/sft" ENCODER=trained K=1 REUSE_TOP=1 MAX_LEN=1024 GPUS_PER_NODE=2 SCALE="" \
        bash "$ROOT/tools/retro/sft/sft_retro_lm.sh" "$OUT/blend.sh" tiny 16 1e-3 "$OUT/retro" --parallel.device cpu \
        --training.precision fp32 --training.steps "$SFT_STEPS" --checkpoint.keep 1
}

answers() {
    DATA_ROOT="$OUT/corpus" OUTPUT="$OUT/answers.txt" bash "$ROOT/tools/retro/text_generation/retro_generate.sh" \
        squad tiny greedy dev 0 0 0 1 - "$OUT/sft" 1 1 --reuse-top --batch-size 16 --max-new-tokens 24 --device cpu
}

scores() {
    "$PYTHON" "$ROOT/tools/retro/text_generation/evaluate.py" "$OUT/answers.txt" "$OUT/corpus/squad/squad_QA_dev.json" \
        --output "$OUT/scores.json"
}

report() {
    "$PYTHON" - "$OUT/corpus/squad/squad_QA_dev.json" "$OUT/answers.txt" >"$OUT/samples.txt" <<'EOT'
import json, sys
with open(sys.argv[1], encoding="utf-8") as questions, open(sys.argv[2], encoding="utf-8") as answers:
    for record, answer in list(zip(json.load(questions), answers, strict=True))[:8]:
        print(record["question"], f"  right: {record['answers'][0]}", f"  model: {answer.strip()}", sep="\n")
EOT
    "$PYTHON" -m megatron_grit.cli.main report-retro --gpt "$OUT/gpt" --gpt-by-overlap "$OUT/gpt_by_overlap" \
        --retro "$OUT/retro" --retro-shuffled "$OUT/retro_shuffled" --scores "$OUT/scores.json" \
        --timings "$OUT/timings.tsv" --samples "$OUT/samples.txt" --output-dir "$OUT"
}

started="$(now)"
setup_python eval
setup_python retro
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    # The database's config.json would name texts and tokenizer.
    decoder retro "${READS[@]}" --data.generative "[documents]" --data.tokenizer tokenizer
    exit
fi
# Another recipe, other text or another Python makes another corpus and model.
texts="$([[ "$DATA" == none ]] || cat "$DATA/xquad_en_part1.json" "$DATA/wikitext2_valid.txt" | cksum)"
recipe="$(cat "$0" "$CONFIG" "$ROOT/examples/retro_texts.py" <("$PYTHON" -VV) <(echo "$STEPS $SCALE $texts") | cksum)"
start_stages "$recipe" corpus data grit db gpt gpt_by_overlap retro retro_shuffled sft
mkdir -p "$OUT/data"
record setup "$started"

stage corpus corpus
stage tokenizer tokenizer
stage indexed-files indexed_files
stage grit grit
stage database database
stage gpt decoder gpt
stage gpt-by-overlap gpt_by_overlap
stage retro decoder retro "${READS[@]}"
stage retro-shuffled decoder retro_shuffled "${READS[@]}" --data.retro_shuffle true
stage sft sft
stage generate answers
stage evaluate scores
say "report"
report
say "report.md, report.json, loss.png and overlap.png are in $OUT"

#!/usr/bin/env bash
# The main job in a few minutes on two CPU cores: text in, a model out that embeds and generates, and its report.
#
#   bash examples/quickstart.sh [OUT_DIR]      OUT_DIR is runs/quickstart where it is not given
#
# Python's own documentation is the text; modules that training does not see are measured before and after. The
# same command resumes a stopped run.
#
#   QUICKSTART_STEPS=N   training steps, instead of those of configs/quickstart.yaml
#   SCALE=tiny           four steps, to see it run
#   DRY_RUN=1            resolve and print the training configuration, and end
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CONFIG="$ROOT/examples/configs/quickstart.yaml"
INSTRUCTION="Find the documentation"
PROMPT="What does json.dumps(obj) do?"

[[ $# -le 1 && "${1:-}" != -* ]] || die "usage: bash examples/quickstart.sh [OUT_DIR]"
case "${SCALE:-full}" in
    full) STEPS="${QUICKSTART_STEPS:-$(sed -n 's/^  steps: //p' "$CONFIG")}" ;;
    tiny) STEPS="${QUICKSTART_STEPS:-4}" ;;
    *) die "SCALE is full or tiny, not '$SCALE'" ;;
esac
[[ "$STEPS" =~ ^[1-9][0-9]*$ ]] || die "QUICKSTART_STEPS is a number of steps from 1 on, not '$STEPS'"
OUT="${1:-runs/quickstart}"

# The engine says at every start that it does without its CUDA extensions.
export PYTHONWARNINGS="ignore:Transformer Engine and Apex are not installed${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

train() {
    local options=(
        --config "$CONFIG"
        --data.tokenizer "$OUT/tokenizer.model"
        --data.embedding "$(yaml_list "$OUT/data/train_embedding")"
        --data.generative "$(yaml_list "$OUT/data/train_generative")"
    )
    (run_training 1 2 "${options[@]}" "$@") # in a shell of its own: it sets the threads of a process
}

corpus() { "$PYTHON" "$ROOT/examples/pydoc_corpus.py" --output-dir "$OUT/corpus"; }

tokenizer() {
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 2048 --output-prefix "$OUT/tokenizer" \
        --input "$OUT/corpus/train_embedding.jsonl" "$OUT/corpus/train_generative.jsonl"
}

indexed_files() {
    local name
    for name in train_embedding train_generative heldout_generative; do
        "$PYTHON" "$ROOT/tools/preprocess/build_grit.py" --overwrite --tokenizer "$OUT/tokenizer.model" \
            --query-max-len 64 --passage-max-len 96 --generative-max-len 128 \
            --input "$OUT/corpus/$name.jsonl" --output-prefix "$OUT/data/$name" || return
    done
}

# The untrained model is a checkpoint like any other, and the very one that training starts from.
initialize() { train --output_dir "$OUT/untrained" --training.steps 0; }

from_untrained() { train --output_dir "$OUT" --checkpoint.load "$OUT/untrained" --training.steps "$STEPS"; }

evaluate() {
    "$PYTHON" -m megatron_grit.cli.evaluation.evaluate --device cpu --max-length 96 --checkpoint "$1" --output "$2" \
        --retrieval "$OUT/corpus/heldout_embedding.jsonl" --generative "$OUT/data/heldout_generative"
}

encode() {
    printf '%s\n' "json.dumps(obj)" "os.path.join(a, *p)" >"$OUT/queries.txt"
    "$PYTHON" -m megatron_grit.cli.encode --device cpu --checkpoint "$OUT" --instruction "$INSTRUCTION" \
        --input "$OUT/queries.txt" --output "$OUT/queries.npy" | tee "$OUT/encoded.txt"
}

generate() {
    {
        echo "> $PROMPT"
        "$PYTHON" -m megatron_grit.cli.generate --device cpu --checkpoint "$OUT" --prompt "$PROMPT" --max-new-tokens 24
    } | tee "$OUT/generated.txt"
}

report() {
    cat "$OUT/encoded.txt" "$OUT/generated.txt" >"$OUT/samples.txt"
    "$PYTHON" "$ROOT/tools/report.py" --output-dir "$OUT" --metrics "$OUT/metrics.jsonl" --timings "$OUT/timings.tsv" \
        --before "$OUT/before.json" --after "$OUT/after.json" --samples "$OUT/samples.txt"
}

started="$(now)"
setup_python eval
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    from_untrained
    exit
fi
# Another recipe or another Python makes another corpus and model.
start_stages "$(cat "$0" "$CONFIG" <("$PYTHON" -VV) <(echo "$STEPS") | cksum)" checkpoints metrics.jsonl untrained
mkdir -p "$OUT/data"
record setup "$started"

stage corpus corpus
stage tokenizer tokenizer
stage indexed-files indexed_files
stage initialize initialize
stage evaluate-untrained evaluate "$OUT/untrained" "$OUT/before.json"
stage train from_untrained
stage evaluate-trained evaluate "$OUT" "$OUT/after.json"
stage encode encode
stage generate generate
say "report"
report
say "report.md, report.json, metrics.jsonl and loss.png are in $OUT"

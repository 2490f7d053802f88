#!/usr/bin/env bash
# The main job in a few minutes on two CPU cores: text in, a model out that embeds and generates, and its report.
#
#   bash examples/quickstart.sh [OUT_DIR]         (default: runs/quickstart)
#
# Python's own documentation is the text. Held-out modules are measured before and after training. Started again, it
# goes on where it stopped. QUICKSTART_STEPS sets the number of training steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# -le 1 && "${1:-}" != -* ]] || die "usage: bash examples/quickstart.sh [OUT_DIR]"

OUT="${1:-runs/quickstart}"
mkdir -p "$OUT" || die "cannot make $OUT"
OUT="$(cd "$OUT" && pwd)"
PROCESSES=2
CONFIG="$ROOT/examples/configs/quickstart.yaml"
STEPS="${QUICKSTART_STEPS:-$(sed -n 's/^  steps: //p' "$CONFIG")}"
[[ "$STEPS" =~ ^[1-9][0-9]*$ ]] || die "QUICKSTART_STEPS must be a number of steps from 1 on, not '$STEPS'"
INSTRUCTION="Find the documentation"
PROMPT="What does json.dumps(obj) do?"

# The engine says at every start that it does without its CUDA extensions.
export PYTHONWARNINGS="ignore:Transformer Engine and Apex are not installed${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

now() { date +%s.%N; }
seconds_since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }

began="$(now)"
setup_python
setup_seconds="$(seconds_since "$began")"

# Another recipe or another Python makes another corpus and model: then what an earlier run left is not gone on with.
RECIPE="$(cat "$0" "$CONFIG" <("$PYTHON" -VV) <(echo "$STEPS") | cksum)"
if [[ "$(cat "$OUT/.recipe" 2>/dev/null)" != "$RECIPE" ]]; then
    rm -rf "$OUT/.done" "$OUT/timings.tsv" "$OUT/checkpoints" "$OUT/metrics.jsonl" "$OUT/untrained"
    printf '%s\n' "$RECIPE" >"$OUT/.recipe"
fi
mkdir -p "$OUT/.done"
printf 'setup\t%s\n' "$setup_seconds" >>"$OUT/timings.tsv"

# stage NAME COMMAND...: run once; the seconds of a stage that was stopped count as well.
stage() {
    local name="$1" started
    shift
    if [[ -e "$OUT/.done/$name" ]]; then
        say "$name: done before"
        return
    fi
    say "$name ..."
    started="$(now)"
    trap 'printf "%s\t%s\n" "$name" "$(seconds_since "$started")" >>"$OUT/timings.tsv"' EXIT
    "$@" || die "the stage '$name' failed; its message is above"
    trap - EXIT
    printf '%s\t%s\n' "$name" "$(seconds_since "$started")" >>"$OUT/timings.tsv"
    say "$name: $(seconds_since "$started") s"
    touch "$OUT/.done/$name"
}

corpus() { "$PYTHON" "$ROOT/tools/preprocess/build_pydoc.py" --output-dir "$OUT/corpus"; }

tokenizer() {
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 2048 --output-prefix "$OUT/tokenizer" \
        --input "$OUT/corpus/train_embedding.jsonl" "$OUT/corpus/train_generative.jsonl"
}

indexed_files() {
    local name
    mkdir -p "$OUT/data"
    for name in train_embedding train_generative heldout_generative; do
        "$PYTHON" "$ROOT/tools/preprocess/build_grit.py" --overwrite --tokenizer "$OUT/tokenizer.model" \
            --query-max-len 64 --passage-max-len 96 --generative-max-len 128 \
            --input "$OUT/corpus/$name.jsonl" --output-prefix "$OUT/data/$name"
    done
}

train() {
    local options=(
        --config "$CONFIG"
        --data.tokenizer "$OUT/tokenizer.model"
        --data.embedding "[$OUT/data/train_embedding]"
        --data.generative "[$OUT/data/train_generative]"
        "$@"
    )
    # Checked here first: of a wrong configuration each process would tell, and torchrun at length.
    WORLD_SIZE="$PROCESSES" "$PYTHON" -m megatron_grit.cli.train --dry-run "${options[@]}" >/dev/null || return
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
        -m megatron_grit.cli.train "${options[@]}"
}

evaluate() {
    "$PYTHON" -m megatron_grit.cli.evaluate --device cpu --max-length 96 --checkpoint "$1" --output "$2" \
        --retrieval "$OUT/corpus/heldout_embedding.jsonl" --generative "$OUT/data/heldout_generative"
}

encode() {
    printf '%s\n' "json.dumps(obj)" "os.path.join(a, *p)" >"$OUT/queries.txt"
    "$PYTHON" -m megatron_grit.cli.encode --device cpu --checkpoint "$OUT" --instruction "$INSTRUCTION" \
        --input "$OUT/queries.txt" --output "$OUT/queries.npy" | tee "$OUT/encoded.txt"
}

generate() {
    { echo "> $PROMPT"; "$PYTHON" -m megatron_grit.cli.generate --device cpu --checkpoint "$OUT" --prompt "$PROMPT" \
        --max-new-tokens 48; } | tee "$OUT/generated.txt"
}

report() {
    cat "$OUT/encoded.txt" "$OUT/generated.txt" >"$OUT/samples.txt"
    "$PYTHON" "$ROOT/tools/report.py" --output-dir "$OUT" --metrics "$OUT/metrics.jsonl" --timings "$OUT/timings.tsv" \
        --before "$OUT/before.json" --after "$OUT/after.json" --samples "$OUT/samples.txt"
}

stage corpus corpus
stage tokenizer tokenizer
stage indexed-files indexed_files
# The untrained model is a checkpoint like any other, and the very one that training starts from.
stage initialize train --output_dir "$OUT/untrained" --training.steps 0
stage evaluate-untrained evaluate "$OUT/untrained" "$OUT/before.json"
stage train train --output_dir "$OUT" --checkpoint.load "$OUT/untrained" --training.steps "$STEPS"
stage evaluate-trained evaluate "$OUT" "$OUT/after.json"
stage encode encode
stage generate generate
report
say "report: $OUT/report.md, report.json, loss.png; set-up took $setup_seconds s"

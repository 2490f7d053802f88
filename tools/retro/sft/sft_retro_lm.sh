#!/usr/bin/env bash
#SBATCH --job-name=sft_retro_lm --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# Tune a model on a blend of questions and conversations: InstructRetro's instruction tuning (docs/tuning.md).
#
#   bash tools/retro/sft/sft_retro_lm.sh BLEND SIZE BATCH LR CHECKPOINT [OPTIONS]
#
# BLEND: a shell file with DATA_BLEND="0.7 NAME 0.3 OTHER", or the name of one beside this script. It is read, not run.
# SIZE names the run; the shape is the checkpoint's. For one of Megatron-LM it is examples/configs/retro_SIZE.yaml, such
# as 843m, and TOKENIZER has to be set. CHECKPOINT: directory of a checkpoint, or a run's output directory. OPTIONS are
# those of "megatron-grit train". The run resumes from OUTPUT_DIR. From the environment:
#   DATA_ROOT       folder of the data sets, NAME/NAME_QA_train.json and NAME_QA_dev.json; default: data
#   OUTPUT_DIR      default: runs/retro-BLEND_pp1_same_format_ctxN_SIZE_BATCH_LR
#   FT_NEIGHBOURS   contexts in the prompt; default: 1
#   ENCODER         off: neighbors are not read, what reads them stays as it is (default, as published). trained, frozen:
#                   the next K contexts are read, and the encoder is trained or stays as it is
#   K               contexts that the encoder reads; default: 2
#   REUSE_TOP=1     the encoder reads the best contexts, those in the prompt too
#   MAX_LEN         longest record in tokens; default: 4096, or the model's positions where they are fewer
#   GPUS_PER_NODE   default: 8
#   MAX_RESTARTS    default: 0; see docs/recovery.md
#   DRY_RUN=1       print the resolved configuration and end
#   SCALE=tiny      the same in miniature on two CPU processes. Without arguments, with questions from Python's help
#                   texts and an untrained model
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/examples"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python

if is_tiny && (($# == 0)); then
    tiny_questions "${OUTPUT_DIR:=runs/sft_retro_lm_tiny}/tiny"
    set -- "$OUTPUT_DIR/tiny/blend.sh" tiny 4 1e-3 "$OUTPUT_DIR/tiny/model"
fi
(($# >= 5)) || die "give BLEND SIZE BATCH LR CHECKPOINT (the top of this file explains them)"
BLEND="$1" SIZE="$2" BATCH="$3" LR="$4" CHECKPOINT="$5" PROCESSES="${GPUS_PER_NODE:-8}"
shift 5
[[ -f "$BLEND" || "$BLEND" == */* ]] || BLEND="$ROOT/tools/retro/sft/$BLEND.sh"
NAME="$(basename "$BLEND" .sh)" FT_NEIGHBOURS="${FT_NEIGHBOURS:-1}" ENCODER="${ENCODER:-off}" K="${K:-2}"
OUTPUT_DIR="${OUTPUT_DIR:-runs/retro-${NAME}_pp1_same_format_ctx${FT_NEIGHBOURS}_${SIZE}_${BATCH}_${LR}}"
[[ "$ENCODER" =~ ^(off|frozen|trained)$ ]] || die "ENCODER is off, frozen or trained, not $ENCODER"
[[ "$ENCODER" != off ]] || K=0


PRESET="$ROOT/examples/configs/retro_$SIZE.yaml" RECIPE=()
# Tokenizer, positions, whether it reads neighbors, and options: one a line, none of which holds a line break.
SHAPE="$("$PYTHON" - "$CHECKPOINT" "$PRESET" "${TOKENIZER:-}" "${DRY_RUN:-0}" <<'EOT'
import sys
from pathlib import Path
from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.config.parse import load_config, model_options
from megatron_grit.errors import GritError
checkpoint, preset, tokenizer, dry_run = sys.argv[1:]
try:
    if holds_checkpoint(checkpoint):
        folder = resolve_checkpoint(checkpoint)
        config = load_config(folder / "config.yaml")
        found = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
        tokenizer = tokenizer or str(found[0])
    else:
        if not Path(preset).is_file():
            sys.exit(f"sft_retro_lm.sh: error: {checkpoint} is no checkpoint of megatron-grit; for one of Megatron-LM "
                     f"give a SIZE whose shape is in {preset}")
        config = load_config(preset)
        if not tokenizer and dry_run != "1":
            sys.exit(f"sft_retro_lm.sh: error: {checkpoint} holds no tokenizer; set TOKENIZER to the checkpoint's")
    positions = config.model.max_position_embeddings
    lines = [tokenizer or "TOKENIZER", positions, config.model.retro.num_neighbors, *model_options(config)]
    print(*lines, sep="\n")
except GritError as error:
    sys.exit(f"sft_retro_lm.sh: error: {error}")
EOT
)" || exit 2
while IFS= read -r option; do RECIPE+=("$option"); done <<<"$SHAPE"
TOKENIZER="${RECIPE[0]}" POSITIONS="${RECIPE[1]}" READS="${RECIPE[2]}"
MAX_LEN="${MAX_LEN:-$((POSITIONS < 4096 ? POSITIONS : 4096))}"
RECIPE=(--config "$ROOT/examples/configs/retro_sft.yaml" "${RECIPE[@]:3}")
if ((READS == 0)) && [[ "$ENCODER" != off ]]; then
    die "ENCODER=$ENCODER, but $CHECKPOINT reads no neighbors; leave ENCODER out"
fi
((K <= READS || READS == 0)) || die "K=$K, but $CHECKPOINT reads $READS neighbors at most; lower K"
if ((READS > 0)); then
    case "$ENCODER" in
        off) RECIPE+=(--training.frozen "$(yaml_list "*.cross_attention.*" "*.pre_cross_attn_layernorm.*" "*.encoder.*")") ;;
        frozen) RECIPE+=(--training.frozen "$(yaml_list "*.encoder.*")") ;;
    esac
fi
if is_tiny; then
    RECIPE+=(--config "$ROOT/examples/configs/tiny.yaml")
    PROCESSES=2
fi

DATA="$OUTPUT_DIR/data" SOURCES="$OUTPUT_DIR/data/train.yaml"
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    SOURCES="BLEND"  # which is built of the data sets
else
    "$PYTHON" -m megatron_grit.cli.main build-blend "$BLEND" --data "${DATA_ROOT:-data}" --output "$DATA" \
        --tokenizer "$TOKENIZER" --max-len "$MAX_LEN" --ft-neighbours "$FT_NEIGHBOURS" --encoder-neighbours "$K" \
        ${REUSE_TOP:+--reuse-top} || exit $?
    if [[ -f "$DATA/valid.yaml" ]]; then
        RECIPE+=(--data.valid "$(yaml_list "$DATA/valid.yaml")" --training.valid_interval 200)
    fi
fi
run_training 1 "$PROCESSES" "${RECIPE[@]}" --data.tokenizer "$TOKENIZER" --data.tokens_per_row "$MAX_LEN" \
    --data.generative "$(yaml_list "$SOURCES")" --training.generative_batch_size "$BATCH" --optimizer.lr "$LR" \
    --checkpoint.load "$CHECKPOINT" --output_dir "$OUTPUT_DIR" "$@"

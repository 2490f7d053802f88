#!/usr/bin/env bash
# Answer the questions of a data set with a tuned model, by the positional arguments of InstructRetro's script of this
# name:
#
#   bash tools/retro/text_generation/retro_generate.sh TASK SIZE SAMPLING SPLIT START NUM STEP FT_NEIGHBOURS CARD CHECKPOINT K \
#       [RETRIEVE] [OPTIONS]
#
#   TASK           data set: the questions are in DATA_ROOT/TASK/SPLIT.json (else TASK_QA_SPLIT.json, or .jsonl)
#   SIZE SAMPLING  names that the output's name holds; a model knows its shape, and options say how is sampled
#   START NUM      first question, from 0, and how many; 0 or less: all
#   STEP           of the checkpoint; 0: the newest
#   FT_NEIGHBOURS  contexts in the prompt
#   CARD           has no meaning here
#   CHECKPOINT     output directory of a run, or a checkpoint
#   K              contexts that the neighbor encoder reads: the next ones; 0: it reads none
#   RETRIEVE       1 (default): ctxs, the retrieved contexts, where questions have them; 0: the questions' own
#
# OPTIONS are those of "megatron-grit generate-qa", such as --temperature 0.7 --top-k 40, --reuse-top, --batch-size 16, or
# --retro-project DIR for neighbors that are retrieved. The answers are a line each, in order, in
# CHECKPOINT/retro-generate-TASK_FT_NEIGHBOURS_K_SIZE_SPLIT_SAMPLING_START_NUM_STEP.txt, retro-generate-short-... with
# --short-format, for evaluate.py beside this script. From the environment:
#   DATA_ROOT      default: data
#   OUTPUT         another file for the answers
#   DRY_RUN=1      print the command and end
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/examples"
source "$HERE/common.sh"
setup_python

(($# >= 11)) || die "give TASK SIZE SAMPLING SPLIT START NUM STEP FT_NEIGHBOURS CARD CHECKPOINT K [RETRIEVE] (the top of this file explains them)"
TASK="$1" SIZE="$2" SAMPLING="$3" SPLIT="$4" START="$5" NUM="$6" STEP="$7" FT_NEIGHBOURS="$8" CHECKPOINT="${10}" K="${11}"
shift 11
RETRIEVE=1
if (($#)) && [[ "$1" != -* ]]; then
    RETRIEVE="$1"
    shift
fi
[[ "$RETRIEVE" =~ ^[01]$ ]] || die "RETRIEVE is 0 or 1, not $RETRIEVE"
for number in "$START" "$FT_NEIGHBOURS" "$K" "$STEP"; do
    [[ "$number" =~ ^(0|[1-9][0-9]*)$ ]] || die "START, STEP, FT_NEIGHBOURS and K are whole numbers from 0 on, without zeros in front, not $number"
done
[[ "$NUM" =~ ^(0|-?[1-9][0-9]*)$ ]] || die "NUM is a whole number, not $NUM"

DATA_ROOT="${DATA_ROOT:-data}" INPUT="" SHORT="" OPTIONS=()
for file in "$SPLIT.json" "$SPLIT.jsonl" "${TASK}_QA_$SPLIT.json" "${TASK}_QA_$SPLIT.jsonl"; do
    if [[ -f "$DATA_ROOT/$TASK/$file" ]]; then
        INPUT="$DATA_ROOT/$TASK/$file"
        break
    fi
done
[[ -n "$INPUT" || "${DRY_RUN:-0}" == 1 ]] || die "there is no $DATA_ROOT/$TASK/$SPLIT.json; set DATA_ROOT to the folder of the data sets"
for option in "$@"; do
    if [[ "$option" == --short-format || "$option" == --short_format ]]; then
        SHORT=short- OPTIONS+=(--prompt-template short)
    else
        OPTIONS+=("$option")
    fi
done
MODEL="$CHECKPOINT"
if ((STEP > 0)); then printf -v MODEL '%s/checkpoints/step_%08d' "$CHECKPOINT" "$STEP"; fi
if ((NUM > 0)); then OPTIONS=(--num "$NUM" ${OPTIONS[@]+"${OPTIONS[@]}"}); fi
((RETRIEVE)) || OPTIONS=(--no-retrieved ${OPTIONS[@]+"${OPTIONS[@]}"})
NAME="retro-generate-$SHORT${TASK}_${FT_NEIGHBOURS}_${K}_${SIZE}_${SPLIT}_${SAMPLING}_${START}_${NUM}_${STEP}.txt"
COMMAND=(
    "$PYTHON" -m megatron_grit.cli.main generate-qa --checkpoint "$MODEL" --input "${INPUT:-$DATA_ROOT/$TASK/$SPLIT.json}"
    --output "${OUTPUT:-$CHECKPOINT/$NAME}" --task "$TASK" --start "$START" --ft-neighbours "$FT_NEIGHBOURS"
    --encoder-neighbours "$K" ${OPTIONS[@]+"${OPTIONS[@]}"}
)
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
else
    "${COMMAND[@]}"
fi

#!/usr/bin/env bash
#SBATCH --job-name=eval_lm --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# A model on a suite of lm-eval's tasks, each GPU (or mesh of them, with OPTIONS such as --tensor 2) a share of the requests.
# A killed evaluation resumes when the same command is given again.
#
#   bash examples/eval_lm.sh [OPTIONS]     or     sbatch examples/eval_lm.sh [OPTIONS]
#
# OPTIONS are those of "megatron-grit evaluate lm", such as --limit 100 or --apply-chat-template. From the environment:
#   MODEL             checkpoint, run or Hugging Face folder
#   SUITE             open-instruct (default): MMLU with 0 and 5 examples, TruthfulQA, GSM8K and BBH with and without chain
#                       of thought, MATH, TyDiQA's gold passages, IFEval, HumanEval, MBPP
#                     instruction-modelling: the 18 tasks of arXiv 2405.14394 and the mean of their six groups
#                     gritlm: MMLU, GSM8K, BBH, TyDiQA, HumanEval
#                     or names of tasks, with commas between them
#                   HumanEval and MBPP run what the model writes: OPTIONS must have --confirm-run-unsafe-code. Data come
#                   from the caches of this machine, or with --allow-downloads from the hub.
#   OUTPUT_DIR        default: runs/eval_SUITE
#   GPUS_PER_NODE     default: 8
#   DRY_RUN=1         print the command and end
#   SCALE=tiny        an untrained model and a task of a few questions on two CPU processes
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python eval

# tiny_lm DIRECTORY: an untrained model, and tasks whose questions are titles of Python's help texts. Sets MODEL.
tiny_lm() {
    MODEL="$1/model"
    [[ "${DRY_RUN:-0}" == 1 || -f "$1/.done" ]] && return
    tiny_sft "$1"
    (run_training 1 2 --config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --training.steps 0 \
        --training.objective generative --data.tokenizer "$TOKENIZER" --data.generative "[$GENERATIVE_DATA]" \
        --output_dir "$MODEL")
    "$PYTHON" - "$1" <<'EOF'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1], "tasks").resolve()
folder.mkdir(exist_ok=True)
lines = pathlib.Path(sys.argv[1], "generative.jsonl").read_text(encoding="utf-8").splitlines()[:8]
texts = [" ".join(json.dumps(json.loads(line), ensure_ascii=False).split())[:200] for line in lines]
records = [{"text": text[:80], "choices": [text[80:110], texts[i - 1][80:110]], "label": 0} for i, text in enumerate(texts)]
folder.joinpath("tiny.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}}, "test_split": "test"}
choice = {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
          "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}]}
text = {"task": "tiny_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}]}
for each in (choice, text):
    folder.joinpath(each["task"] + ".yaml").write_text(json.dumps(task | each))
EOF
    touch "$1/.done"
}

SUITE="${SUITE:-open-instruct}" PROCESSES="${GPUS_PER_NODE:-8}" RECIPE=()
if is_tiny; then
    SUITE=tiny_choice,tiny_text PROCESSES=2
    tiny_lm "${OUTPUT_DIR:=runs/eval_tiny}/data"
    RECIPE+=(--include-path "$OUTPUT_DIR/data/tasks" --device cpu)
else
    required MODEL "a checkpoint, run or Hugging Face folder"
fi
run_job 1 "$PROCESSES" -m megatron_grit.cli.main evaluate lm --checkpoint "$MODEL" --tasks "$SUITE" \
    --output-dir "${OUTPUT_DIR:=runs/eval_$SUITE}" ${RECIPE[@]+"${RECIPE[@]}"} "$@"

#!/usr/bin/env bash
#SBATCH --job-name=retro_db --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#
# A retrieval database for Retro: chunks of 64 tokens, embeddings, an index with its recall, and the neighbors of every
# chunk. The same command resumes a stopped build. docs/retro.md explains it.
#
#   bash examples/build_retro_db.sh [OPTIONS]     or     sbatch examples/build_retro_db.sh [OPTIONS]
#
# OPTIONS are those of tools/retro/build_db.py, such as --index OPQ32_64,IVF65536_HNSW8,PQ32. From the environment:
#   DATA          prefixes of indexed files from tools/preprocess/preprocess_data.py, separated by spaces
#   TOKENIZER     file or directory of the tokenizer that the data was made with
#   EMBEDDER      directory of a Hugging Face encoder, or of a checkpoint or run of ours
#   PROJECT_DIR   default: runs/retro_db
#   TASKS         default: build
#   PROCESSES     of a node; default: 8, one for each GPU
#   NNODES        default: the nodes of the SLURM job, else 1; all of them see PROJECT_DIR
#   RDZV_ENDPOINT HOST:PORT of one node, to start several without SLURM: run this script on every node
#   DRY_RUN=1     print the command and end; the option --dry-run checks everything and says what would be done
#   SCALE=tiny    the same in miniature on two CPU processes: Python's help texts, and an untrained model
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; submit it from the root of the checkout.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$HERE/common.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-.}/examples"
source "$HERE/common.sh"
setup_python retro

# tiny_corpus DIRECTORY: Python's help texts, their tokenizer, and an untrained model of ours that embeds them.
tiny_corpus() {
    local directory="$1"
    DATA="$directory/corpus_text_document" TOKENIZER="$directory/tokenizer.model" EMBEDDER="$directory/model"
    [[ "${DRY_RUN:-0}" == 1 || -f "$directory/.done" ]] && return
    tiny_data "$directory"
    tiny_texts documents "$directory"
    "$PYTHON" "$ROOT/tools/preprocess/preprocess_data.py" --overwrite --append-eod --input "$directory/corpus.jsonl" \
        --output-prefix "$directory/corpus" --tokenizer-model "$TOKENIZER"
    (run_training 1 2 --config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --training.steps 0 \
        --data.tokenizer "$TOKENIZER" --data.embedding "$(yaml_list "$EMBEDDING_DATA")" \
        --data.generative "$(yaml_list "$GENERATIVE_DATA")" --output_dir "$EMBEDDER")
    touch "$directory/.done"
}

if [[ "${SCALE:-}" == tiny ]]; then
    PROJECT_DIR="${PROJECT_DIR:-runs/retro_db_tiny}"
    NODES=1 PROCESSES=2
    SIZE_ARGS=(--doc_block_size 16 --block_size 64 --num_neighbors_query 40 --num_neighbors_save 4)
    tiny_corpus "$PROJECT_DIR/data"
else
    required DATA "the prefixes of the indexed files (tools/preprocess/preprocess_data.py)"
    required TOKENIZER "the tokenizer of the data"
    required EMBEDDER "the directory of an encoder"
    PROJECT_DIR="${PROJECT_DIR:-runs/retro_db}"
    NODES="${NNODES:-${SLURM_NNODES:-1}}" PROCESSES="${PROCESSES:-8}"
    SIZE_ARGS=()
fi

# faiss uses all cores; the processes of a node share them.
CORES=$(($(nproc) / PROCESSES))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))}"
# Prefixes are words: shellcheck disable=SC2086
COMMAND=(
    "$ROOT/tools/retro/build_db.py" --project-dir "$PROJECT_DIR" --tasks "${TASKS:-build}"
    --data_paths "$(yaml_list $DATA)" --tokenizer "$TOKENIZER" --embedder "$EMBEDDER"
    ${SIZE_ARGS[@]+"${SIZE_ARGS[@]}"} "$@"
)
if [[ "${DRY_RUN:-0}" != 1 ]]; then
    # A mistake is one line here; from a job of many processes it would be a page.
    WORLD_SIZE=$((NODES * PROCESSES)) "$PYTHON" "${COMMAND[@]}" --dry-run || exit $?
    [[ " $* " != *" --dry-run "* ]] || exit 0
fi
run_job "$NODES" "$PROCESSES" "${COMMAND[@]}"
[[ "${DRY_RUN:-0}" == 1 ]] || "$PYTHON" "$ROOT/tools/retro/inspect_db.py" --project-dir "$PROJECT_DIR"

# Set-up shared by the launchers and tests/run.sh. Source it, then call setup_python.
#
#   PYTHON   interpreter to use. With torch and megatron-core in it, it is used as it is; else .venv is made from it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '== %s\n' "$*" >&2; }

die() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# setup_python [EXTRA]: set PYTHON to an interpreter that has what this package (and its extra, such as dev) needs.
setup_python() {
    local extra="${1:-}" candidate
    for candidate in "${PYTHON:-python3}" ${PYTHON:-python}; do
        if has_engine "$candidate"; then
            PYTHON="$(command -v "$candidate")"
            add_missing "$extra"
            export PYTHON
            return
        fi
    done
    local base
    base="$(find_python ${PYTHON:-3.11 3.12 3.13 3})" || exit $?
    make_environment "$ROOT/.venv" "$base" "$extra"
    PYTHON="$ROOT/.venv/bin/python"
    export PYTHON
}

# has_engine PYTHON: an environment that somebody made for this work. NGC's PyTorch images bring torch alone; they
# count, because their torch, TransformerEngine and apex belong together and a .venv would hide them.
has_engine() {
    "$1" - 2>/dev/null <<'EOF'
import importlib.util as util, os, sys
engine = util.find_spec("megatron") and util.find_spec("megatron.core")
sys.exit(not (sys.version_info >= (3, 11) and util.find_spec("torch") and (engine or "NVIDIA_PYTORCH_VERSION" in os.environ)))
EOF
}

# add_missing EXTRA: install what $PYTHON lacks, and hold every package that is there at its present version.
add_missing() {
    local missing held
    missing="$(requirements "$PYTHON" "$1" missing)" || die "cannot read the packages of $PYTHON"
    [[ -z "$missing" ]] && return
    say "adding to $PYTHON: ${missing//$'\n'/ }"
    held="$(mktemp)"
    "$PYTHON" - >"$held" <<'EOF'
import importlib.metadata as metadata
print("\n".join(sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions() if d.metadata["Name"]})))
EOF
    # No quotes around the list: one argument for each line. Requirements hold no spaces.
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install -q --constraint "$held" $missing ||
        die "could not add packages to $PYTHON; set PYTHON to another interpreter to get a .venv of its own"
    rm -f "$held"
}

# requirements PYTHON EXTRA [missing]: what pyproject.toml asks for, one a line; all, or what PYTHON lacks. torch, numpy
# and triton are the business of whoever made the environment.
requirements() {
    "$1" - "$ROOT/pyproject.toml" "$2" "${3:-all}" <<'EOF'
import importlib.metadata as metadata, re, sys, tomllib
path, extra, which = sys.argv[1:]
with open(path, "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"] + (project["optional-dependencies"][extra] if extra else []):
    requirement, _, marker = requirement.replace(" ", "").partition(";")
    name = re.match(r"[\w.-]+", requirement)[0]
    if which == "missing":
        try:
            if name in ("torch", "numpy", "triton") or metadata.distribution(name):
                continue
        except metadata.PackageNotFoundError:
            pass
    elif name == "triton" and (sys.version_info < (3, 12) or sys.platform != "linux"):
        continue
    print(requirement)
EOF
}

# find_python CANDIDATE...: print the first that runs and is new enough. A candidate is a path, or a version.
find_python() {
    local candidate version path seen=""
    for candidate in "$@"; do
        for path in "$candidate" "python$candidate" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$candidate"*/bin/python; do
            # Run it: a shim of pyenv exists on PATH for versions that are not active, and fails.
            version="$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
            if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && [[ "$candidate" != 3.* || "$version" == "$candidate" ]]; then
                command -v "$path"
                return
            fi
            seen="$seen $path is $version;"
        done
    done
    die "needs Python 3.11 or newer;${seen:- none was found;} install one, or set PYTHON to it"
}

# make_environment DIRECTORY BASE_PYTHON EXTRA: a virtual environment with the exact versions of constraints/. Does
# nothing where it is there already; two at once wait for each other.
make_environment() {
    local directory="$1" base="$2" extra="$3" ready
    ready="$directory/.ready-$(environment_key "$base" "$extra")"
    # What is there for the tests is there for all.
    [[ -f "$ready" || -f "$directory/.ready-$(environment_key "$base" dev)" ]] && return
    mkdir -p "$(dirname "$directory")"
    (
        if command -v flock >/dev/null; then flock 9; fi
        [[ -f "$ready" ]] && exit
        fill_environment "$directory" "$base" "$extra" "$(constraints_for "$base")"
        touch "$ready"
    ) 9>"$directory.lock" || exit $?
}

# newest_python: print the interpreter of an environment on Python 3.12, which gets the newest engine, with what tests need.
newest_python() {
    local base directory
    base="$(find_python 3.12)" || exit $?
    directory="${XDG_CACHE_HOME:-$HOME/.cache}/megatron_grit/env-$(environment_key "$base" dev)"
    make_environment "$directory" "$base" dev
    printf '%s\n' "$directory/bin/python"
}

fill_environment() {
    local directory="$1" base="$2" extra="$3" constraints="$4" python="$1/bin/python" started=$SECONDS
    say "installing packages in $directory (the first time takes minutes; setup.log there has the details)"
    if ! "$python" -c 'import pip' 2>/dev/null; then
        rm -rf "$directory"
        "$base" -m venv "$directory" || die "$base cannot make a virtual environment; install its venv module"
    fi
    local log="$directory/setup.log"
    {
        # torch first and by its exact version, so that whichever build of it pip is given stays. Compiling all modules
        # takes most of an installation; those that are used are compiled below, or when they are imported.
        "$python" -m pip install --no-compile "$(grep '^torch==' "$constraints")" "$(grep '^setuptools==' "$constraints")" &&
            requirements "$python" "$extra" >"$directory/requirements.txt" &&
            "$python" -m pip install --no-compile --constraint "$constraints" --requirement "$directory/requirements.txt" &&
            if [[ "$directory" == "$ROOT/.venv" ]]; then
                "$python" -m pip install --no-compile --no-deps --no-build-isolation --editable "$ROOT"
            fi &&
            env -u PYTHONDONTWRITEBYTECODE "$python" -c 'import megatron_grit.training.trainer'
    } >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        die "could not install the packages; the whole output is in $log"
    }
    say "packages installed in $((SECONDS - started)) s"
}

constraints_for() {
    if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        printf '%s\n' "$ROOT/constraints/py312.txt"
    else
        printf '%s\n' "$ROOT/constraints/py311.txt"
    fi
}

# environment_key PYTHON EXTRA: changes with what would be installed.
environment_key() { { requirements "$1" "$2" && cat "$(constraints_for "$1")"; } | cksum | cut -d ' ' -f 1; }

# --- Launching -------------------------------------------------------------------------------------------------------
#
#   DRY_RUN=1    print the resolved configuration and end; paths need not be set and need not exist
#   MAX_RESTARTS how often all processes are restarted from the newest checkpoint when one fails (docs/recovery.md);
#                default: 0
#   SCALE=tiny   the same recipe in miniature: two processes on the CPU, a few steps, text that this machine has

# required NAME MEANING: end, unless the environment variable is set.
required() {
    [[ -n "${!1:-}" ]] && return
    [[ "${DRY_RUN:-0}" == 1 ]] || die "set $1 to $2"
    printf -v "$1" '%s' "$1"  # stands for the path in what is printed
}

# yaml_list WORD...: one argument for an option that takes a list.
yaml_list() {
    local words
    words="$(printf '"%s", ' "$@")"
    printf '[%s]\n' "${words%, }"
}

# run_training NODES PROCESSES_PER_NODE OPTION...: check here, in one process, then start the job.
run_training() {
    local nodes="$1" processes="$2"
    shift 2
    local world=$((nodes * processes))
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        WORLD_SIZE="$world" "$PYTHON" -m megatron_grit.cli.train --print_config "$@"
        return
    fi
    # A mistake is one line here; from a job of many processes it would be a page from each.
    WORLD_SIZE="$world" LOCAL_WORLD_SIZE="$processes" "$PYTHON" -m megatron_grit.cli.train --dry-run "$@" >/dev/null || exit $?
    # The engine's sequence parallel overlap relies on the order of one connection to the GPU.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    run_job "$nodes" "$processes" -m megatron_grit.cli.train "$@"
}

# run_job NODES PROCESSES_PER_NODE PROGRAM OPTION...: start a program, a file or -m and a module, on all nodes.
run_job() {
    local nodes="$1" processes="$2" head
    shift 2
    local command=("$PYTHON" -m megatron_grit.parallel.torchrun --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}")
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if ((nodes == 1)); then
        command+=(--standalone)
    elif [[ -n "${SLURM_JOB_ID:-}" ]]; then
        if [[ -z "${RDZV_ENDPOINT:-}" ]]; then
            command -v scontrol >/dev/null || die "scontrol is not found, as in a container; set RDZV_ENDPOINT=HOST:PORT"
            head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
        fi
        # From SLURM 22.05 on srun does not take --cpus-per-task over from sbatch, and gives each task one core.
        if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
            export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
        fi
        command=(
            srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit 1 "${command[@]}"
            --nnodes "$nodes" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-${head:-}:29400}"
        )
    elif [[ -n "${RDZV_ENDPOINT:-}" || "${DRY_RUN:-0}" == 1 ]]; then
        command+=(--nnodes "$nodes" --rdzv-id "${RDZV_ID:-megatron_grit}" --rdzv-backend c10d)
        command+=(--rdzv-endpoint "${RDZV_ENDPOINT:-HOST:PORT}")
    else
        die "$nodes nodes: submit this script with sbatch, or run it on every node with RDZV_ENDPOINT=HOST:PORT"
    fi
    command+=("$@")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

# stand_in_documents PROJECT_DIR: a dry run does without a database; adds to the caller's RECIPE what its config.json names.
stand_in_documents() {
    [[ "${DRY_RUN:-0}" == 1 && ! -f "$1/config.json" ]] || return 0
    RECIPE+=(--data.generative "[documents]" --data.tokenizer tokenizer)
}

# epochs_to_steps VARIABLE TOOL BATCH EPOCHS PREFIX...: steps that see each record of the files EPOCHS times. VARIABLE
# names the files, and TOOL makes them.
epochs_to_steps() {
    "$PYTHON" - "${0##*/}" "$@" <<'EOF'
import json, sys
name, variable, tool, batch, epochs, *prefixes = sys.argv[1:]
try:
    records = sum(json.load(open(f"{prefix}.json"))["num_records"] for prefix in prefixes)
except (OSError, ValueError, KeyError) as error:
    print(f"{name}: error: {variable}: {error}; make it with {tool}", file=sys.stderr)
    sys.exit(2)
print(max(1, int(records * float(epochs)) // int(batch)))
EOF
}

# tiny_data DIRECTORY: a few dozen records of each kind from Python's help texts, a tokenizer, and the indexed files.
# Sets EMBEDDING_DATA, GENERATIVE_DATA and TOKENIZER.
tiny_data() {
    EMBEDDING_DATA="$1/embedding" GENERATIVE_DATA="$1/generative" TOKENIZER="$1/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    tiny_texts grit "$1"
    tiny_records "$1" "embedding generative" --query-max-len 64 --passage-max-len 256 --generative-max-len 256
}

# tiny_texts KIND DIRECTORY: the texts that the others here start from.
tiny_texts() {
    mkdir -p "$2"
    "$PYTHON" "$ROOT/examples/tiny_texts.py" "$1" "$2"
}

# tiny_records DIRECTORY "NAME..." LIMIT...: a tokenizer of all NAME.jsonl, and the indexed file of each.
tiny_records() {
    local directory="$1" names="$2" name
    shift 2
    # Names are words: shellcheck disable=SC2086
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$directory/tokenizer" \
        --input $(printf "$directory/%s.jsonl " $names)
    for name in $names; do
        "$PYTHON" "$ROOT/tools/preprocess/build_grit.py" --overwrite --tokenizer "$directory/tokenizer.model" "$@" \
            --input "$directory/$name.jsonl" --output-prefix "$directory/$name"
    done
}

# tiny_sft DIRECTORY: a few dozen conversations, a tokenizer, and the indexed file. Sets GENERATIVE_DATA and TOKENIZER.
tiny_sft() {
    GENERATIVE_DATA="$1/chats" TOKENIZER="$1/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    tiny_texts grit "$1"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$1/tokenizer" \
        --input "$1/generative.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/build_sft.py" --overwrite --tokenizer "$TOKENIZER" --generative-max-len 256 \
        --input "$1/generative.jsonl" --output-prefix "$GENERATIVE_DATA"
}

# --- Stages ----------------------------------------------------------------------------------------------------------
#
# A job of several commands in the folder OUT that can be stopped and started again: OUT/.done has what is done,
# OUT/timings.tsv the seconds of each stage.

now() { date +%s.%N; }
seconds_since() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.1f", to - from }'; }
record() { printf '%s\t%s\n' "$1" "$(seconds_since "$2")" >>"$OUT/timings.tsv"; }

# start_stages RECIPE NAME...: make OUT and set it to its whole path. Where the last run was of another RECIPE, what it left
# in OUT/NAME... is removed and not resumed.
start_stages() {
    local recipe="$1" name
    shift
    mkdir -p "$OUT" 2>/dev/null || die "cannot make the folder $OUT"
    OUT="$(cd "$OUT" && pwd)"
    if [[ "$(cat "$OUT/.recipe" 2>/dev/null)" != "$recipe" ]]; then
        for name in .done timings.tsv "$@"; do rm -rf "${OUT:?}/$name"; done
        printf '%s\n' "$recipe" >"$OUT/.recipe"
    fi
    mkdir -p "$OUT/.done"
}

# stage NAME COMMAND...: run it once. The seconds of a run that was stopped count as well.
stage() {
    local name="$1" started
    shift
    if [[ -e "$OUT/.done/$name" ]]; then
        say "$name: done before"
        return
    fi
    say "$name ..."
    started="$(now)"
    trap 'record "$name" "$started"' EXIT
    "$@" || die "the stage $name failed; its message is above"
    trap - EXIT
    record "$name" "$started"
    say "$name: $(tail -n 1 "$OUT/timings.tsv" | cut -f 2) s"
    touch "$OUT/.done/$name"
}

# tiny_preferences DIRECTORY: a few dozen pairs of answers, as many rated ones, a tokenizer, and the indexed files pairs and
# rated. Sets TOKENIZER.
tiny_preferences() {
    local name
    TOKENIZER="$1/tokenizer.model"
    [[ "${DRY_RUN:-0}" == 1 ]] && return
    tiny_texts preferences "$1"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$1/tokenizer" \
        --input "$1/texts.jsonl"
    for name in pairs rated; do
        "$PYTHON" "$ROOT/tools/preprocess/build_preference.py" --overwrite --tokenizer "$TOKENIZER" \
            --generative-max-len 128 --input "$1/$name.jsonl" --output-prefix "$1/$name"
    done
}

# tiny_questions DIRECTORY: a few dozen questions with contexts in two data sets, their blend, a tokenizer, and an untrained
# model that reads neighbors. Sets DATA_ROOT; DIRECTORY/blend.sh and DIRECTORY/model are the others.
tiny_questions() {
    DATA_ROOT="$1"
    [[ "${DRY_RUN:-0}" == 1 || -f "$1/.done" ]] && return
    tiny_texts questions "$1"
    "$PYTHON" "$ROOT/tools/preprocess/train_tokenizer.py" --vocab-size 512 --output-prefix "$1/tokenizer" \
        --input "$1/texts.jsonl"
    "$PYTHON" "$ROOT/tools/preprocess/build_sft.py" --overwrite --tokenizer "$1/tokenizer.model" --over-long split \
        --generative-max-len 256 --input "$1/texts.jsonl" --output-prefix "$1/texts"
    (run_training 1 2 --config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --training.steps 0 \
        --training.objective generative --data.tokenizer "$1/tokenizer.model" --data.neighbors contexts \
        --data.generative "[$1/texts]" --model.retro.num_neighbors 2 --model.retro.layers "[1]" --output_dir "$1/model")
    touch "$1/.done"
}

# --- Recipes ---------------------------------------------------------------------------------------------------------
#
# NAME is that of examples/configs/NAME.yaml; runs are in runs/NAME unless OUTPUT_DIR is set. From the launcher:
#   TINY_ARGS      options of SCALE=tiny

is_tiny() { [[ "${SCALE:-}" == tiny ]]; }

# train_gritlm NAME NODES OPTION...: with EMBEDDING_DATA, GENERATIVE_DATA, TOKENIZER and CHECKPOINT.
train_gritlm() {
    local name="$1" nodes="$2" processes="${GPUS_PER_NODE:-8}" recipe=(--config "$ROOT/examples/configs/$1.yaml")
    shift 2
    if is_tiny; then
        name="${name}_tiny" nodes=1 processes=2
        recipe+=(--config "$ROOT/examples/configs/tiny.yaml" "${TINY_ARGS[@]}" --checkpoint.resume false)
        tiny_data "${OUTPUT_DIR:=runs/$name}/data"
    else
        required EMBEDDING_DATA "the prefixes of the embedding data (tools/preprocess/build_grit.py)"
        required GENERATIVE_DATA "the prefixes of the generative data (tools/preprocess/build_grit.py)"
        required TOKENIZER "the tokenizer of the data"
        required CHECKPOINT "the base weights (megatron-grit convert)"
        recipe+=(--checkpoint.load "$CHECKPOINT")
    fi
    # Prefixes are words: shellcheck disable=SC2086
    run_training "$nodes" "$processes" "${recipe[@]}" --data.tokenizer "$TOKENIZER" \
        --data.embedding "$(yaml_list $EMBEDDING_DATA)" --data.generative "$(yaml_list $GENERATIVE_DATA)" \
        --output_dir "${OUTPUT_DIR:=runs/$name}" "$@"
}

# tune_model VARIABLE TOOL BATCH EPOCHS SHAPE...: adds to the caller's recipe the weights of MODEL and the steps that see the
# files of VARIABLE, made with TOOL, EPOCHS times. SHAPE: options that stand for MODEL in a dry run without its files.
tune_model() {
    local variable="$1" tool="$2" batch="$3" epochs="$4" steps
    shift 4
    if [[ "${DRY_RUN:-0}" != 1 ]]; then
        # Prefixes are words: shellcheck disable=SC2086
        steps="$(epochs_to_steps "$variable" "$tool" "$batch" "$epochs" ${!variable})" || exit $?
        recipe+=(--training.steps "$steps")
    fi
    if [[ "${DRY_RUN:-0}" == 1 && ! -f "$MODEL/config.json" ]]; then
        # Its shape is in its files, which need not be there.
        recipe+=("$@" --data.tokenizer "$MODEL")
    else
        recipe+=(--model.pretrained "$MODEL")
    fi
}

# train_sgpt NAME BATCH EPOCHS OPTION...: with MODEL and EMBEDDING_DATA. tiny_sgpt DIRECTORY makes the data of SCALE=tiny.
train_sgpt() {
    local name="$1" batch="$2" epochs="${EPOCHS:-$3}" processes="${GPUS_PER_NODE:-8}"
    local texts="${1#sgpt_}" configs="$ROOT/examples/configs" recipe=(--config "$ROOT/examples/configs/$1.yaml")
    shift 3
    if is_tiny; then
        name="${name}_tiny" processes=2
        recipe+=(--config "$configs/sgpt_tiny.yaml" --config "$configs/tiny.yaml" ${TINY_ARGS[@]+"${TINY_ARGS[@]}"})
        EMBEDDING_DATA="${OUTPUT_DIR:=runs/$name}/data/$texts"
        [[ "${DRY_RUN:-0}" == 1 ]] || tiny_sgpt "$OUTPUT_DIR/data"
        recipe+=(--data.tokenizer "$OUTPUT_DIR/data/tokenizer.model" --checkpoint.resume false)
    else
        required MODEL "the directory of GPT-J's Hugging Face files"
        required EMBEDDING_DATA "the prefixes of the data (see the top of this file)"
        tune_model EMBEDDING_DATA tools/preprocess/build_grit.py "$batch" "$epochs" --config "$configs/gptj_6b.yaml"
    fi
    # shellcheck disable=SC2086
    run_training 1 "$processes" "${recipe[@]}" --data.embedding "$(yaml_list $EMBEDDING_DATA)" \
        --output_dir "${OUTPUT_DIR:=runs/$name}" "$@"
}

# train_sft NAME BATCH EPOCHS OPTION...: with MODEL and GENERATIVE_DATA.
train_sft() {
    local name="$1" batch="$2" epochs="${EPOCHS:-$3}" processes="${GPUS_PER_NODE:-8}"
    local recipe=(--config "$ROOT/examples/configs/$1.yaml")
    shift 3
    if is_tiny; then
        name="${name}_tiny" processes=2
        recipe+=(--config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --checkpoint.resume false)
        tiny_sft "${OUTPUT_DIR:=runs/$name}/data"
        recipe+=(--data.tokenizer "$TOKENIZER")
    else
        required MODEL "the directory of the base model's Hugging Face files"
        required GENERATIVE_DATA "the prefixes of the data (see the top of this file)"
        tune_model GENERATIVE_DATA tools/preprocess/build_sft.py "$batch" "$epochs" --model mistral_7b
    fi
    # shellcheck disable=SC2086
    run_training 1 "$processes" "${recipe[@]}" --data.generative "$(yaml_list $GENERATIVE_DATA)" \
        --output_dir "${OUTPUT_DIR:=runs/$name}" "$@"
}

# train_preferences NAME BATCH EPOCHS TINY_DATA OPTION...: with MODEL and PREFERENCE_DATA, or TINY_DATA of tiny_preferences.
# PREFERENCE_KIND is the section that takes the data: preference, or reward.
train_preferences() {
    local name="$1" batch="$2" epochs="${EPOCHS:-$3}" data="$4" processes="${GPUS_PER_NODE:-8}"
    local kind="${PREFERENCE_KIND:-preference}" recipe=(--config "$ROOT/examples/configs/$1.yaml")
    shift 4
    if is_tiny; then
        name="${name}_tiny" processes=2
        recipe+=(--config "$ROOT/examples/configs/tiny.yaml" --model tiny_mistral --checkpoint.resume false)
        recipe+=("--$kind.batch_size" 8)
        tiny_preferences "${OUTPUT_DIR:=runs/$name}/data"
        PREFERENCE_DATA="$OUTPUT_DIR/data/$data"
        recipe+=(--data.tokenizer "$TOKENIZER")
    else
        required MODEL "the directory of the Hugging Face files of a model that follows instructions"
        required PREFERENCE_DATA "the prefixes of the data (see the top of this file)"
        tune_model PREFERENCE_DATA tools/preprocess/build_preference.py "$batch" "$epochs" --model mistral_7b
    fi
    # shellcheck disable=SC2086
    run_training 1 "$processes" "${recipe[@]}" "--$kind.data" "$(yaml_list $PREFERENCE_DATA)" \
        --output_dir "${OUTPUT_DIR:=runs/$name}" "$@"
}

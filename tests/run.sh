#!/usr/bin/env bash
# Install what the tests need, then lint, check types and test.
#
#   bash tests/run.sh [--engine newest] [--fast] [pytest arguments]
#
#   --engine newest   Python 3.12 with the newest megatron-core, in an environment under ~/.cache; tests only
#   --fast            leave out the tests marked slow
#
# TEST_WORKERS (2) processes run the tests; 0 runs them in this one, as a debugger wants. SHARD=i/n runs the i-th of n
# parts of the test files, for several machines. -m engine runs those that touch megatron-core; --cpu prints what each
# folder costs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/common.sh"
cd "$ROOT"

engine=present
arguments=()
while (($#)); do
    case "$1" in
        --engine)
            engine="${2:-}"
            [[ "$engine" == newest ]] || die "--engine takes newest, not '$engine'"
            shift
            ;;
        --fast) arguments+=(-m "not slow") ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

if [[ "$engine" == newest ]]; then
    PYTHON="$(newest_python)" || exit $?
    export PYTHON
else
    setup_python dev
fi

# One thread a process: several processes share the cores. Compiling the engine's fused functions costs 11 s a process
# and is worth nothing on a CPU.
# Some images tell Python not to keep what it has compiled: then every process compiles the tests again.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false

if [[ "$engine" == present ]]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
"$PYTHON" - <<'EOF'
import sys
from importlib.metadata import version
print(f"== Python {sys.version.split()[0]}, torch {version('torch')}, megatron-core {version('megatron-core')}", flush=True)
EOF
"$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=15 ${arguments[@]+"${arguments[@]}"}

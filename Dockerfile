# The training image. It keeps the torch, TransformerEngine and apex of an NGC PyTorch image, which are built for each
# other, and adds what is missing.
#
#   docker build -t megatron_grit .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/runs:/workspace/megatron_grit/runs" megatron_grit \
#       bash examples/train_gritlm_7b.sh
ARG NGC_TAG=25.09-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /workspace/megatron_grit
COPY . .

# setup_python finds the image's torch, and installs the rest under constraints made from what is installed.
RUN bash -c 'set -euo pipefail; source examples/common.sh; setup_python dev; \
        "$PYTHON" -m pip install --no-deps --no-build-isolation --editable .' \
    && python -c 'import megatron_grit, megatron.core, torch, transformer_engine; print(torch.__version__)'

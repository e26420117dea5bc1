# Training on CUDA devices. Not built or run by the project's tests, which have none; see docs/distributed.md.
#
#   docker build -t unmask .
#   docker run --gpus all --ipc host --rm -v "$PWD":/data -w /data unmask train -c run.yaml --nproc-per-node 8
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc \
    && rm -rf /var/lib/apt/lists/*

# Triton compiles its kernels with gcc and Python's headers when they are first used.
ENV PATH=/opt/unmask/bin:$PATH PYTHONUNBUFFERED=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY unmask unmask
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN python3 -m venv /opt/unmask \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir --constraint constraints.txt '.[wandb]'

WORKDIR /data
ENTRYPOINT ["unmask"]
CMD ["--help"]

# lumina-fn on a CPU. docs/how-to/docker.md says how to build and run it.
FROM python:3.11-slim

# PyTorch's CPU build; PyPI's own brings several gigabytes of CUDA. Another index: --build-arg TORCH_INDEX=URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# What the compiled steps need while they run: Inductor writes C++ and compiles it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lumina
RUN pip install --no-cache-dir 'torch==2.13.*' --index-url "$TORCH_INDEX"

COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY ops ops
COPY lumina_fn lumina_fn
COPY experiments experiments
# Editable: the small model and the vendored lists lie beside the code.
RUN pip install --no-cache-dir --editable .

# With `--user` there is no entry in /etc/passwd: home and the compile cache need places that any user may write.
ENV HOME=/tmp/home TORCHINDUCTOR_CACHE_DIR=/tmp/compiled
RUN mkdir --mode=1777 /tmp/home /tmp/compiled /work

# Relative paths of a command start here; mount your folder on it.
WORKDIR /work
ENTRYPOINT ["lumina"]

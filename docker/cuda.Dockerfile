# vLLM with attnserve's attention variants, and the gateway, on NVIDIA GPUs (x86_64). docs/DEPLOY.md.
#
#   docker build -f docker/cuda.Dockerfile -t attnserve:cuda .
#
# CUDA's libraries come with torch's distributions, the driver from the host (NVIDIA's container
# toolkit), so that a plain Debian is enough. Never built so far; see docs/DEPLOY.md.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'python3.11-venv=3.11.2-*' \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements requirements
COPY tools/install.sh tools/
RUN tools/install.sh dependencies /opt/attnserve requirements/serve-cuda.txt

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY attnserve attnserve
COPY kernels kernels
COPY plugins plugins
COPY serving serving
COPY training training
COPY quant quant
COPY benchmarks benchmarks
RUN tools/install.sh project /opt/attnserve \
 && /opt/attnserve/bin/python -m pip uninstall --quiet --yes hatchling editables pip \
 && /opt/attnserve/bin/python -m compileall -q -j 0 -x /py312_ /opt/attnserve/lib

FROM ${BASE}
# A C compiler and Python's headers stay: on its first launch Triton compiles its driver module
# (triton/backends/nvidia/driver.c) against the libcuda.so.1 of the host, which no image can know.
# Kernels themselves need neither; Triton brings its own ptxas.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      'gcc=4:12.2.*' 'libc6-dev=2.36-*' 'libpython3.11-dev=3.11.2-*' 'python3.11=3.11.2-*' \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home attnserve
COPY --from=build /opt/attnserve /opt/attnserve
COPY checkpoints /checkpoints
ENV PATH=/opt/attnserve/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /home/attnserve
EXPOSE 8000
# The port of whatever runs here: the gateway's is 8080.
ENV HEALTH_PORT=8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"HEALTH_PORT\"]}/health', timeout=4)"]
CMD ["vllm", "serve", "/checkpoints/softpick", "--served-model-name=softpick", "--host=0.0.0.0"]

# vLLM with attnserve's attention variants, and the gateway, on CPUs (x86_64). docs/DEPLOY.md.
#
#   docker build -f docker/cpu.Dockerfile -t attnserve:cpu .
#
# The environment is the lock's, by the script that `make install` runs too. The final layer has no
# compiler: the kernels are compiled here, for every instruction set that vLLM's CPU build runs on.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'g++=4:12.2.*' 'python3.11-venv=3.11.2-*' \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements requirements
COPY tools/install.sh tools/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN tools/install.sh dependencies /opt/attnserve requirements/serve-cpu.txt

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY attnserve attnserve
COPY kernels kernels
COPY plugins plugins
COPY serving serving
COPY training training
COPY quant quant
COPY benchmarks benchmarks
# Compiled to bytecode here, since the user who runs it cannot write it. What installs and builds
# Python packages is not needed any more. torch's py312_... is no Python 3.11 and would end the build.
RUN tools/install.sh project /opt/attnserve \
 && /opt/attnserve/bin/python -m pip uninstall --quiet --yes hatchling editables pip \
 && /opt/attnserve/bin/python -m compileall -q -j 0 -x /py312_ /opt/attnserve/lib

ARG ISAS="amx avx512_bf16 avx512 avx2"
COPY tools/build_kernels.py tools/
# The folder first: the one that it would make is for its owner alone.
RUN mkdir /opt/attnserve/kernels \
 && ATTNSERVE_CACHE=/opt/attnserve/kernels /opt/attnserve/bin/python tools/build_kernels.py --isa ${ISAS}

FROM ${BASE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'python3.11=3.11.2-*' 'libgomp1=12.2.*' 'libnuma1=2.0.*' \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home attnserve
COPY --from=build /opt/attnserve /opt/attnserve
COPY checkpoints /checkpoints
ENV PATH=/opt/attnserve/bin:$PATH \
    ATTNSERVE_CACHE=/opt/attnserve/kernels \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /home/attnserve
EXPOSE 8000
# The port of whatever runs here: the gateway's is 8080.
ENV HEALTH_PORT=8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"HEALTH_PORT\"]}/health', timeout=4)"]
# --enforce-eager: compiling a model takes minutes, and needs a compiler.
CMD ["vllm", "serve", "/checkpoints/softpick", "--served-model-name=softpick", "--host=0.0.0.0", "--enforce-eager", "--kv-cache-memory-bytes=512M"]

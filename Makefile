# `make setup` makes .venv and installs into it; every other target calls it first.

# A wheel index to prefer for PyTorch, for instance https://download.pytorch.org/whl/cpu. Empty: pip's own configuration.
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
# Idle OpenMP threads sleep: spinning ones take the cores of whatever runs beside them.
export OMP_WAIT_POLICY := passive

.PHONY: setup demo test test-all test-fast ascend-test ascend-kernels soak fuzz lint docs notebooks bench bench-quick npu-check
.DEFAULT_GOAL := setup

setup: .venv/installed

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 found: install one, or name it, make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'torch==2.13.*' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: setup
	$(BIN)/python -m experiments.demo

# Tensors of tests are tiny: a second thread costs more than it gives, a second process does not.
# A file's tests stay in one process and in order: blocks of the README build on each other.
test test-all test-fast ascend-test ascend-kernels: export OMP_NUM_THREADS := 1
PYTEST := -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -p tests.ascend.ladder

# Every law, and a part of the sweeps that widen them: another part each time, whose number is printed. SWEEP=3 plays part 3.
SWEEP ?= $(shell date +%s)
test: setup .venv-npu/installed
	$(BIN)/python $(PYTEST) --rungs 1,2 --sweep $(SWEEP)

test-all: setup .venv-npu/installed
	$(BIN)/python $(PYTEST) --rungs 1,2

test-fast: setup .venv-npu/installed
	$(BIN)/python $(PYTEST) -m "not slow"

# The ladder of tests/ascend, what shows the NPU's path without an NPU. A venv that cannot be made here says why in its `missing`.
.venv-%/installed: .venv/installed tests/ascend/overlay.py $(wildcard tests/ascend/cann_stub/*.[cp]*)
	$(BIN)/python -m tests.ascend.overlay $*

ascend-test: setup .venv-npu/installed
	$$(test -e .venv-npu/installed && echo .venv-npu/bin/npu-python || echo $(BIN)/python) $(PYTEST) --rungs 3,4,5 tests/ascend

ascend-kernels: setup .venv-triton/installed
	$$(test -e .venv-triton/installed && echo .venv-triton/bin/python || echo $(BIN)/python) -m pytest -q -p tests.ascend.ladder --rungs 6 tests/ascend/test_rung6.py

# A training run killed a hundred times; `make test` does ten.
soak: export OMP_NUM_THREADS := 1
soak: setup
	$(BIN)/python -u -m tests.soak 100

# 20,000 mutated files of each format; then inputs grown by coverage, where atheris installs. `make test` plays 200 of each.
fuzz: export OMP_NUM_THREADS := 1
fuzz: setup
	$(BIN)/python -W ignore -m tests.fuzz.run --cases 20000
	if $(BIN)/python -m pip install --quiet --editable '.[fuzz]'; then $(BIN)/python -m tests.fuzz.guided; \
	else echo "atheris does not install here: without the cases that coverage finds"; fi

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The site of docs/, in build/docs. A warning is an error, and nothing is loaded from a network.
docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

# Notebooks keep their outputs: run each, and write what it shows into its .ipynb.
notebooks: setup
	$(BIN)/python -m tests.support.notebooks

# The peers of `make bench`, in a venv that shows .venv's packages under its own.
.venv-bench/installed: .venv/installed
	$(BIN)/python -m venv --clear .venv-bench
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$(.venv-bench/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth
	.venv-bench/bin/python -m pip install --quiet --editable '.[bench]'
	@touch $@

# Everything beside its peers, in about an hour: bench/results.json and the README's table. In a few minutes: runs/bench-quick.json.
bench: setup .venv-bench/installed
	.venv-bench/bin/python -m bench

bench-quick: setup .venv-bench/installed
	.venv-bench/bin/python -m bench --quick --out runs/bench-quick.json

npu-check: setup
	$(BIN)/python -m experiments.npu_check

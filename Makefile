# Needs Python 3.11 or later with venv, make, and a package index. uv is used when it is on PATH.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
STAMP := $(VENV)/.installed
INSTALL := -c $(CONSTRAINTS) -e '.[plot,test]'

# uv does not read PIP_FIND_LINKS. Without local wheels it picks the torch build that fits this machine's GPU, or the CPU one.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
else
export UV_TORCH_BACKEND ?= auto
endif
# Without byte-compiling every `import torch` takes twice as long.
export UV_COMPILE_BYTECODE ?= 1

.PHONY: setup demo test test-slow test-gpu test-ecosystem test-ecosystem-all bench lint

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if command -v uv >/dev/null; then \
		set -ex; \
		test -x $(VENV)/bin/python || uv venv --python $(PYTHON) $(VENV); \
		uv pip install --python $(VENV)/bin/python $(INSTALL); \
	else \
		set -ex; \
		$(PYTHON) -m venv $(VENV); \
		$(VENV)/bin/python -m pip install $(INSTALL); \
	fi
	@touch $@
	@echo "mythos is $(VENV)/bin/mythos. To call it by its name, in each shell: source $(VENV)/bin/activate"

demo: $(STAMP)
	$(VENV)/bin/mythos demo

# Two processes of one thread each: two OpenMP threads are slower than one on a shared machine, and the tests' results
# must not depend on the number of cores. N=0 runs them in one process, which pytest's --pdb and -s need.
N ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(N)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow

test-gpu: $(STAMP)
	$(VENV)/bin/python -m pytest -m gpu

# Tools that use this package, each pinned, in an environment on top of .venv, where torch is.
# make test-ecosystem TRANSFORMERS=5.16.0 tests an older version; test-ecosystem-all those that the extra `hf` spans.
TRANSFORMERS ?= 5.24.0
ECOSYSTEM = .venv-ecosystem/$(TRANSFORMERS)
OVER_VENV = import site, subprocess; \
	own, code = site.getsitepackages()[0], 'import site; print(site.getsitepackages()[0])'; \
	base = subprocess.check_output(['$(VENV)/bin/python', '-c', code], text=True).strip(); \
	open(own + '/base.pth', 'w').write('import site; site.addsitedir(%r)' % base)

$(ECOSYSTEM)/.installed: $(STAMP)
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -c "$(OVER_VENV)"
	$(ECOSYSTEM)/bin/python -m pip install -q transformers==$(TRANSFORMERS) accelerate==1.15.0
	@touch $@

test-ecosystem: $(ECOSYSTEM)/.installed
	OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest tests/hf

test-ecosystem-all:
	for version in 5.16.0 5.20.0 5.23.0 5.24.0; do $(MAKE) test-ecosystem TRANSFORMERS=$$version || exit 1; done

# Hours. BENCH passes options on: make bench BENCH='--quick --cases train_mid'
bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks $(BENCH)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check

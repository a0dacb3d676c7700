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

.PHONY: setup demo test test-slow test-gpu test-ecosystem bench lint

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

# The heavier tools that use this package, each version pinned, in an environment on top of .venv: torch comes from there.
ECOSYSTEM := .venv-ecosystem
$(ECOSYSTEM)/.installed: constraints-ecosystem.txt $(STAMP)
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -c "import site, subprocess; \
		base = subprocess.check_output(['$(VENV)/bin/python', '-c', 'import site; print(site.getsitepackages()[0])'], text=True); \
		open(site.getsitepackages()[0] + '/base.pth', 'w').write('import site; site.addsitedir(%r)' % base.strip())"
	$(ECOSYSTEM)/bin/python -m pip install -q -r constraints-ecosystem.txt
	@touch $@

test-ecosystem: $(ECOSYSTEM)/.installed
	OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest tests/hf

# Hours. BENCH passes options on: make bench BENCH='--quick --cases train_mid'
bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks $(BENCH)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check

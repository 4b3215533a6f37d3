# Two commands: `make tour` shows what bdnb does, `make test` proves that it works.
# Each makes its own virtual environment (.venv) the first time, and again when the requirements change.
#   make tour PYTHON=python3.12      another interpreter
#   make check VENV=path/to/venv     the checks alone, in an environment that you already have
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
NEEDS   = settings.ini setup.py pyproject.toml

.PHONY: help tour test check fast build lab docs clean
help:
	@echo "make tour    install bdnb into $(VENV) and run its guided tour"
	@echo "make test    install the development extra and run every check and every test"
	@echo "make check   run the checks and tests in $(VENV) as it is      make fast    only the quick ones"
	@echo "make build   write bdnb/ and README.md from the notebooks       make lab     edit the notebooks"
	@echo "make docs    build the site into _docs (needs Quarto)           make clean   remove what was built"

tour: $(VENV)/.tour
	$(BIN)/bdnb tour $(ARGS)

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory check

check: export OMP_NUM_THREADS = 1
check: export MPLBACKEND = agg
check: export HF_HUB_OFFLINE = 1
check:
	@failed=0; \
	echo "Running every notebook:"; $(BIN)/nbdev_test --n_workers 2 --timing || failed=1; \
	echo "Running the tests:"; $(BIN)/python -m pytest -n 2 --dist loadfile || failed=1; \
	exit $$failed

fast: export OMP_NUM_THREADS = 1
fast:
	$(BIN)/python -m pytest -m "not slow"

build: $(VENV)/.dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/make_readme.py

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs

docs: $(VENV)/.dev
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.7.34: https://quarto.org/docs/download"; exit 1; }
	$(BIN)/nbdev_proc_nbs
	. $(BIN)/activate && cd _proc && quarto render --no-cache --no-execute
	rm -rf _docs && mv _proc/_docs _docs
	$(BIN)/python tests/check_site.py _docs

clean:
	rm -rf build dist *.egg-info _proc _docs .pytest_cache
	find bdnb nbs tests tools -name __pycache__ -prune -exec rm -rf {} +

# One `pip install` resolves torch and torchvision together. The stamp is written last, so a broken install is tried again.
$(VENV)/.tour: $(NEEDS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(NEEDS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.tour

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "bdnb needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV). PyTorch is a large download the first time: minutes, and some gigabytes of disk."
	$(PYTHON) -m venv $(VENV)

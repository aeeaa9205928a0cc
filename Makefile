# The two commands of this project are `make reproduce` and `make test`; `make help` lists the rest.
PROFILE ?= tiny
PY := .venv/bin/python
# uv does not compile bytecode; with this variable set, every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{print $$1 "\t" $$2}'

setup: ## create .venv from the lock
	@bash scripts/setup.sh

reproduce: setup ## run notebooks 00-12 at PROFILE (tiny, smoke, overnight with its sweeps, workshop, paper); figures land in runs/PROFILE/figures, those of overnight in figures/
	@$(PY) -m speed_core run --profile $(PROFILE)
	@$(if $(filter overnight,$(PROFILE)),$(PY) -m speed_core study --profile overnight)

plan: setup ## what PROFILE would do: models, counts, teacher calls, cost, and which artifacts exist
	@$(PY) -m speed_core plan --profile $(PROFILE)

check: setup ## fail when a committed figure and its data disagree
	@$(PY) -m speed_core check

lint: setup ## ruff, mypy and import-linter
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	@.venv/bin/lint-imports --no-cache --no-logo

kernels: setup ## the GPU kernels under Triton's interpreter (fetches triton into .venv/triton, once)
	@test -d .venv/triton/triton || $(PY) -m pip install -q --disable-pip-version-check --no-deps --target .venv/triton "$$(grep '^triton==' requirements/cuda.lock)"
	@TRITON_INTERPRET=1 PYTHONPATH=.venv/triton $(PY) -m pytest -n $(TEST_WORKERS) tests/contrastive/test_kernels.py

# Two workers, each with one thread a process: most tests wait for imports and child processes. A file stays with one worker, since
# its tests share what was made for them; the one that executes all notebooks is the longest and is begun first.
TEST_WORKERS ?= 2
TESTS = $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
test: lint kernels ## lint, types, kernels, unit tests, and every notebook once at smoke size (TEST_WORKERS=0: one test at a time)
	@$(TESTS) -m "not slow"

test-rest: setup ## what `test` leaves out: each notebook alone, the bundle, 50 kills, Ray, a real server, the site, a browser (needs chromium)
	@bash scripts/book.sh || echo "test-rest: the site is not tested"
	@$(TESTS) -m slow

test-all: ## `test`, then `test-rest`
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-rest

browser: setup ## the notebooks in JupyterLab and a headless Chromium (in `test-all` too; needs chromium)
	@$(PY) -m pytest tests/test_browser.py

lab: setup ## JupyterLab on your own copy of the notebooks, in lab/: exercises to fill in, solutions folded; work that is there is kept
	@$(PY) scripts/classroom.py lab --folded --keep
	@$(PY) -m jupyterlab --ServerApp.root_dir=. lab/00_preflight.ipynb

book: ## the site, in book/index.html: the docs and the executed notebooks of PROFILE's run, or the recorded ones (its environment: .venv-book)
	@bash scripts/book.sh
	@PYTHONPATH=.:notebooks .venv-book/bin/python scripts/book.py --profile $(PROFILE)

classroom: setup ## the students' copy of the notebooks in classroom/, without any solutions
	@$(PY) scripts/classroom.py

gpu-check: setup ## kernels, losses and training steps on this GPU, in under ten minutes (REHEARSE=1: toy sizes on the processor)
	@$(PY) benchmarks/gpu_check.py $(if $(REHEARSE),--rehearse)

OUT ?= speed-$(PROFILE).tar
bundle: setup ## one archive for machines without a network, of PROFILE's run: OUT (speed-PROFILE.tar); WHEELS=1 puts the environment in
	@$(PY) scripts/bundle.py --profile $(PROFILE) $(if $(WHEELS),--wheels) $(OUT)

.PHONY: help setup reproduce plan check lint kernels test test-rest test-all browser lab book classroom gpu-check bundle

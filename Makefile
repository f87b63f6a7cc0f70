# `make book` and `make test` are all that a reader needs; each target makes .venv first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= default
JOBS ?= 2
BENCH ?=
PY := $(VENV)/bin/python

.PHONY: help book pdf test check lab bench clean venv

help:
	@echo "make book    compute the chapters and build the book  (PRESET=smoke|default|paper, JOBS=2)"
	@echo "make pdf     print the built book as one PDF  (PRESET, needs Chromium)"
	@echo "make test    all tests, including notebooks, book and browser  (JOBS=2)"
	@echo "make check   lint, format, types and the fast tests"
	@echo "make lab     open JupyterLab on the chapters"
	@echo "make bench   measure speed against the peers  (BENCH=\"--quick\", \"--only W1\", \"--save\")"
	@echo "make clean   remove built pages and caches (keeps .venv and computed runs)"

venv:
	@$(PYTHON) tools/setup_venv.py $(VENV) book dev

book: venv
	@$(PY) -m ntklib book --preset $(PRESET) --jobs $(JOBS)

pdf: venv
	@$(PY) -m ntklib pdf --preset $(PRESET)

test: venv
	@$(PY) -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

check: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright
	$(PY) -m pytest -q -m "not slow"

lab: venv
	@$(PY) -m ntklib.start_page
	$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/start.md \
		--LabApp.app_settings_dir="$(CURDIR)/tools/jupyterlab"

bench: venv
	@$(PYTHON) tools/setup_venv.py $(VENV) book dev bench
	@test -d .venv-nt || $(PY) -m benchmarks install-neural-tangents || echo "going on without neural-tangents"
	$(PY) -m benchmarks $(BENCH)

clean:
	rm -rf _build book/executed book/claims.md book/figures.md book/_generated .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -type d -prune -exec rm -rf {} +
	@echo "computed runs are kept in runs/; remove that folder to compute everything again"

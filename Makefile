# `make demo` runs the main job, `make test` the tests, `make docs` builds the documentation site into docs/_site (about a
# minute of one core: it runs the gallery); each makes its own environment first. `make dist URL=https://...` builds what
# is uploaded to PyPI; URL is where the repository can be read, for the links of its page there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks examples docs/conf.py tools

.PHONY: demo test docs dist format benchmarks bench clean

demo: $(VENV)/.demo
	$(BIN)/convexhead demo --out demo

test: $(VENV)/.dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

docs: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_site

dist: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[release]'
	$(BIN)/python tools/dist.py --url '$(URL)' --out dist

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Ten minutes of fits beside the committed rows. The new ones replace them by moving bench_now.csv to bench.csv.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench.py --name bench_now
	$(BIN)/python benchmarks/compare.py benchmarks/results/bench.csv benchmarks/results/bench_now.csv

benchmarks: $(VENV)/.dev
	$(BIN)/python benchmarks/suite.py --instance synthetic-200 digits synthetic-1000

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo dist docs/_site docs/gallery docs/generated docs/cli.md

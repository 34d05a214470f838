PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# A worker a core; tensors this small gain nothing from more threads. Tests of one xdist_group share a worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup

.PHONY: install demo test test-slow browser lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

# The whole main job on real handwritten digits.
demo: install
	$(BIN)/fedl2p run configs/digits.yaml

test: install
	$(PYTEST)

test-slow: install browser
	$(PYTEST) -m slow

# A Chromium for the tests of the report page; Debian's where there is none and one may install it.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

# How fast each part is, against a reference in the same process; writes benchmarks/results.json and .md.
bench: install
	$(BIN)/python -m benchmarks.speed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

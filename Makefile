# Each target makes .venv itself when it is missing. PYTHON may be 3.10 to 3.12.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench sync figures clean

demo: .venv/installed  ## execute the notebooks, render them, print what they proved
	$(BIN)/python scripts/run_notebooks.py

test: .venv/installed  ## lint, then every test; offline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/sync_notebooks.py --check
	$(BIN)/python -m pytest

bench: .venv/installed  ## speed and memory, side by side, as ratios
	$(BIN)/python scripts/bench.py

sync: .venv/installed  ## write library source into the notebooks' mirrored cells
	$(BIN)/python scripts/sync_notebooks.py

figures: .venv/installed  ## draw images/
	$(BIN)/python scripts/make_figures.py

clean:  ## remove what was built, not the environment
	rm -rf build

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

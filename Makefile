# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint audit benchmark benchmark-sdm benchmark-pairs clean

demo: $(STAMP)
	$(BIN)/speciesmap demo --out demo --overwrite

test: $(STAMP) lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses logical --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check speciesmap tests benchmarks examples docs
	$(BIN)/ruff format --check speciesmap tests benchmarks examples docs
	$(BIN)/mypy

# faults that bandit knows, and published holes in the pinned set; the latter asks pypi.org
audit: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[audit]'
	$(BIN)/bandit --quiet --recursive speciesmap --configfile pyproject.toml
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# the engine against torchgeo, terratorch, geoai and xbatcher, which live in their own environment
PEERS := benchmarks/engine/.venv
benchmark: $(STAMP) $(PEERS)/.installed
	$(BIN)/python benchmarks/engine/run.py $(BIN)/python $(PEERS)/bin/python
	$(BIN)/python benchmarks/engine/growth.py
	$(BIN)/python benchmarks/engine/queries.py

$(PEERS)/.installed: benchmarks/engine/requirements.txt
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --upgrade pip
	$(PEERS)/bin/pip install --quiet $$(grep -E '^(torch|torchvision)==' constraints.txt) \
	  --requirement benchmarks/engine/requirements.txt
	touch $@

# heads on covariates against MaxEnt on the NCEAS benchmark (R package disdat, its data as .rds)
DISDAT ?= ../shared/data/disdat
benchmark-sdm: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[benchmark-sdm]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sdm/disdat.py $(DISDAT)

# contrastive pre-training on pairs of real photographs, and what it is worth
PAIRS ?= ../shared/data/naip_pairs
CROWNS ?= ../shared/data/idtrees_mlbs
benchmark-pairs: $(STAMP)
	$(BIN)/python benchmarks/naip_pairs.py $(PAIRS)
	$(BIN)/python benchmarks/idtrees.py $(CROWNS)
	$(BIN)/python benchmarks/stream.py

# torch first and by its pinned version, so that the resolver need not look for another build
$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,stac,dev]'
	touch $(STAMP)

clean:
	rm -rf .venv $(PEERS) demo build dist .mypy_cache .pytest_cache .ruff_cache

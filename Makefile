# make quickstart | demo | compare | test | soak | lint | docs. Uses the active virtual environment, else makes .venv; set-up runs once.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
# Named after the checkout: an environment that is shared by two of them is set up for each.
STAMP := $(VENV)/.set-up$(subst /,-,$(CURDIR))

.PHONY: quickstart demo compare test soak lint docs

quickstart: $(STAMP)
	$(BIN)/stepdistill train recipes/quickstart.yaml
	@echo "Open runs/quickstart/report/index.html in a browser."

# Another student than the one that is shipped: make demo STUDENT=runs/quickstart
demo: $(STAMP)-demo
	$(BIN)/stepdistill demo $(STUDENT) $(ARGUMENTS)

# Hours on a CPU; picks up where it was stopped. Pieces: make compare ARGUMENTS='--methods dmd2 lcm --seeds 0 1 2'
compare: $(STAMP)
	$(BIN)/python scripts/compare.py $(ARGUMENTS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# About half an hour: runs killed at random moments, then 10,000 examples of every kind of damaged file.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py $(ARGUMENTS)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py --encode --kills 10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_fuzz.py --hypothesis-profile soak --timeout 0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --timeout 0

docs: $(STAMP)
	$(BIN)/python scripts/recipe_reference.py
	$(BIN)/python scripts/methods_table.py
	$(BIN)/python -m mkdocs build --strict
	@echo "$(BIN)/python -m http.server --directory build/site shows it, with search, at http://127.0.0.1:8000; no network is needed."

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/type_tree.py
	$(BIN)/ty check --python $(BIN)/python

$(STAMP): pyproject.toml
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[eval,dev]'
	touch $@

$(STAMP)-demo: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

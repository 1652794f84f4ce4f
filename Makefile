# Everything on a fresh Debian machine that has python3:  make demo   make test
.PHONY: demo test lint docs etc bench clean

PYTHON ?= python3
VENV := .venv

demo: $(VENV)/ready
	@sh etc/examples/demo.sh $(VENV)/bin

test:
	@EVERY=$(EVERY) sh tests/run.sh

$(VENV)/ready: pyproject.toml
	@sh tests/venv.sh $(PYTHON) $(VENV) .
	@touch $@

lint: $(VENV)/ready
	$(VENV)/bin/pip install -q ruff mypy
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

docs: $(VENV)/ready
	$(VENV)/bin/python docs/man.py > docs/daemonkit.1
	$(VENV)/bin/python docs/man.py tables

bench: $(VENV)/ready
	$(VENV)/bin/pip install -q '.[bench]'
	$(VENV)/bin/python bench/all.py

clean:
	rm -rf .venv* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

etc: $(VENV)/ready
	$(VENV)/bin/python -c "from daemonkit.service.unit import ready_made; [open(f'etc/{path}', 'w').write(text) for path, text in ready_made().items()]"

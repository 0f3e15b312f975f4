# Two commands: `make book` and `make test`. Each sets up .venv by itself the first time.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := book
.PHONY: book pdf test browser-test colab-test cluster-test fuzz mutants benchmarks clean

book: .venv/ready
	@$(BIN)/fmn book

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadscope --no-loadscope-reorder --nbval-lax  # a thread a worker
	$(BIN)/fmn book --cached

# The book that was built last as one file, _build/forget-me-not.pdf.
pdf: .venv/ready
	@tests/browser/setup.sh
	@test -e _build/html/index.html || $(BIN)/fmn book --cached
	@node tests/browser/pdf.mjs

# The book that was built last, in a real browser; built first if there is none.
browser-test: .venv/ready
	@tests/browser/setup.sh
	@test -e _build/html/index.html || $(BIN)/fmn book --cached
	@node tests/browser/test.mjs

colab-test: .venv/ready
	$(BIN)/pytest -q -m colab tests/test_colab.py

# A grid on two nodes of a Ray cluster on this machine, one of whose processes is killed.
cluster-test: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cluster]'
	$(BIN)/pytest -q -m cluster tests/test_cluster.py

# Damaged files and arguments, and changes of the library; the outcomes are committed.
fuzz: .venv/ready
	$(BIN)/python -m benchmarks.fuzz --out results/fuzz.json

mutants: .venv/ready
	$(BIN)/python -m benchmarks.mutants --out results/mutants.json

benchmarks: .venv/ready
	@$(BIN)/python -m benchmarks

clean:
	rm -rf _build .venv

.venv/ready: pyproject.toml
	@echo "installing into .venv (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; say which: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book,test]'
	@touch $@

# The README's commands. Each sets itself up: the first call makes .venv, a later call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: shakespeare test lab export

shakespeare: .venv/learner     ## train the laptop preset on data/shakespeare.txt and let it write
	$(BIN)/python -m makemoe train laptop

test: .venv/developer          ## every test, the notebooks included
	$(BIN)/python -m pytest

lab: .venv/learner             ## open the first lesson in Jupyter
	$(BIN)/jupyter lab notebooks/00_lab.ipynb

export: .venv/developer        ## notebooks -> makemoe/*.py
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

.venv/learner: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/developer: .venv/learner
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

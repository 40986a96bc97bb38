# make demo   environment, data set, training, evaluation, pictures: one command on a bare machine
# make test   the same environment and the whole test suite
# make lint   ruff, mypy, codespell
# make clean  remove what these made, the environment included (clean-demo: the trained demo alone)
#
# Every step can be interrupted and run again: what is finished is not done a second time.

PYTHON ?= python3
VENV   ?= .venv
OUTPUT ?= output/demo
CONFIG ?= configs/quick_schedules/demo.yaml

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DATA   := datasets/shapes
JOBS   ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install data demo test lint clean clean-demo

help:
	@sed -n 's/^# make/make/p' Makefile

# The stamp is written last, so an install that was cut short is taken up again.
install: $(VENV)/installed
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): some minutes, once.'
	$(PIP) --editable '.[all,test]'
	@touch $@

data: install
	$(BIN)/python datasets/make_shapes.py --output $(DATA)

# Training resumes where it was cut short; the mark is set when its evaluation is through as well.
demo: data
	@if [ -f $(OUTPUT)/demo_finished ]; then \
	  echo '$(OUTPUT): trained and evaluated already; `make clean-demo demo` does it again'; \
	else \
	  $(BIN)/python tools/train_net.py --config-file $(CONFIG) \
	    $$(test -f $(OUTPUT)/last_checkpoint && echo --resume) OUTPUT_DIR $(OUTPUT) && \
	  touch $(OUTPUT)/demo_finished; \
	fi
	@$(BIN)/python tools/predict.py --config-file $(CONFIG) --input $(DATA)/val/00000[1-8].jpg \
	  --output $(OUTPUT)/pictures --opts MODEL.WEIGHTS $(OUTPUT)/model_final.pth
	@echo
	@echo 'Tables:   the end of $(OUTPUT)/log.txt, as numbers in $(OUTPUT)/results.json'
	@echo 'Pictures: $(OUTPUT)/pictures'
	@echo 'Weights:  $(OUTPUT)/model_final.pth'

# One thread per process: two test processes on two cores do not fight for them.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

lint: $(VENV)/lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
$(VENV)/lint-installed: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@

clean-demo:
	rm -rf $(OUTPUT)

clean: clean-demo
	rm -rf $(VENV) $(DATA) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

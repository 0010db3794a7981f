# `make demo` and `make test` each do all their own set-up: a venv, the pinned packages, then the work.
# TORCH_PIP takes extra pip options for torch alone, e.g. the index of CPU builds (README, "Which torch").
PYTHON ?= python3
VENV ?= .venv
TORCH_PIP ?=
OUT ?= out
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DRAWN := --grid --enlarge 4 --seed 7 --num-images 4 \
  --prompt "a fox on a blue background" --prompt "a strawberry on a yellow background" \
  --prompt "a sunflower on a purple background" --prompt "a hamburger on a green background"
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint install-demo install-dev peer-optimum peer-openvino clean

demo: $(VENV)/.demo
	$(BIN)/hypersd-export --target onnx --steps 1,4 --out $(OUT)/demo --overwrite
	$(BIN)/hypersd-generate $(OUT)/demo --steps 1 --out $(OUT)/demo.png $(DRAWN)
	$(BIN)/hypersd-generate $(OUT)/demo --steps 4 --out $(OUT)/demo-4.png $(DRAWN)
	@echo "bundle: $(OUT)/demo    pictures: $(OUT)/demo.png in one step, $(OUT)/demo-4.png in four"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install-demo: $(VENV)/.demo
install-dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[export,cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@

# Other projects' pins conflict with ours, so each lives in an environment of its own (benchmarks/peers/README.md).
peer-optimum: .venv-peers/optimum/.done
peer-openvino: .venv-peers/openvino/.done
.venv-peers/%/.done: benchmarks/peers/%/requirements.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet $(TORCH_PIP) $(TORCH)
	.venv-peers/$*/bin/python -m pip install --quiet -r $<
	.venv-peers/$*/bin/python -m pip uninstall --quiet --yes torchvision # its PyPI build and a CPU torch do not mix
	@touch $@

clean:
	rm -rf $(VENV) $(OUT)

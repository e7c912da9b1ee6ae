# make demo    trains, samples from and scores a FlashDiT on the embedded digits
# make test    lint, types, documentation, tests: what CI runs
# Both set everything up in .venv first; a second call re-installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CARRIED := build/carried
CARRIED_PACKAGES := diffusers huggingface_hub importlib_metadata omegaconf antlr4-python3-runtime torch-fidelity

.PHONY: demo test lint type docs unit install bench gpu gpu-packages faults assets clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: export OMP_NUM_THREADS = 1  # so small a model gains little from more, and loses much where cores are shared
demo: install
	$(BIN)/flashdit train
	$(BIN)/flashdit eval --cfg-scale 1.0 --output runs/digits/eval/cfg_1.0
	$(BIN)/flashdit eval --cfg-scale 1.5 --output runs/digits/eval/cfg_1.5
	$(BIN)/flashdit sample --cfg-scale 1.5
	@echo 'Try next:'
	@echo '  $(BIN)/flashdit sample --class seven 3 --num-images 20 --cfg-scale 3 --seed 1'
	@echo '  $(BIN)/flashdit train run.dir=runs/windows model.attention.name=window'
	@echo '  $(BIN)/flashdit app'
	@echo 'and on GPUs, with the folder that flashdit encode has written:'
	@echo '  $(BIN)/accelerate launch -m flashdit train --config flashdit_xl data.path=FOLDER'

test: lint type docs unit

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: install
	$(BIN)/basedpyright

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

docs: install
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

bench: install  # side by side on this machine: benchmarks/results/
	$(BIN)/python -m benchmarks.backbones
	$(BIN)/python -m benchmarks.backbones --backward --batch 8
	$(BIN)/python -m benchmarks.backbones --size 384 --batch 4
	$(BIN)/python -m benchmarks.backbones --compile --models Iwin-T Swin-T
	$(BIN)/python -m benchmarks.flashdit --batch 8 --compile --no-memory  # hours; with --depth 1 minutes
	$(BIN)/python -m benchmarks.flashdit --size XL --depth 1 --batch 8
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.checkpoint  # XL: 20 GiB of memory
	$(BIN)/python -m benchmarks.glyphs
	$(BIN)/python -m benchmarks.sampling --compile

gpu-packages: install  # pure Python that an image with PyTorch lacks: carry the folder to the machine of `make gpu`
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade --no-deps --no-compile \
		--constraint constraints.txt --target $(CARRIED) $(CARRIED_PACKAGES)
	rm -rf $(CARRIED)/tests $(CARRIED)/bin

gpu: export PYTHONPATH := $(if $(filter $(BIN)/%,$(GPU_PYTHON)),,$(CARRIED):)$(PYTHONPATH)
gpu:  # on a machine with a CUDA device: what no GPU has run yet, in ten minutes and without a network
	$(GPU_PYTHON) -m benchmarks.gpu

faults: export OMP_NUM_THREADS = 1
faults: install  # kills, full disks and broken data: how many training survives
	$(BIN)/python -m benchmarks.faults

assets: install  # trains the embedded data's autoencoders (others than the committed ones, as good) and classifiers again
	$(BIN)/flashdit autoencoder --config autoencoder/digits
	$(BIN)/python -m tools.digits_classifier
	$(BIN)/flashdit autoencoder --config autoencoder/glyphs
	$(BIN)/python -m tools.glyphs_classifier
	$(BIN)/flashdit plot runs/digits --write-reference flashdit/digits/assets/curves/digits.json  # after make demo
	$(BIN)/flashdit train --config glyphs
	$(BIN)/flashdit plot runs/glyphs --write-reference flashdit/glyphs/assets/curves/glyphs.json

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

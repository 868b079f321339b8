# What people type every day. PYTHON=... picks an interpreter; CONSTRAINTS= (empty) takes a CUDA build of torch.
PYTHON ?= python
CONSTRAINTS ?= -c constraints-cpu.txt

.PHONY: install test lint bench train aot floors hub gpu gpu-tune gpu-train gpu-wheels

install:  ## build the kernels and install everything that development needs
	$(PYTHON) -m pip install $(CONSTRAINTS) -e '.[dev]'

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint:
	$(PYTHON) -m ruff check .
	lint-imports

bench:  ## every kernel beside its peers; rows go to bench/results/
	$(PYTHON) -m pytest bench --benchmark-only

.PHONY: check-aims
check-aims:  ## what falls short of its aim in the newest rows of every device
	$(PYTHON) bench/check.py

aot:  ## compile every shipped Triton kernel for sm_80, sm_90 and sm_100, no GPU needed; bench/results/aot.json
	$(PYTHON) bench/aot.py

floors:  ## what the GPU kernels must take at least, counted from their machine code, no GPU needed; bench/results/floors.json
	$(PYTHON) bench/floors.py

HUB ?= build/hub
hub:  ## the operators as a kernel of Hugging Face's `kernels`, in HUB=build/hub
	$(PYTHON) -m granvit_kernels.hub --output $(HUB)

.PHONY: docs
docs: build/mermaid.min.js  ## the documentation site in build/site; wants '.[docs]'; what is wrong with a link ends it
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# Draws the diagrams. Without npm the pages load it from a public server.
MERMAID = mermaid-11.17.2
build/mermaid.min.js:
	mkdir -p build
	-npm pack --silent --pack-destination build $(subst -,@,$(MERMAID)) && \
		tar -xzOf build/$(MERMAID).tgz package/dist/mermaid.min.js > $@.part && mv $@.part $@
	rm -f build/$(MERMAID).tgz

.PHONY: wheel wheel-test
wheel:  ## an sdist and a manylinux wheel for this Python in dist/; wants '.[release]'
	rm -rf build/dist && $(PYTHON) -m build --outdir build/dist
	.ci/repair build/dist/*.whl dist
	mv build/dist/*.tar.gz dist
	$(PYTHON) -m twine check --strict dist/*

wheel-test:  ## the wheel in dist/, installed and tested outside of the checkout and without a compiler
	PYTHON=$(PYTHON) CONSTRAINTS='$(CONSTRAINTS)' .ci/wheel-test

train:  ## the preset quick: both stages and a report in runs/quick, minutes on two cores
	$(PYTHON) -m granvit.train

# With a GPU: docs/gpu.md. BUDGET=... of seconds; a second call goes on with what is missing.
BUDGET ?= 480

gpu:  ## build, prove and measure on the GPU at hand, in eight minutes
	$(PYTHON) bench/gpu.py --budget $(BUDGET)

gpu-tune:  ## search launch configurations, four minutes
	$(PYTHON) bench/gpu.py --tune

gpu-train:  ## train and evaluate a model of the compact preset's shape, four minutes
	$(PYTHON) bench/gpu.py --train

gpu-wheels:  ## fetch into .whl/ what training wants, for a GPU machine without a network
	$(PYTHON) bench/wheels.py

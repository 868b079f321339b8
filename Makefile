# What people type every day. PYTHON=... picks an interpreter; CONSTRAINTS= (empty) takes a CUDA build of torch.
PYTHON ?= python
CONSTRAINTS ?= -c constraints-cpu.txt

.PHONY: install test lint bench train aot floors gpu gpu-build gpu-test gpu-sanitize gpu-bench

install:  ## build the kernels and install everything that development needs
	$(PYTHON) -m pip install $(CONSTRAINTS) -e '.[dev]'

test:
	$(PYTHON) -m pytest

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

train:  ## the smoke preset: both stages and a report in runs/smoke, minutes on two cores
	$(PYTHON) -m granvit.train

# With a GPU: each target runs alone, ends within minutes, goes on where it stopped and downloads nothing.
gpu: gpu-build gpu-test gpu-sanitize gpu-bench  ## build with what is installed, test, sanitize and measure on a GPU

gpu-build:
	@$(PYTHON) -c 'import torch; print("torch", torch.__version__, "sees", \
	  torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"); \
	  raise SystemExit(not torch.cuda.is_available())' \
	  || { echo "make gpu: no GPU to be used here, so nothing was built, tested or measured"; exit 1; }
	$(PYTHON) -m pip install -e . --no-build-isolation --no-deps --no-index
	$(PYTHON) -m granvit_kernels

gpu-test:  # --ff: what failed last time comes first
	$(PYTHON) -m pytest tests/kernels tests/model/test_vision.py tests/model/test_question_attention.py -m gpu --ff

gpu-sanitize:
	$(PYTHON) bench/sanitize.py

gpu-bench:
	$(PYTHON) -m pytest bench/test_gpu.py --benchmark-only
	$(PYTHON) -m pytest bench/test_gpu_training.py
	$(PYTHON) bench/readme.py

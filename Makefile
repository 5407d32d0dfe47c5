# make demo   train a miniature Pythia on real text, evaluate its checkpoints, draw curves and losses
# make suite  the paper in miniature: three sizes, five seeds, all studies, one report (45 minutes)
# make test   run the test suite in two processes (about 3 minutes)
# make proofs run the long proofs and the benchmarks
# make parity ask lm-evaluation-harness itself again (6 minutes; real documents if PYTHIA_DATA is their folder) and compare
# Each makes .venv and installs what it needs. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
PY = .venv/bin/python

# glibc then keeps freed memory for the next step, as CUDA's allocator does: 7 % of a step on a CPU.
demo suite: export MALLOC_MMAP_MAX_ = 0
demo suite: export MALLOC_TRIM_THRESHOLD_ = 2147483647

.PHONY: demo suite test proofs parity tokenizer

demo: .venv/requirements-dev 20B_tokenizer.json data/demo/train.idx data/demo/heldout.idx
	$(PY) data.py order --data=data/demo/train --steps=512 --batch_size=4 --seq_length=256
	$(PY) train.py configs/mini.py --out_dir=runs/mini
	$(PY) eval.py --model=runs/mini --steps=all --tasks=heldout --docs=data/demo/docs --output=runs/mini/results.csv
	$(PY) eval.py sample --model=runs/mini --steps=1,64,512 --prompt="And the LORD said unto"
	$(PY) plots.py training --run=runs/mini --results=runs/mini/results.csv --output=runs/mini/curves.png
	$(PY) eval.py losses --model=runs/mini --rows=1024:1032 --output=runs/mini/losses
	$(PY) eval.py losses --model=runs/mini --data=data/demo/heldout --rows=0:8 --output=runs/mini/losses_heldout
	$(PY) plots.py window --losses=runs/mini/losses.npy,runs/mini/losses_heldout.npy --output=runs/mini/window.html
	@echo
	@echo "The corpus is data/demo/train.jsonl, its tokens data/demo/train.bin, the checkpoints runs/mini/step*,"
	@echo "the log runs/mini/metrics.csv, the evaluations runs/mini/results.csv, the curves runs/mini/curves.png."
	@echo "Open runs/mini/window.html in a browser: every token of eight rows it was trained on, and of eight it was"
	@echo "not, coloured by its loss at each checkpoint. Try:"
	@echo "  $(PY) batch_viewer.py view --data=data/demo/train --steps=512 --batch_size=4 --seq_length=256 --step=100"
	@echo "  $(PY) eval.py sample --model=runs/mini --prompt='In the beginning'"
	@echo "  $(PY) train.py configs/mini.py --out_dir=runs/wide --d_model=128 --learning_rate=3e-3"

suite: .venv/requirements-dev
	$(PY) -m studies.suite

test: .venv/requirements-dev 20B_tokenizer.json
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

proofs: .venv/requirements-dev 20B_tokenizer.json
	$(PY) -m pytest -q tests -m proof
	$(PY) bench.py train --size=14m
	$(PY) bench.py train --size=70m

parity: .venv/requirements-dev 20B_tokenizer.json
	$(PY) -m pip install --quiet --disable-pip-version-check lm_eval==0.4.13 accelerate==1.15.0
	$(PY) tests/lm_eval_golden.py tests/lm_eval_golden.json
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target=.venv/lm_eval_v03 lm_eval==0.3.0
	PYTHONPATH=.venv/lm_eval_v03 $(PY) tests/lm_eval_golden.py tests/lm_eval_v03_golden.json "$$PYTHIA_DATA"
	$(PY) -m pytest -q tests/test_parity.py

tokenizer: 20B_tokenizer.json

20B_tokenizer.json: | .venv/requirements-dev
	$(PY) -m studies.corpus tokenizer

data/demo/train.jsonl: | .venv/requirements-dev
	$(PY) -m studies.corpus demo

data/demo/train.idx: data/demo/train.jsonl 20B_tokenizer.json
	$(PY) prepare.py tokenize --input=data/demo/train.jsonl --output=data/demo/train

data/demo/heldout.idx: data/demo/train.jsonl 20B_tokenizer.json
	$(PY) prepare.py tokenize --input=data/demo/docs/heldout/test.jsonl --output=data/demo/heldout

.venv/requirements-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

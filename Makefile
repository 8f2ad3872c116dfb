# Everything a user types. `make demo` and `make test` need Python 3.10-3.13 and make, nothing else.

PYTHON ?= python3
RECIPE ?= recipes/dates.yaml
# Folder of the text, instead of the recipe's own: make demo RECIPE=... DATA=/path/to/text
DATA ?=
# Keys of the recipe to change: make train SET="training.seed=2 training.epochs=5"
SET ?=
# Further options of the verb train: make train TRAIN="--accept-changes"
TRAIN ?= $(if $(FRESH),--fresh)
# cpu: torch's CPU build, without gigabytes of CUDA packages. cuda: the build for NVIDIA GPUs.
TORCH ?= cpu
PORT ?= 8080
# Folders of trained runs that answer as one: make ensemble RUN=runs/all MEMBERS="runs/a runs/b"
MEMBERS ?=
OUT ?= $(RUN)/distilled
URL ?= http://127.0.0.1:$(PORT)
TEXT ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(TORCH)
NAME := $(shell sed -n 's/^name: *\([A-Za-z0-9._-]*\).*/\1/p' $(RECIPE) 2>/dev/null)
RUN ?= runs/$(or $(NAME),none)
ARCHIVE := $(RUN)/archive/seq2seq.mar
STORE := model-store
TRAINING = $(BIN)/python -m training
OPTIONS = $(RECIPE) --run $(RUN) $(if $(DATA),--data $(DATA)) $(foreach change,$(SET),--set $(change))
TORCH_VERSION := $(shell sed -n 's/^ *"torch==\([^"]*\)".*/\1/p' pyproject.toml)
HANDLER := $(shell find handler -name '*.py' -o -name '*.cu' -o -name 'model-config.yaml')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: force help setup prepare train evaluate export archive mar ensemble distill diversify report serve translate demo test lint k8s-tools image image-test loadtest autoscale bench paper clean

help:  ## list the verbs
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything pinned in pyproject.toml (TORCH=cuda for GPUs)

# The CPU build of torch comes from wherever pip is pointed, or from PyTorch's own index, which uv
# knows by name. Only where neither has one is it the default build. Going from one build to the
# other takes the first one out: to pip they are the same version.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/ready-*
	@echo "installing torch $(TORCH_VERSION) ($(TORCH) build)"
ifeq ($(TORCH),cpu)
	@$(BIN)/pip install -q torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	|| { $(BIN)/pip install -q uv==0.13.9 && \
	     $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu torch==$(TORCH_VERSION) 2>/dev/null; } \
	|| $(BIN)/pip install -q torch==$(TORCH_VERSION)
else
	@$(BIN)/pip uninstall -q -y torch 2>/dev/null; $(BIN)/pip install -q torch==$(TORCH_VERSION)
endif
	@echo "installing the rest"
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

force:

$(RECIPE):
	@echo "RECIPE: $@ does not exist; there are: $(wildcard recipes/*.yaml)" >&2; exit 1

# What SET and DATA were when a run was last made with any. Others make its files again, and each verb
# says what it refuses to change; none, as in `make evaluate` after `make train SET=...`, change nothing.
# A verb that finds all done leaves its file as old as it was: hence `touch`.
GIVEN := $(strip $(SET) $(DATA))
export GIVEN
given := $(if $(GIVEN),$(RUN)/given)
$(RUN)/given: force
	@mkdir -p $(@D) && { printf '%s\n' "$$GIVEN" | cmp -s - $@ || printf '%s\n' "$$GIVEN" > $@; }

prepare: $(RUN)/data/report.json  ## clean the text, train the tokenizers
$(RUN)/data/report.json: $(RECIPE) $(given) | $(READY)
	$(TRAINING) prepare $(OPTIONS)
	@touch $@

train: $(RUN)/training.json  ## learn the weights; goes on where a stopped run was (FRESH=1: anew)
$(RUN)/training.json: $(RUN)/data/report.json $(given) $(if $(TRAIN),force)
	$(TRAINING) train $(OPTIONS) $(TRAIN)
	@touch $@

evaluate: $(RUN)/scores.json  ## score the best weights on validation and test text
$(RUN)/scores.json: $(RUN)/training.json $(given)
	$(TRAINING) evaluate $(OPTIONS)

export: $(RUN)/model.pt  ## write model.pt (TorchScript)
$(RUN)/model.pt: $(RUN)/scores.json $(given)
	$(TRAINING) export $(OPTIONS)

$(ARCHIVE): $(RUN)/model.pt $(HANDLER)
	$(TRAINING) archive $(OPTIONS) --store $(@D)

# Each run keeps its archive; the store holds the one that is served.
mar: $(ARCHIVE)  ## build model-store/seq2seq.mar for TorchServe
	@mkdir -p $(STORE)
	@cmp -s $(ARCHIVE) $(STORE)/seq2seq.mar || { \
	  cp $(ARCHIVE) $(STORE)/.new && mv $(STORE)/.new $(STORE)/seq2seq.mar && \
	  cp $(ARCHIVE).sha256 $(STORE)/seq2seq.mar.sha256 && echo "$(STORE)/seq2seq.mar"; }

archive: mar  ## another name for mar, after its verb

serve: | $(READY)  ## serve model-store/seq2seq.mar until Ctrl-C (PORT=0: free ports)
	@exec $(BIN)/python -m server serve --model-store $(STORE) $(if $(filter 0,$(PORT)),--free-ports,--port $(PORT))

ensemble: | $(READY)  ## MEMBERS="runs/a runs/b" RUN=runs/all: several trained runs as one
	$(TRAINING) ensemble $(OPTIONS) --members $(MEMBERS)

distill: $(RUN)/training.json  ## text with the run's translations as targets, for a student (OUT=folder)
	$(TRAINING) distill $(OPTIONS) --out $(OUT)

diversify: | $(READY)  ## your text, and what teachers of both directions make of it, for a student (RUN=folder)
	$(TRAINING) diversify $(OPTIONS)

report: | $(READY)  ## write RUN/report/index.html, also of a run that is still training
	$(TRAINING) report $(OPTIONS)

translate: | $(READY)  ## TEXT="...": translate with a running server (URL=http://127.0.0.1:8080)
	@$(BIN)/python -m server translate --url $(URL) $(if $(TEXT),"$$TEXT")
export TEXT

demo: mar  ## train, export, archive, serve and translate over REST, from nothing
	@cat $(RUN)/training.json $(RUN)/scores.json
	@$(BIN)/python -m server.demo $(STORE) $(RUN)/data/test.source $(RUN)/data/test.target

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
	$(BIN)/python -m bench.serving $(STORE) $(RUN)/data/test.source

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
	@$(BIN)/locust -f bench/locustfile.py --headless --only-summary -H $(URL) -u $(USERS) -r $(USERS) -t $(TIME) $(LOADTEST)

autoscale: | $(READY)  ## simulate the autoscaler: a table, and pictures in build/autoscale (minutes)
	$(BIN)/python -m bench.autoscale --out build/autoscale

paper: | $(READY)  ## DATA=/path/to/multi30k: what the paper compared, trained and compared (hours; goes on)
	$(BIN)/python -m bench.paper --data "$(DATA)"

clean:  ## remove what was built and trained; the environment stays
	rm -rf runs $(STORE) build

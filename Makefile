# Concord's commands; `make help` lists them. What is fetched goes to $(CONCORD_CACHE), outside the checkout.
# A LIBTORCH in the environment is used instead of fetching one.

CONCORD_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/concord
CONCORD_MINILM ?= $(CONCORD_CACHE)/backbones/all-minilm-l6-v2
CONCORD_EFFICIENTNET ?= $(CONCORD_CACHE)/backbones/efficientnet-lite0
CONCORD_BRISQUE ?= $(CONCORD_CACHE)/backbones/brisque
export CONCORD_CACHE CONCORD_MINILM CONCORD_EFFICIENTNET CONCORD_BRISQUE

CARGO ?= cargo
NEXTEST_PROFILE ?= default
# cargo-nextest where it is installed, `cargo test` elsewhere; nextest leaves doc tests out.
RUN_TESTS = $(if $(shell command -v cargo-nextest),nextest run --profile $(NEXTEST_PROFILE),test --lib --bins --tests)

.PHONY: help demo artaug-demo artaug-seeds test interop bench experiment check libtorch data backbone icons vision binaries release

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

demo: libtorch data release ## runs a whole federation of six silos and shows the result
	python3 deploy/demo/run.py

artaug-demo: libtorch backbone icons vision release ## runs a whole ArtAug job on the embedded base model and shows the result
	python3 deploy/artaug/demo.py

artaug-seeds: libtorch backbone icons vision release ## the same on five seeds: do the control arms stay below?
	python3 deploy/artaug/seeds.py

test: libtorch backbone icons vision binaries ## builds and passes every test
	$(CARGO) $(RUN_TESTS) --workspace --locked
	$(CARGO) test --doc --workspace --locked
	python3 -m unittest discover --start-directory deploy/demo/tests
	python3 -m unittest discover --start-directory deploy/experiment/tests
	python3 -m unittest discover --start-directory deploy/artaug/tests

interop: libtorch backbone vision binaries ## compares with Python's torch, transformers, adapters and diffusers
	deploy/interop/run.sh

experiment: libtorch data release ## FedMCP against its baselines; QUICK=1 for five minutes
	python3 deploy/experiment/run.py $(if $(QUICK),--quick)

bench: libtorch data release ## measures coordination, training, a daemon's memory and the text-to-image engine; beside the peers where their scripts are (docs/benchmarks.md)
	deploy/bench/coordination.sh
	deploy/bench/training.sh
	deploy/bench/memory.sh
	deploy/interop/diffusion.sh --bench

check: libtorch ## rustfmt, clippy, rustdoc, cargo-deny: without a warning
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items --locked
	deny=$$(.ci/cargo-deny) && "$$deny" --workspace --locked check bans licenses sources

libtorch: ## fetches libtorch
	deploy/libtorch/fetch.sh

data: ## fetches the backbone and the demo's data
	python3 deploy/demo/fetch.py

backbone: ## fetches the backbone alone
	python3 deploy/demo/fetch.py --only backbone

icons: ## fetches the icon sets
	python3 deploy/artaug/fetch.py --only fluent,noto,twemoji

vision: ## fetches the image classifier and the table of BRISQUE
	python3 deploy/artaug/fetch.py --only efficientnet,brisque

binaries: libtorch ## builds the programs for the tests
	$(CARGO) build --workspace --bins --locked

release: libtorch ## builds the programs for use
	$(CARGO) build --workspace --bins --release --locked

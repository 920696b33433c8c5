# The project's doors. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

TARGET := x86_64-unknown-linux-musl
TESTBED := tests/testbed
export CC_x86_64_unknown_linux_musl := musl-gcc

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  STACK=full|slurm|local forces a stack for demo, test, up; HPC_SUITE=trixie|sid chooses Slurm 24.11 or 26.05 (bookworm,"
	@echo "  22.05, has no Apptainer: for record-slurm.sh alone); KUBE_VERSION=1.36|1.34 chooses Kubernetes (1.34 is built beside"
	@echo "  it: 7 minutes, once); KUBECONFIG=… uses your cluster instead; QUICK=1 makes bench short"

.PHONY: tools
tools:
	@$(TESTBED)/build-tools.sh

.PHONY: build
build: tools ## the static binaries knoc-agent, knocctl, knoc-kubelet, once, for demo, tests and packages alike
	@cargo build --release --target $(TARGET) -p knoc-agent -p knoc-kubelet -p knocctl

.PHONY: prepare
prepare:
	@$(TESTBED)/prepare.sh

.PHONY: check
check: ## formatting, lints, documentation, unit tests, dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
	cargo test -q --workspace --exclude knoc-tests
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; \
	   if cargo deny fetch db 2>/dev/null; then cargo deny check advisories; else echo "the advisory database cannot be reached: advisories were not checked"; fi; \
	 else echo "cargo-deny is missing, dependencies were not checked; install it with: cargo install --locked cargo-deny"; fi

.PHONY: fmt
fmt: ## formats the Rust code
	cargo fmt --all

.PHONY: test
test: prepare ## all tests that this machine can carry, ending with a table by level
	@tests/run.sh

.PHONY: test-1.34
test-1.34: ## the same on Kubernetes 1.34, which is built beside 1.36 once (7 minutes); no part of every CI run
	@$(MAKE) test KUBE_VERSION=1.34

.PHONY: bench
bench: up ## T1 to T4 and streams beside their floors (docs/performance.md)
	@$(TESTBED)/sweep.sh
	@eval "$$($(TESTBED)/env.sh)"; cargo run --release --target $(TARGET) -p knoc-tests --bin knoc-bench -- $(if $(QUICK),--quick)

.PHONY: demo
demo: prepare ## brings the fullest stack up and runs a pod on it
	@tests/demo.sh

.PHONY: demo-transcript
demo-transcript: prepare ## the same, written to docs/demo-transcript.md
	@tests/demo.sh --transcript docs/demo-transcript.md

.PHONY: interop
interop: up ## every client against the kubelet's API, written to docs/interop.md
	@$(TESTBED)/interop.sh
	@eval "$$($(TESTBED)/env.sh)"; KNOC_INTEROP_PAGE=$(CURDIR)/docs/interop.md cargo test -p knoc-tests --test l3_interop -- --test-threads=4

.PHONY: up
up: prepare ## the stack, brought up and left running; again: starts what does not run
	@$(TESTBED)/up.sh

.PHONY: down
down: ## ends what up started
	@$(TESTBED)/down.sh

.PHONY: env
env: ## shell exports for outside tools: eval "$(make -s env)"
	@$(TESTBED)/env.sh

.PHONY: agent
agent: build ## the static knoc-agent and its tarball
	@packaging/agent/build-tarball.sh

.PHONY: container
container: build ## the kubelet's OCI image, no engine needed
	@packaging/kubelet/build-image.sh

.PHONY: chart
chart: ## checks the chart and renders the plain manifests of deploy/
	@PATH="$$PATH:$${KNOC_BED:-/var/lib/knoc-testbed}/kube/bin" deploy/render.sh

.PHONY: skaffold
skaffold: build ## builds and deploys the kubelet with skaffold
	@command -v skaffold >/dev/null || { echo "skaffold is missing; see https://skaffold.dev/docs/install"; exit 1; }
	skaffold run -f deploy/skaffold.yaml

.PHONY: clean
clean: down ## ends the stack, removes what was built (the test bed's caches stay: rm -r $KNOC_BED)
	cargo clean

# The project's targets. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

TARGET := x86_64-unknown-linux-musl
TESTBED := tests/testbed
BUILT := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/$(TARGET)
BINARIES := knoc-agent knocctl knoc-kubelet
export CC_x86_64_unknown_linux_musl := musl-gcc
# Small, and the same from every folder: relative relocations are packed, there are no tables for unwinding, and no path of this machine
# is named. The linker runs in this folder.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS := -Clink-arg=-Wl,-z,pack-relative-relocs \
	-Clink-arg=-Wl,-T,proto/memory/no-unwind-tables.ld \
	--remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo --remap-path-prefix=$(CURDIR)=/knoc

.PHONY: help
help: ## lists all targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  STACK=full|slurm|local selects the stack of demo, test and up; HPC_SUITE=trixie|sid selects Slurm 24.11 or 26.05 (bookworm,"
	@echo "  22.05, has no Apptainer and serves only record-slurm.sh); KUBE_VERSION=1.36|1.34 selects Kubernetes (1.34 is built once in"
	@echo "  addition, in 7 minutes); KUBECONFIG=… uses your cluster instead; QUICK=1 shortens bench;"
	@echo "  PROFILE=direct|ssh-only|outbound-only|proxy-only|isolated|two-logins says how up and test reach the agent (any but direct:"
	@echo "  test runs only the core of level 3, and with SMOKE=1 only one pod)"

.PHONY: tools
tools:
	@$(TESTBED)/build-tools.sh

.PHONY: build
build: tools ## builds the static binaries knoc-agent, knocctl and knoc-kubelet for packages, the demo and the benchmark
	@cargo build --release --target $(TARGET) -p knoc-agent -p knoc-kubelet -p knocctl

.PHONY: build-tested
build-tested: tools ## builds the same with crash points (ADR 0080) for the tests, in a folder of their own
	@cargo build --release --target $(TARGET) -p knoc-agent -p knoc-kubelet -p knocctl --features knoc-agent/crash-points,knoc-kubelet/crash-points
	@mkdir -p $(BUILT)/tested
	@install -m 755 $(BINARIES:%=$(BUILT)/release/%) $(BUILT)/tested

# The test bed runs the binaries with crash points, except where their speed or their look is shown.
demo demo-transcript bench links ssh-transcript newcomer-transcript: export KNOC_BIN ?= $(BUILT)/release

.PHONY: prepare
prepare:
	@$(TESTBED)/prepare.sh

.PHONY: check
check: ## checks formatting, lints, documentation and dependencies, and runs the unit tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
	cargo test -q --workspace --exclude knoc-tests
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; \
	   if cargo deny fetch db 2>/dev/null; then cargo deny check advisories; else echo "advisories were not checked: the advisory database cannot be reached"; fi; \
	 else echo "dependencies were not checked: cargo-deny is missing; install it with: cargo install --locked cargo-deny"; fi

.PHONY: fmt
fmt: ## formats the Rust code
	cargo fmt --all

.PHONY: test
test: prepare ## runs all tests that this machine supports; ends with a table of results by level
	@tests/run.sh

.PHONY: test-1.34
test-1.34: ## runs the same tests on Kubernetes 1.34, which is built once (7 minutes); not part of every CI run
	@$(MAKE) test KUBE_VERSION=1.34

.PHONY: bench
bench: up ## measures T1 to T4 and streams, and their lower bounds (docs/performance.md)
	@$(TESTBED)/sweep.sh
	@eval "$$($(TESTBED)/env.sh)"; cargo run --release --target $(TARGET) -p knoc-tests --bin knoc-bench -- $(if $(QUICK),--quick)

.PHONY: links
links: prepare ## measures each way to the agent on its profile; writes the table in docs/guide/links.md
	@$(TESTBED)/links.sh

.PHONY: sealed-secrets
sealed-secrets: prepare ## runs a kubelet with Secrets that sealed-secrets has created (docs/guide/links.md)
	@$(TESTBED)/sealed-secrets.sh

.PHONY: argo
argo: up ## runs Argo Workflows: the examples in deploy/examples/argo, and 200 steps beside 200 plain pods (docs/guide/argo.md)
	@trap '$(TESTBED)/argo.sh down' EXIT; $(TESTBED)/argo.sh up; eval "$$($(TESTBED)/env.sh)"; \
	   cargo test -p knoc-tests --test l3_argo -- --test-threads=2 --skip two_hundred; \
	   cargo test -p knoc-tests --test l3_argo -- --nocapture two_hundred

.PHONY: ray
ray: up ## runs a Ray cluster whose pods have addresses of their own; downloads 72 MB once (docs/guide/networks.md)
	@eval "$$($(TESTBED)/env.sh)"; cargo test -p knoc-tests --test l3_ray

.PHONY: charts
charts: up ## runs the pods of ten well-known charts; writes the table in docs/guide/charts.md (images are made once, about 10 minutes)
	@trap '$(TESTBED)/charts.sh down' EXIT; $(TESTBED)/charts.sh up; eval "$$($(TESTBED)/env.sh)"; \
	   export KNOC_CHARTS_PAGE=$(CURDIR)/docs/guide/charts.md code=0; \
	   cargo test -p knoc-tests --test l3_charts -- --test-threads=2 --skip several_pods || code=$$?; \
	   cargo test -p knoc-tests --test l3_charts -- --test-threads=1 several_pods || code=$$?; exit $$code

.PHONY: large-image
large-image: up ## pulls an image of 5 GB in 20 layers beside other pods: its Events, the agent's memory; needs 12 GB of disk
	@trap '$(TESTBED)/large-image.sh down' EXIT; $(TESTBED)/large-image.sh up; eval "$$($(TESTBED)/env.sh)"; \
	   cargo test -p knoc-tests --test l3_large_image -- --nocapture

.PHONY: ssh-transcript
ssh-transcript: prepare ## goes from an SSH login to a pod's log, with times; writes docs/ssh-transcript.md
	@$(TESTBED)/ssh-transcript.sh

.PHONY: newcomer-transcript
newcomer-transcript: prepare ## follows the guide in each role, with times; writes docs/newcomer-transcript.md
	@$(TESTBED)/newcomer.sh

.PHONY: demo
demo: prepare ## starts the fullest stack that this machine supports and runs a pod on it
	@tests/demo.sh

.PHONY: demo-transcript
demo-transcript: prepare ## runs the demo and writes its output to docs/demo-transcript.md
	@tests/demo.sh --transcript docs/demo-transcript.md

.PHONY: interop
interop: up ## tests every client against the kubelet's API; writes docs/interop.md
	@$(TESTBED)/interop.sh
	@eval "$$($(TESTBED)/env.sh)"; KNOC_INTEROP_PAGE=$(CURDIR)/docs/interop.md cargo test -p knoc-tests --test l3_interop -- --test-threads=4

.PHONY: conformance
conformance: up ## runs the upstream suite; writes docs/conformance.md: LIST=A|B|FILE, FOCUS='words|words', ONLY=new|failed, MINUTES=N, NODES=exclusive
	@NODES=$(NODES) $(TESTBED)/conformance/run.sh $(if $(FOCUS),--focus '$(FOCUS)') $(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES)) \
	   $(if $(SIDE),--side $(SIDE)) $(if $(LIMIT),--limit $(LIMIT)) $(or $(LIST),A)

.PHONY: up
up: prepare ## starts the parts of the stack that are not running, and leaves them running
	@$(TESTBED)/up.sh

.PHONY: down
down: ## stops what `make up` started
	@$(TESTBED)/down.sh

.PHONY: env
env: ## prints shell exports for other tools: eval "$(make -s env)"
	@$(TESTBED)/env.sh

.PHONY: agent
agent: build ## builds the static knoc-agent and its tarball
	@packaging/agent/build-tarball.sh

.PHONY: container
container: build ## builds the kubelet's OCI images, plain and with OpenSSH, without a container engine
	@packaging/kubelet/build-image.sh
	@packaging/kubelet/build-image.sh --ssh

.PHONY: release
release: build ## collects a release in target/dist/release (packages, images, chart, list of crates, licences, checksums); publishes nothing
	@packaging/release.sh

.PHONY: chart
chart: ## checks the chart and renders the plain manifests in deploy/
	@PATH="$$PATH:$${KNOC_BED:-/var/lib/knoc-testbed}/kube/bin" deploy/render.sh

.PHONY: skaffold
skaffold: build ## builds and deploys the kubelet with skaffold
	@command -v skaffold >/dev/null || { echo "skaffold is missing; see https://skaffold.dev/docs/install"; exit 1; }
	skaffold run -f deploy/skaffold.yaml

.PHONY: clean
clean: down ## stops the stack and removes the build (keeps the test bed's caches; to remove them: rm -r $KNOC_BED)
	cargo clean

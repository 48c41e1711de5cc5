# make help lists the targets.

VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME  ?= 10s
BENCH     ?= .
BENCHTIME ?= 1s

LDFLAGS := -s -w -X main.version=$(VERSION)
# The packages whose mutants "make mutate" makes.
MUTATE  ?= bundle cache renew internal/server/keyset internal/server/ledger

LINT    := go tool -modfile=tools/go.mod golangci-lint

.DEFAULT_GOAL := build

# What a benchmark says is shown and kept, and its failure is make's.
SHELL       := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.PHONY: build
build: ## static binaries of every command, in bin/
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: man
man: build ## manual pages of the programs, in bin/man
	@mkdir -p bin/man
	bin/agent man > bin/man/renewd-agent.8
	bin/server man > bin/man/renewd-server.8
	bin/keysetctl man > bin/man/keysetctl.1

.PHONY: check
check: ## what CI runs: fuzzing for a minute, lint, all tests
	$(MAKE) fuzz FUZZTIME=2s
	$(MAKE) lint test

# test/system and deploy mostly wait, so they run beside internal/agent, which takes the
# most of a processor. For the same reason three packages run at a time on two processors.
.PHONY: test
test: ## all tests with the race detector; several minutes, and a slow machine may take longer
	go test -race -timeout 30m -p $$(( ($$(nproc) * 3 + 1) / 2 )) ./test/system ./internal/agent ./deploy ./...

.PHONY: lint
lint: ## formatting, vet, staticcheck, import rules and more (.golangci.yml)
	$(LINT) run ./...

.PHONY: fmt
fmt: ## format the code
	$(LINT) fmt ./...

.PHONY: proto
proto: ## internal/api from renewd.proto; needs protoc (Debian: protobuf-compiler)
	@mkdir -p bin/proto
	GOBIN=$(CURDIR)/bin/proto go install -modfile=tools/go.mod \
		google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH=$(CURDIR)/bin/proto:$$PATH protoc -I internal/api --go_out=internal/api --go_opt=paths=source_relative \
		--go-grpc_out=internal/api --go-grpc_opt=paths=source_relative renewd.proto

.PHONY: cover
cover: ## what of the code the tests run, by function, into bin/cover.txt and bin/cover.html
	@mkdir -p bin
	go test -timeout 30m -coverpkg ./... -coverprofile bin/cover.out ./...
	go tool cover -func bin/cover.out > bin/cover.txt
	go tool cover -html bin/cover.out -o bin/cover.html
	@tail -n 1 bin/cover.txt

.PHONY: mutate
mutate: ## do the tests fail with the code broken? Hours; MUTATE=packages chooses. The reports are in bin/mutants
	tools/mutate $(MUTATE)
	go test -v -count=1 -run TestSurvivors ./test/mutants -reports $(CURDIR)/bin/mutants

.PHONY: vuln
vuln: ## known vulnerabilities in what the code calls; asks vuln.go.dev
	go tool -modfile=tools/go.mod govulncheck ./...

.PHONY: spire
spire: ## spire-server and spire-agent, as tools/spire/go.mod pins them, in bin/spire; a quarter of an hour the first time
	@mkdir -p bin/spire
	go -C tools/spire build -o $(CURDIR)/bin/spire/ tool

.PHONY: test-spire
test-spire: spire ## the rotation of a SPIRE cluster while a server is frozen and replaced; CONTRIBUTING.md says what it needs
	SPIRE_BIN_DIR=$(CURDIR)/bin/spire SPIRE_CLUSTER_TEST=1 go test -count=1 -timeout 30m -run TestReplacedServer ./test/system

# The version of Kubernetes, as its programs report it.
KUBERNETES = $$(go -C tools/kubernetes list -m -f '{{.Version}}' k8s.io/kubernetes)

.PHONY: k8s
k8s: ## Kubernetes, as tools/kubernetes/go.mod pins it, in bin/kubernetes; a quarter of an hour the first time
	@mkdir -p bin/kubernetes
	CGO_ENABLED=0 go -C tools/kubernetes build -trimpath -o $(CURDIR)/bin/kubernetes/ -ldflags "-s -w \
		-X k8s.io/component-base/version.gitVersion=$(KUBERNETES) \
		-X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$$(echo $(KUBERNETES) | cut -d. -f2)" tool

.PHONY: test-k8s
test-k8s: k8s ## the programs in a real cluster of one node, as root; CONTRIBUTING.md says what it needs
	KUBERNETES_BIN_DIR=$(CURDIR)/bin/kubernetes go test -count=1 -timeout 30m ./test/kubernetes

.PHONY: bench
bench: ## benchmarks of the packages, into BENCHMARKS.txt; BENCH=regexp chooses, BENCHTIME=duration sets the length
	go test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -benchmem \
		$$(go list ./... | grep -v /test/figures) | grep -v '^PASS$$\|no test files' | tee BENCHMARKS.txt

.PHONY: figures
figures: ## the whole daemon measured, into FIGURES.txt, in a quarter of an hour; BENCH=regexp chooses, SPIRE_BIN_DIR=folder measures its spire-agent beside it
	go test -run '^$$' -bench '$(BENCH)' -benchtime 1x -timeout 1h ./test/figures | tee FIGURES.txt

.PHONY: fuzz
fuzz: ## every fuzz target in turn, FUZZTIME each
	@tools/fuzz $(FUZZTIME)

.PHONY: demo
demo: ## a whole rotation, watched live in one process
	go run ./cmd/demo

.PHONY: clean
clean: ## remove what build made
	rm -rf bin

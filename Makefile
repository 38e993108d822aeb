# `make help` lists the targets. All of them work from a fresh checkout.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# A checkout that belongs to another user makes git refuse, and Go's own
# stamping fail with it; the version is given by -ldflags instead.
export GOFLAGS := -buildvcs=false $(filter-out -buildvcs=%,$(GOFLAGS))
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/quarry
LINT_VERSION := v2.15.0
LINT := $(CACHE)/bin/golangci-lint-$(LINT_VERSION)

# Packages whose tests are long and have targets of their own.
LONG := /test/(sanity|crash|demo|e2e)(/|$$)

.PHONY: help build image test lint demo sanity crash bench lab e2e generate

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build quarry and kubectl-quarry into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/quarry ./cmd/kubectl-quarry

image: ## build the container image without any registry, into bin/quarry.tar; needs root
	mkdir -p bin
	hack/image --version '$(VERSION)' --output bin/quarry.tar

test: ## run the tests of every package but the long suites; as root, or the file system tests are skipped
	hack/deps test
	go vet ./...
	packages=$$(go list ./... | grep -Ev '$(LONG)'); go test -count=1 -timeout 30m $$packages
	cd test/chart && go vet . && go test -count=1 .

lint: $(LINT) ## check style and the import rules with golangci-lint, and the types for arm64
	go run ./test/typecheck arm64 ./cmd/... ./pkg/...
	$(LINT) run ./...
	cd test/chart && $(LINT) run --config ../../.golangci.yml .

demo: build ## show every volume operation on ext4 and XFS, step by step; needs root
	hack/deps demo
	go run ./test/demo -bin bin

sanity: ## run csi-sanity, nothing skipped, on every engine and file system; needs root
	hack/deps test
	go test -count=1 -v -timeout 60m ./test/sanity/...

crash: ## run the crash matrix, the random model test and kill -9 under load; needs root
	hack/deps test
	QUARRY_CRASH=long QUARRY_KILLS=200 go test -p 1 -count=1 -timeout 240m ./test/crash/...

bench: build ## measure beside the bare system calls, cp, qemu-img and bare devices; needs root
	hack/deps bench
	for program in $$(go list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' ./test/bench/...); do \
	  echo "== $$program"; go run $$program; done

lab: ## run the *_lab_test.go files in QEMU with a stock distribution kernel
	hack/lab/selftest
	hack/lab/gotest --time 36000

e2e: ## a real Kubernetes on this machine: image, chart, Quarry's scenarios, the commands of docs/, the upstream suite; needs root
	hack/e2e scenarios docs upstream
	hack/e2e lab

generate: ## make the generated files again; leaves a clean tree clean
	go generate ./...
	cd test/chart && go generate .

# Built outside the repository, once for every checkout. GOBIN takes one name, so
# it is built aside and moved into place under its version.
$(LINT):
	mkdir -p $(CACHE)/bin
	aside=$$(mktemp -d $(CACHE)/bin/build.XXXXXX); trap 'rm -rf "$$aside"' EXIT; \
	  GOBIN=$$aside go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION); \
	  mv "$$aside/golangci-lint" $@

# Two commands: `make run` and `make test`. The rest are parts of them, and longer runs.

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0
export GOFLAGS ?= -trimpath
FUZZTIME ?= 20s

# Tests that run whole clusters, one after another: they share the machine.
E2E = ./test/torture ./test/canary ./test/fencing ./test/badinput ./test/oracle ./test/pagecheck ./test/smoke ./test/survive ./test/cloudkms ./test/fips ./test/memory ./test/keyloss ./test/rotation ./test/keycli ./test/shredding ./test/revocation
UNIT = $(shell go list ./... | grep -v -E '/test/(torture|canary|fencing|badinput|oracle|pagecheck|smoke|survive|cloudkms|fips|memory|keyloss|rotation|keycli|shredding|revocation)$$')

# What encrypts, and what asks a KMS, runs in Go's FIPS 140-3 mode as well; ./test/fips ./test/memory runs a cluster in it.
FIPS = ./internal/seal ./internal/keyring ./internal/dekwire ./internal/hardening ./keymgr/... ./compute/scratch ./pageserver/layer

.PHONY: run test build lint fmt vet staticcheck vuln unit fips e2e fuzz soak bench revocation clean setup-run setup-test setup-suites test-postgres

run: setup-run build ## a cluster over ./data, then psql in it
	@scripts/run.sh $(ARGS)

test: setup-test ## everything that must hold
	@scripts/test.sh

build: ## bin/holdfast
	@go build -o bin/holdfast ./cmd/holdfast

lint: fmt vet staticcheck vuln

fmt:
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "not gofmt'd:"; echo "$$out"; exit 1; }

vet:
	@go vet ./...

staticcheck:
	@go run $(STATICCHECK) ./...

vuln: ## known vulnerabilities in what is called; needs the network
	@GOVULNCHECK=$(GOVULNCHECK) scripts/vuln.sh

unit: ## tests of one package each, under the race detector
	@go run ./test/runtests unit -race -timeout 10m $(UNIT)

fips: ## the tests of what encrypts, in Go's FIPS 140-3 mode
	@GODEBUG=fips140=on go run ./test/runtests fips -count=1 -timeout 10m $(FIPS)

e2e: build ## tests of whole clusters with real PostgreSQL
	@HOLDFAST_BIN=$(CURDIR)/bin/holdfast go run ./test/runtests e2e -count=1 -p 1 -timeout 40m $(E2E)

fuzz: ## the WAL decoder and redo on damaged records, FUZZTIME each
	@for f in ./internal/walrec:FuzzScanner ./internal/walrec:FuzzParse ./pageserver/redo:FuzzApply; do \
		go test $${f%:*} -run '^$$' -fuzz "^$${f#*:}\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x || exit 1; done

soak: build ## fuzzing for HOLDFAST_FUZZ each (20m), then kills without end: HOLDFAST_SOAK=8h (default: until stopped), HOLDFAST_SEED=n
	@$(MAKE) --no-print-directory fuzz FUZZTIME=$${HOLDFAST_FUZZ:-20m}
	@HOLDFAST_SOAK=1 go test ./test/oracle -run '^TestEdges$$' -count=1 -timeout 1h
	@HOLDFAST_BIN=$(CURDIR)/bin/holdfast HOLDFAST_SOAK=$${HOLDFAST_SOAK:-forever} \
		go test ./test/torture -run '^TestTorture$$' -count=1 -v -timeout 0

test-postgres: setup-suites build ## PostgreSQL's own test suites against an endpoint; ARGS=-consistency compares each record's redo, ARGS=-verify-pages each page that leaves the local store
	@HOLDFAST_BIN=$(CURDIR)/bin/holdfast go run ./test/pgsuites $(ARGS)

bench: build ## against stock PostgreSQL; ARGS=-short for a quick look
	@HOLDFAST_BIN=$(CURDIR)/bin/holdfast go run ./test/bench $(ARGS)

revocation: build ## how long a revocation takes: 200 of each way over many nodes, 20 of a whole cluster (about 8 minutes)
	@HOLDFAST_ROUNDS=4 go test ./test/revocation -run '^TestBound$$' -count=1 -v -timeout 30m
	@HOLDFAST_BIN=$(CURDIR)/bin/holdfast HOLDFAST_ROUNDS=10 go test ./test/revocation -run '^TestBoundOfACluster$$' -count=1 -v -timeout 60m

clean:
	rm -rf bin

setup-run:
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

setup-suites:
	@scripts/setup.sh suites

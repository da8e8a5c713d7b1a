#!/usr/bin/env bash
# All of `make test`: every step runs even if an earlier one failed, and the last lines say
# what ran and how it ended.
set -uo pipefail
export HOLDFAST_REQUIRE=1 # what cannot run here has failed
out=$(mktemp)
trap 'rm -f "$out"' EXIT
passed=0 failed=0 summary=()

step() { # NAME COMMAND...
	local name=$1 began=$SECONDS status=0
	shift
	echo "--- $name"
	"$@" 2>&1 | tee "$out" || status=1
	local counts
	counts=$(grep -E "^$name: [0-9]+ passed, [0-9]+ failed" "$out" | tail -1)
	if [ -n "$counts" ]; then
		passed=$((passed + $(sed -E 's/.*: ([0-9]+) passed.*/\1/' <<<"$counts")))
		failed=$((failed + $(sed -E 's/.* ([0-9]+) failed.*/\1/' <<<"$counts")))
		summary+=("$counts")
	elif [ $status = 0 ]; then
		passed=$((passed + 1))
		summary+=("$name: $(tail -1 "$out" | grep -E '^(not run|no known)' || echo clean) in $((SECONDS - began))s")
	else
		failed=$((failed + 1))
		summary+=("$name: FAILED in $((SECONDS - began))s")
	fi
	if [ $status != 0 ] && [ -n "$counts" ] && grep -q ' 0 failed' <<<"$counts"; then
		failed=$((failed + 1)) # ended badly for another reason than a test
	fi
}

make="make --no-print-directory"
step gofmt $make fmt
step vet $make vet
step staticcheck $make staticcheck
step govulncheck $make vuln
step unit $make unit
step fips $make fips
step fuzz $make fuzz
step e2e $make e2e

echo "--- what ran"
printf '%s\n' "${summary[@]}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

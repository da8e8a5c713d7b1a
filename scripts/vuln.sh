#!/usr/bin/env bash
# govulncheck, where its database can be reached; where not it says so and lets the rest go on.
set -uo pipefail
if out=$(go run "$GOVULNCHECK" ./... 2>&1); then
	echo "no known vulnerability in what is called"
	exit 0
fi
if grep -qE 'dial tcp|no such host|i/o timeout|connection refused|proxyconnect|fetching vulnerabilities|HTTP GET' <<<"$out" && ! grep -q '^Vulnerability #' <<<"$out"; then
	echo "$out" | tail -2
	echo "not run: the vulnerability database cannot be reached from here"
	exit 0
fi
echo "$out"
exit 1

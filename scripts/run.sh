#!/usr/bin/env bash
# The cluster over ./data (or $DATA), then psql in it; leaving psql stops the cluster. Where
# there is no terminal the cluster stays in the foreground until it is told to stop.
set -euo pipefail
bin=bin/holdfast
data=${DATA:-data}

if ! { [ -t 0 ] && [ -t 1 ]; }; then
	exec "$bin" up --data "$data" "$@"
fi

# What the cluster says goes through a file, in memory where there is one: the first run
# prints a password.
said=$(TMPDIR=$([ -d /dev/shm ] && echo /dev/shm || echo /tmp) mktemp)
# Job control gives the cluster a process group of its own: Ctrl-C in psql cancels a query
# and must not stop the cluster.
set -m
"$bin" up --data "$data" "$@" >"$said" 2>&1 </dev/null &
up=$!
set +m
stop() {
	trap '' INT TERM HUP
	kill -TERM "$up" 2>/dev/null || true
	wait "$up" 2>/dev/null || true
	rm -f "$said"
}
trap stop EXIT
trap 'exit 130' INT TERM HUP

ready=
while IFS= read -r line; do
	printf '%s\n' "$line"
	if [[ $line == ready:* ]]; then
		ready=1
		break
	fi
done < <(exec tail -n +1 -f --pid="$up" "$said" 2>/dev/null)
if [ -z "$ready" ]; then
	wait "$up" && status=0 || status=$?
	exit "$status"
fi
trap '' INT # psql's, while it runs
"$bin" psql --data "$data" || true
echo "stopping the cluster (its data stays in $data)"

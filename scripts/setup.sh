#!/usr/bin/env bash
# Installs what Holdfast needs and this machine lacks, saying what and why. On Debian and
# Ubuntu it uses apt, as root or through sudo; elsewhere it says what to install and ends.
#   scripts/setup.sh run    what running needs
#   scripts/setup.sh test   that, and what testing needs
#   scripts/setup.sh suites that, and what PostgreSQL's own test programs are built with
set -euo pipefail
purpose=${1:-run}
pg_major=15
go_min=1.26

packages=()
reasons=()
need() { # PACKAGE REASON
	packages+=("$1")
	reasons+=("  $1: $2")
}

pg_bin=${HOLDFAST_PGBIN:-/usr/lib/postgresql/$pg_major/bin}
if ! [ -x "$pg_bin/postgres" ]; then
	pg_bin=$(pg_config --bindir 2>/dev/null || true)
	if ! "$pg_bin/postgres" --version 2>/dev/null | grep -q " $pg_major\."; then
		pg_bin=
		need "postgresql-$pg_major" "the server that endpoints run, unmodified, with initdb and its contrib modules"
	fi
fi
if ! command -v psql >/dev/null; then
	need "postgresql-client-$pg_major" "psql, in which \`make run\` ends"
fi
if ! command -v fusermount3 >/dev/null; then
	need fuse3 "mounts an endpoint's data directory"
fi
if [ "$purpose" = test ] || [ "$purpose" = suites ]; then
	if [ -n "$pg_bin" ] && ! { [ -x "$pg_bin/pg_amcheck" ] && [ -x "$pg_bin/pgbench" ]; }; then
		need "postgresql-client-$pg_major" "pg_amcheck, pg_dump and pgbench, by which the tests judge"
	fi
	if ! command -v softhsm2-util >/dev/null; then
		need softhsm2 "the PKCS#11 token that keys in hardware are tested with"
	fi
	if ! command -v "${CC:-cc}" >/dev/null && ! command -v gcc >/dev/null; then
		need gcc "Go's race detector needs a C compiler"
		need libc6-dev "Go's race detector needs the C library's headers"
	fi
	if [ "$purpose" = suites ] && ! command -v make >/dev/null; then
		need make "builds PostgreSQL's test programs"
	fi
fi

if [ ${#packages[@]} -gt 0 ]; then
	echo "This machine lacks:"
	printf '%s\n' "${reasons[@]}"
	if ! command -v apt-get >/dev/null; then
		cat >&2 <<TEXT
Only Debian's and Ubuntu's apt is used by this script. Install, by the means of this system:
  PostgreSQL $pg_major: server, client programs (psql, pgbench, pg_dump, pg_amcheck) and contrib modules;
    if they are not in /usr/lib/postgresql/$pg_major/bin, set HOLDFAST_PGBIN to their folder
  FUSE 3: fusermount3
  for the tests, a C compiler
TEXT
		exit 1
	fi
	sudo=
	if [ "$(id -u)" != 0 ]; then
		if ! command -v sudo >/dev/null; then
			echo "Neither root nor sudo: have an administrator run: apt-get install ${packages[*]}" >&2
			exit 1
		fi
		sudo=sudo
	fi
	echo "Installing them with apt-get${sudo:+ through sudo}."
	$sudo apt-get update -q
	# Debian's package makes a cluster of its own, "main" on port 5432. It is not used here
	# and does no harm: it is neither configured nor stopped.
	if ! $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"; then
		echo "apt-get could not install them. PostgreSQL $pg_major for other releases of Debian and Ubuntu is at https://apt.postgresql.org" >&2
		exit 1
	fi
fi

if ! command -v go >/dev/null; then
	echo "Go $go_min or newer is missing. Install it from https://go.dev/dl/ and run this again." >&2
	exit 1
fi

if ! [ -c /dev/fuse ]; then
	cat >&2 <<'TEXT'
/dev/fuse is missing: an endpoint's data directory is a FUSE mount.
  on a machine of your own:  sudo modprobe fuse
  in a container:            start it with --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined
TEXT
	exit 1
fi

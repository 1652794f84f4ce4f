#!/bin/sh
# The demonstration of `make demo`: a real daemon beats, is asked, reloaded, triggered and killed.
set -eu
bin=$1
cd "$(dirname "$0")/../.."
here=$(mktemp -d)
export DAEMONKIT_RUN_DIR="$PWD/run" DAEMONKIT_LOG="$here/heartbeat.log" DAEMONKIT_CONFIG="$here/daemonkit.toml"
printf '[settings.heartbeat]\nload = 8.0\nmemory = 95\ndisk = 95\n' >"$DAEMONKIT_CONFIG"
trap '"$bin/daemonkit" kill heartbeat >/dev/null 2>&1 || :; rm -rf "$here"' EXIT

say() { printf '\n$ %s\n' "$*"; }
do_it() { say "$@"; PATH="$bin:$PATH" "$@"; }

do_it daemonkit start etc/examples/heartbeat.py
say "daemonkit logs -f heartbeat        (for 4 seconds)"
PATH="$bin:$PATH" timeout 4 daemonkit logs -f heartbeat || :
do_it daemonkit trigger heartbeat beat
do_it daemonkit status heartbeat
say "edit the thresholds: load = 0"
printf '[settings.heartbeat]\nload = 0.0\nmemory = 95\ndisk = 95\n' >"$DAEMONKIT_CONFIG"
do_it daemonkit reload heartbeat
say "kill -USR1 \$(cat run/heartbeat.pid)"
kill -USR1 "$(cat run/heartbeat.pid)"
say "daemonkit logs -f heartbeat        (for 2 seconds)"
PATH="$bin:$PATH" timeout 2 daemonkit logs -f -n 4 heartbeat || :
do_it daemonkit reexec heartbeat
do_it daemonkit kill heartbeat
say "daemonkit status heartbeat"
PATH="$bin:$PATH" daemonkit status heartbeat || echo "(exit code $?)"

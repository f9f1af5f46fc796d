#!/bin/sh
# Run a step of the set-up, and say how long it took: step.sh <what> <command> ...
set -eu
what=$1
shift
echo "== $what"
started=$(date +%s)
"$@"
echo "== $what: $(($(date +%s) - started)) s"

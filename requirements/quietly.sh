#!/bin/sh
# Run a command that says much and takes long: every few seconds its latest line, and all of its lines if it fails.
said=$(mktemp)
(
    seconds=0
    # Whoever reads our output must not wait for the last sleep.
    while sleep 5 >/dev/null 2>&1; do
        seconds=$((seconds + 5))
        printf '    %3d s  %s\n' "$seconds" "$(grep -v '^[[:space:]]*$' "$said" | tail -n 1 | tr -d '\r' | cut -c 1-100)"
    done
) &
clock=$!
trap 'kill "$clock" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$@" >"$said" 2>&1
status=$?
if [ "$status" -ne 0 ]; then cat "$said" >&2; fi
exit "$status"

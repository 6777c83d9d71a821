# shellcheck shell=bash
# Sourced by run/test.sh: the parts of a test run, what they say where they fail, and a report.

passed=0 failed=0 report='' failures=''
log=$(mktemp)

# pytest's lines of dots. Of a long log often only the end is kept, and they would leave no room for what failed.
progress='^[.sFxXE]+ +\[ *[0-9]+%\]$'

# Open MPI's launcher says this, and nothing else, when it can't start. No rank has, so it tells nothing of the tests.
not_started="The PMIx server's listener thread failed to start"

# tier NAME COMMAND...: run a command, go on when it fails, and remember the end of what it printed.
tier() {
    local name=$1 start=$SECONDS status
    shift
    printf '\n===== %s\n' "$name"
    for _ in 1 2 3; do
        status=0
        "$@" > >(tee "$log" | shown) 2>&1 || status=$?
        sleep 0.2 # for tee; to wait for it would be to wait for whatever a test has left behind
        if ((status == 0)) || ! head -n 3 "$log" | grep -q "$not_started"; then break; fi
    done
    # 5: no tests. Fine when arguments of the caller's left none, a mistake otherwise.
    if ((status == 0 || (status == 5 && ${selected:-0}))); then
        passed=$((passed + 1))
        report+="passed  $name ($((SECONDS - start)) s)"$'\n'
    else
        failed=$((failed + 1))
        failures+=$'\n'"===== FAILED: $name"$'\n'"$(excerpt)"$'\n'
        report+="FAILED  $name ($((SECONDS - start)) s)"$'\n'
    fi
}

# shown: hand on what a command prints; dots only to a terminal.
shown() {
    if [[ -t 1 ]]; then cat; else grep --line-buffered -vE "$progress"; fi
}

# excerpt: print the end of the log, so that there is room for two.
excerpt() {
    { grep -vE "$progress" "$log" || true; } | cut -c -300 | tail -n 60 | tail -c 4000
}

# summary: print what failed and a line for each tier, last, and return 1 if one failed.
summary() {
    printf '%s\n%s\ntiers: %d passed, %d failed\n' "$failures" "$report" "$passed" "$failed"
    ((failed == 0))
}

# Sourced by the end-to-end tests (dev/test/e2e_*.sh): one line of TAP for each thing checked.
#
#   check "text" command args...    ok if the command exits 0; otherwise its output follows as comments
#   skip_test "text" "why"
#   finish                          prints the plan and exits, 1 if anything failed
#
# The test is in the project's directory, and $work is an empty one of its own that goes away with it.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 73
work=$(mktemp -d) || exit 73
trap 'rm -rf "$work"' EXIT

tap_count=0
tap_failed=0

check() {
    local text=$1 output
    shift
    tap_count=$((tap_count + 1))
    if output=$("$@" 2>&1 </dev/null); then
        echo "ok $tap_count - $text"
    else
        local code=$?
        tap_failed=$((tap_failed + 1))
        echo "not ok $tap_count - $text"
        printf '%s\n' "$output" "exit code $code of: $*" | sed 's/^/#   /'
    fi
}

skip_test() {
    tap_count=$((tap_count + 1))
    echo "ok $tap_count - $1 # SKIP $2"
}

finish() {
    echo "1..$tap_count"
    [ "$tap_failed" -eq 0 ]
    exit
}

#!/usr/bin/env bash
# The test runner itself: what it must count as a failure, and its last line.
set -u
. "$(dirname "$0")/tap.sh"

# fake NAME 'shell text': a test that does just that
fake() {
    printf '#!/bin/sh\n%s\n' "$2" >"$work/$1"
    chmod +x "$work/$1"
}
# ends_with CODE LINE TEST...: what the runner says last about these fakes, and how it exits
ends_with() {
    local expected_code=$1 expected=$2 output code
    shift 2
    output=$(TEST_SECONDS=2 dev/test/run.sh "${@/#/$work/}" 2>&1)
    code=$?
    [ "${output##*$'\n'}" = "$expected" ] && [ "$code" = "$expected_code" ] && return
    printf '%s\nwanted: %s, code %s; code %s\n' "$output" "$expected" "$expected_code" "$code"
    return 1
}

fake good 'echo 1..2; echo ok 1 - a; echo ok 2 - b'
fake skips 'echo "ok 1 - a # SKIP no such thing here"; echo "not ok 2 # SKIP b, as cmocka says it"; echo 1..2'
fake groups 'echo 1..1; echo ok 1 - a; echo 1..1; echo ok 1 - b'
fake bad 'echo 1..2; echo ok 1 - a; echo not ok 2 - b; exit 1'
fake silent 'exit 0'
fake short 'echo 1..3; echo ok 1 - a'
fake long 'echo 1..1; echo ok 1 - a; echo ok 2 - b'
fake liar 'echo 1..1; echo ok 1 - a; exit 3'
fake crash 'echo 1..1; echo ok 1 - a; kill -SEGV $$'
fake slow 'echo 1..1; echo ok 1 - a; sleep 30'

check "passing tests" ends_with 0 "2 passed, 0 failed" good
check "skipped tests, in either spelling" ends_with 0 "2 passed, 0 failed, 2 skipped" good skips
check "several groups in one binary" ends_with 0 "2 passed, 0 failed" groups
check "a failing test" ends_with 1 "3 passed, 1 failed" good bad
check "no output" ends_with 1 "0 passed, 1 failed" silent
check "fewer results than planned" ends_with 1 "1 passed, 1 failed" short
check "more results than planned" ends_with 1 "2 passed, 1 failed" long
check "a non-zero exit code without a failing test" ends_with 1 "1 passed, 1 failed" liar
check "a crash" ends_with 1 "1 passed, 1 failed" crash
check "a test that does not end" ends_with 1 "1 passed, 1 failed" slow
check "a test that is not there" ends_with 1 "2 passed, 1 failed" good missing
check "nothing but skipped tests" ends_with 1 "0 passed, 0 failed, 2 skipped" skips
check "all of them, side by side" ends_with 1 "11 passed, 8 failed, 2 skipped" \
    good skips groups bad silent short long liar crash slow missing
finish

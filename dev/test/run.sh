#!/usr/bin/env bash
# Runs tests that speak TAP, shows what failed, and ends with the line `N passed, N failed[, N skipped]`.
#
#   dev/test/run.sh TEST...      unit test binaries and end-to-end scripts, from the root of the tree
#
# TEST_JOBS=2 tests run at a time, each for at most TEST_SECONDS=1200. A test that crashes, runs out of time,
# exits non-zero without a `not ok`, or prints no plan or not as many results as planned, is one more failure.
set -u
jobs=${TEST_JOBS:-2} limit=${TEST_SECONDS:-1200}
logs=$(mktemp -d) || exit 73
trap 'rm -rf "$logs"' EXIT

# CMOCKA_MESSAGE_OUTPUT: the unit tests' framework prints TAP. OMP_WAIT_POLICY: idle threads sleep instead of
# spinning, since tests share the cores.
export CMOCKA_MESSAGE_OUTPUT=TAP OMP_WAIT_POLICY=passive LC_ALL=C.UTF-8

# Reads a test's output, prints "passed failed skipped" and, for a failure that is not one of the test's own
# results, the reason. A binary may have several groups, each with a plan, so plans add up. cmocka calls a
# skipped test "not ok ... # SKIP".
judge() {
    awk -v code="$1" -v limit="$limit" '
        /^1\.\.[0-9]+/ { planned += substr($1, 4); plans++ }
        /^(not )?ok( |$)/ {
            if (/# SKIP/) skipped++
            else if (/^ok/) passed++
            else failed++
        }
        END {
            results = passed + failed + skipped
            if (code == 124 || code == 137) why = "killed after " limit " seconds or for lack of memory"
            else if (code > 128) why = "died of signal " code - 128
            else if (!plans) why = "printed no TAP plan (exit code " code ")"
            else if (results != planned) why = "planned " planned " tests, reported " results + 0
            else if (code != 0 && !failed) why = "exit code " code " although no test failed"
            print passed + 0, failed + (why != ""), skipped + 0, why
        }'
}

run_one() {
    local name=${1##*/} started=$EPOCHREALTIME code milliseconds passed failed skipped why
    case $1 in *.sh) set -- bash "$1" ;; esac # whatever became of its mode
    timeout -k 5 "$limit" "$@" >"$logs/out.$name" 2>&1 </dev/null
    code=$?
    milliseconds=$(((${EPOCHREALTIME/./} - ${started/./}) / 1000))
    read -r passed failed skipped why < <(judge "$code" <"$logs/out.$name")
    echo "$milliseconds $name $passed $failed $skipped" >"$logs/result.$name"
    {
        printf '%-32s %5d passed %4d failed %4d skipped %6d.%d s\n' "$name" "$passed" "$failed" "$skipped" \
            $((milliseconds / 1000)) $((milliseconds / 100 % 10))
        grep -a '# SKIP' "$logs/out.$name" | sed -E 's/^(not )?ok [0-9]+ (- )?/    skipped: /'
        if [ "$failed" -gt 0 ]; then
            grep -av '^ok\>' "$logs/out.$name" | tail -n 80 | sed 's/^/    /'
            [ -z "$why" ] || echo "    not ok - $name: $why"
        fi
    } >"$logs/report.$name"
    cat "$logs/report.$name" # in one piece, so that reports of tests running side by side do not mix
}

started=0
for test in "$@"; do
    [ "$started" -lt "$jobs" ] || wait -n # one place is free for every one that ended
    run_one "$test" &
    started=$((started + 1))
done
wait

echo "slowest:"
cat "$logs"/result.* | sort -rn | head -n 5 | awk '{ printf "    %-32s %8.1f s\n", $2, $1 / 1000 }'
cat "$logs"/result.* | awk -v tests=$# '
    { passed += $3; failed += $4; skipped += $5 }
    END {
        failed += tests - NR # one that left no result at all
        print passed + 0 " passed, " failed + 0 " failed" (skipped ? ", " skipped " skipped" : "")
        exit failed > 0 || passed == 0
    }'

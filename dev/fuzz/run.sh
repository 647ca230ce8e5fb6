#!/usr/bin/env bash
# Runs fuzzers for a number of seconds each, two at a time, every one on a copy of its committed seeds.
#
#   dev/fuzz/run.sh SECONDS FUZZER...
#
# Beside each FUZZER binary, FUZZER.work/ gets the growing corpus, the log and the input that failed.
set -u
seconds=$1
shift

run_one() {
    local binary=$1 name=${1##*/} work=$1.work # fuzz_NAME; its seeds are in dev/fuzz/corpus/NAME
    rm -rf "$work" && mkdir -p "$work" && cp -r "dev/fuzz/corpus/${name#fuzz_}" "$work/corpus" || return 1
    # rss_limit_mb: a parser that allocates what a header claims is a finding, not a slow machine
    if OMP_NUM_THREADS=1 "$binary" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
        -print_final_stats=1 -artifact_prefix="$work/" "$work/corpus" >"$work/log" 2>&1 </dev/null; then
        echo "ok - $name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log") inputs"
    else
        tail -n 40 "$work/log" | sed 's/^/# /'
        echo "not ok - $name: the input that did it is in $work"
        return 1
    fi
}

failed=0 running=0
reap() {
    wait -n || failed=$((failed + 1))
    running=$((running - 1))
}
for fuzzer in "$@"; do
    [ "$running" -lt 2 ] || reap
    run_one "$fuzzer" &
    running=$((running + 1))
done
while [ "$running" -gt 0 ]; do reap; done
echo "$(($# - failed)) passed, $failed failed"
[ "$failed" -eq 0 ]

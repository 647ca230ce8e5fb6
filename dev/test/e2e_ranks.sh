#!/usr/bin/env bash
# Tests of the emulated NCCL between processes and of dev/emu/launch (dev/doc/emu.md, "Several ranks").
set -u
. "$(dirname "$0")/tap.sh"
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1 OMP_WAIT_POLICY=passive
unset EMU_SEED EMU_NCCL_DETECT EMU_NCCL_TRAFFIC LAUNCH_PATIENCE
token=e2e$$x

build() {
    local flags=(-O1 -Wall -Wextra -Werror)
    if [ "$1" = asan ]; then flags+=(-fsanitize=address,undefined); fi
    dev/emu/compile "$work/ranks.$1" dev/test/emu/ranks.cu "${flags[@]}"
}

# ranks N BUILD CASE [VARIANT]
ranks() {
    local own
    own=$(mktemp -d "$work/run.XXXXXX")
    RANKS_ID=$own/id EMU_NCCL_TOKEN=$token${own##*.} timeout -k 5 60 dev/emu/launch -n "$1" "$work/ranks.$2" "${@:3}"
}

# expect CODE 'regular expression' COMMAND...: it ends with this code and says so
expect() {
    local wanted=$1 text=$2 code said
    shift 2
    said=$("$@" 2>&1)
    code=$?
    printf '%s\n' "$said"
    [ "$code" -eq "$wanted" ] && grep -qE -- "$text" <<<"$said"
}
# goes_on CODE N ...: the ranks but one do, and nothing else is said
goes_on() {
    local code=$1 n=$2 said i
    shift
    said=$(expect "$code" 'goes on' ranks "$@") || { echo "$said" && return 1; }
    diff <(sort <<<"$said") <(for ((i = 0; i < n - 1; i++)); do echo "rank $i goes on"; done)
}

# later NAME COMMAND...: runs beside the tests; `check ... done_as NAME` tells how it went
later() {
    local name=$1
    shift
    ("$@" >"$work/later.$name" 2>&1 </dev/null; echo $? >"$work/later.$name.code") &
}
done_as() {
    while [ ! -s "$work/later.$1.code" ]; do sleep 0.05; done
    cat "$work/later.$1"
    return "$(cat "$work/later.$1.code")"
}

for kind in plain asan; do check "the ranks compile ($kind)" build $kind; done

# lost ranks: mostly waiting, so these run beside the rest
waits() { # CODE N ...: the others are alive until they are killed, 1.2 seconds after the first
    local began=$EPOCHREALTIME code
    LAUNCH_PATIENCE=1.2 ranks "${@:2}"
    code=$?
    [ "$code" -eq "$1" ] && ((${EPOCHREALTIME/./} - ${began/./} > 1200000))
}
lost=()
for how in thread poll; do
    for kind in plain asan; do
        ms=$((RANDOM % 60))
        RANKS_MS=$ms later "$how.$kind" goes_on 137 3 $kind killed $how
        RANKS_MS=$ms EMU_NCCL_DETECT=1 later "$how.$kind.detect" goes_on 137 2 $kind killed $how
        RANKS_MS=$ms EMU_SEED=1 later "$how.$kind.seed" goes_on 137 2 $kind killed $how
        lost+=("$how.$kind" "$how.$kind.detect" "$how.$kind.seed")
    done
done
later missing.plain goes_on 3 3 plain missing
later missing.asan goes_on 3 2 asan missing
later waits.killed waits 137 3 plain killed hang
later waits.missing waits 3 3 plain missing blocking
lost+=(missing.plain missing.asan waits.killed waits.missing)

cases="collectives messages split nonblocking streams crossed capture clock"
for case in $cases traffic; do
    for n in 1 2 3 8; do check "$case of $n ranks" ranks $n plain "$case"; done
done
for case in $cases; do
    check "$case of 3 ranks, asan build" ranks 3 asan "$case"
    if [ "$case" != collectives ]; then check "$case of 8 ranks, asan build" ranks 8 asan "$case"; fi
    for seed in 1 2 3; do
        EMU_SEED=$seed check "$case of 3 ranks, EMU_SEED=$seed" ranks 3 plain "$case"
    done
done
for n in 1 2 3 8; do
    check "a collective whose event nobody waits for, $n ranks" \
        expect 1 'rounds in two streams' ranks $n plain streams bug
done


# mismatch N BUILD VARIANT 'rank 0's call' 'the last rank's call': both say so
mismatch() {
    local n=$1 last=$(($1 - 1)) call=$4 other=$5
    local text="^emu: rank 0 of $n calls ${call/@/ elements} where rank $last calls ${other/@/}\$"
    expect 97 "$text" ranks "$n" "$2" mismatch "$3" >"$work/said"
    local code=$?
    cat "$work/said"
    text="^emu: rank $last of $n calls ${other/@/ elements} where rank 0 calls ${call/@/}\$"
    [ $code -eq 0 ] && grep -qE -- "$text" "$work/said"
}
sum='ncclAllReduce of 50@ \(type 7, operation 0, root 0\)'
for n in 2 3 8; do
    kind=plain
    if [ $n = 3 ]; then kind=asan; fi
    check "another count, $n ranks" mismatch $n $kind count "$sum" "${sum/50/49}"
    check "another type, $n ranks" mismatch $n $kind type "$sum" "${sum/type 7/type 2}"
    check "another operation, $n ranks" mismatch $n $kind operation "$sum" "${sum/operation 0/operation 2}"
    scatter='ncclReduceScatter of 1@ \(type 7, operation 0, root 0\)'
    check "another collective, $n ranks" mismatch $n $kind collective "$sum" "$scatter"
    sent='ncclBroadcast of 50@ \(type 7, operation 0, root 0\)'
    check "another root, $n ranks" mismatch $n $kind root "$sent" "${sent/root 0/root 1}"
    LAUNCH_PATIENCE=0.1 check "a message of another length, $n ranks" expect 97 \
        "^emu: ncclSend of 200 bytes from rank 0 meets ncclRecv of 204 in rank $((n - 1))\$" ranks $n $kind mismatch message
done

# traffic N: what a ring sends from each rank, by the formulas
traffic() {
    local n=$1 r half
    rm -f "$work"/traffic.*
    EMU_NCCL_TRAFFIC=$work/traffic ranks "$n" plain traffic || return 1
    for ((r = 0; r < n; r++)); do
        half=$(((n + 1 - r % 2) / 2)) # every other rank
        awk -v n="$n" -v r="$r" -v half=$half 'BEGIN {
            bytes = 600 * 4
            sends = 1 + (n > 1 && r + 1 < n)
            print 0, n, "ncclAllReduce", 2, 2 * (2 * (n - 1) / n * bytes)
            print 0, n, "ncclReduce", 1, (n - 1) / n * bytes
            print 0, n, "ncclBroadcast", 1, (n - 1) / n * bytes
            print 0, n, "ncclReduceScatter", 1, (n - 1) * bytes
            print 0, n, "ncclAllGather", 1, (n - 1) * bytes
            print 0, n, "ncclSend", sends, sends * bytes
            print 0, n, "ncclRecv", 1 + (n > 1 && r > 0), 0
            print 1, half, "ncclAllReduce", 1, 2 * (half - 1) / half * bytes / 2
        }' | diff - "$work/traffic.$r" || return 1
    done
    [ "$(find "$work" -name 'traffic.*' | wc -l)" -eq "$n" ]
}
for n in 1 2 3 8; do check "EMU_NCCL_TRAFFIC of $n ranks" traffic $n; done

# same_clock N: each stream's lines, in its order, are those of the run before
in_order() { sort -s -t $'\t' -k 3,3n "$work/$1"; }
same_clock() {
    local n=$1 r seed
    for seed in 0 1 2 3; do EMU_SEED=$seed EMU_CLOCK_FILE=$work/clock$seed ranks "$n" plain clock || return 1; done
    for ((r = 0; r < n; r++)); do
        for seed in 1 2 3; do diff <(in_order clock0.$r) <(in_order clock$seed.$r) || return 1; done
        grep -qxF $'0.000000000000\t0.005000000000\t1\tmemset\t' "$work/clock0.$r" || return 1
    done
}
for n in 1 3; do check "the clock is the same in every drawn order, $n ranks" same_clock $n; done
for text in "matmul" "matmul=" "matmul=0" "speed=1" "matmul=1e9;link=1" "link=1 "; do
    EMU_CLOCK=$text check "EMU_CLOCK=$text is refused" expect 97 "^emu: EMU_CLOCK is $text; matmul=FLOP/s.* is wanted" \
        ranks 1 plain streams
done

# dev/emu/launch itself
launch() { dev/emu/launch "$@"; }
check "launch: all is well" expect 0 '^$' launch -n 3 true
check "launch: one rank if not told" expect 0 '^0 of 1 at 0$' launch sh -c 'echo $RANK of $WORLD_SIZE at $LOCAL_RANK'
environment() {
    local text='echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $EMU_DEVICES $EMU_SEED $1"'
    diff <(EMU_SEED=7 launch -n 2 sh -c "$text" - 'two  words' | sort) <(
        echo '0 2 0 2 127.0.0.1 2 7000 two  words'
        echo '1 2 1 2 127.0.0.1 2 7001 two  words') || return 1
    [ "$(launch -n 3 sh -c 'echo $MASTER_PORT $PRETRAIN_SECRET' | sort -u | wc -l)" -eq 1 ]
}
check "launch: the environment of the ranks" environment
check "launch: the exit code of the first to fail" expect 5 '^$' launch -n 3 sh -c \
    'case $RANK in 0) sleep 0.4 && exit 3 ;; 2) exit 5 ;; esac'
check "launch: 128 + the signal" expect 137 '^$' launch -n 2 sh -c '[ $RANK = 0 ] || kill -9 $$'
patience() { # SECONDS 'what rank 0 says': it needs half a second, and rank 1 fails at once
    local began=$EPOCHREALTIME
    LAUNCH_PATIENCE=$1 expect 4 "^$2\$" launch -n 2 sh -c \
        '[ $RANK = 0 ] || exit 4; sleep 0.5; echo finished; exec sleep '"$3" || return 1
    ((${EPOCHREALTIME/./} - ${began/./} < 8000000))
}
check "launch: the others have time to end" patience 10 finished 0
check "launch: and are killed after that" patience 1.5 finished 60
check "launch: no patience" patience 0 '' 60
signalled() { # NAME: all ranks get it
    dev/emu/launch -n 3 bash -c 'trap "echo got; exit 9" '"$1"'; echo up; while :; do sleep 0.05; done' \
        >"$work/signalled" &
    local pid=$! code
    until [ "$(grep -c up "$work/signalled")" -eq 3 ]; do sleep 0.02; done
    kill -"$1" $pid
    wait $pid
    code=$?
    cat "$work/signalled"
    [ $code -eq 9 ] && [ "$(grep -c got "$work/signalled")" -eq 3 ]
}
check "launch: passes SIGTERM on" signalled TERM
for arguments in "" "-n 2" "-n" "-n 0 true" "-n -1 true" "-n x true"; do
    # shellcheck disable=SC2086 # several words
    check "launch: bad usage ($arguments)" expect 64 '^usage: dev/emu/launch -n RANKS' launch $arguments
done

for name in "${lost[@]}"; do check "a rank is lost: $name" done_as "$name"; done
left() { # what is in shared memory of these tests
    local names
    names=$(find /dev/shm -name "emu_nccl_$token*")
    printf '%s\n' "$names"
    [ -z "$names" ]
}
check "nothing is left in /dev/shm" left
finish

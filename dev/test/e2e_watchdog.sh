#!/usr/bin/env bash
# Ranks that die, are stopped, hang on the device or on the host, or fail alone: all end, the culprit is named, and the
# run goes on from its newest checkpoint.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LAUNCH_PATIENCE=20
. dev/test/small_corpus.sh
trap 'pkill -KILL -f "log.run_dir=$work/"; rm -rf "$work"' EXIT
ranks=4 patience=4
small=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=8 schedule.max_steps=100000
    schedule.warmup_steps=1 schedule.type=constant eval.every=0 eval.batches=1 model.num_hidden_layers=4
    model.hidden_size=32 model.intermediate_size=64 parallel.hang_seconds_min=$patience)

# start NAME [KEY=VALUE ...]: in the background; its exit code goes to NAME.code
start() {
    local name=$1
    shift
    (
        dev/emu/launch -n $ranks ./train_gpt_emu train configs/tiny_llama.json "${data[@]}" "log.run_dir=$work/$name" \
            "${small[@]}" "$@" >"$work/$name.out" 2>"$work/$name.err"
        echo $? >"$work/$name.code"
    ) &
}
over() { # NAME: waits until it has ended
    for _ in $(seq 1200); do
        [ ! -s "$work/$1.code" ] || return
        sleep 0.05
    done
    echo "it did not end in a minute"
}
trains() { # NAME STEP: until it has done that step
    for _ in $(seq 1200); do
        grep -q "^step *$2/" "$work/$1.out" 2>/dev/null && return
        sleep 0.05
    done
    cat "$work/$1.err"
    return 1
}
rank_pid() { # NAME RANK
    for pid in $(pgrep -f "^./train_gpt_emu train .*log.run_dir=$work/$1 "); do
        tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "RANK=$2" && echo "$pid"
    done
}
ended() { # NAME CODE 'regular expression': one error, which says that
    over "$1"
    [ "$(cat "$work/$1.code")" = "$2" ] && [ "$(grep -c '^error: ' "$work/$1.err")" -eq 1 ] &&
        grep -qE "^error: $3" "$work/$1.err" && return
    echo "code $(cat "$work/$1.code"), not $2; $3"
    cat "$work/$1.err"
    return 1
}
recorded() { # NAME RANK ...: they, and nobody else, wrote what they had done last, with an operation that had not ended
    local name=$1 file
    shift
    [ "$(ls "$work/$name/flight" | wc -l)" -eq $# ] || return 1
    for rank in "$@"; do
        file=$work/$name/flight/rank_0000$rank.jsonl
        python3 -c 'import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert lines[0]["rank"] == int(sys.argv[2]) and lines[0]["why"] and lines[0]["host"]
assert any(line.get("progress") in ("begun", "issued") for line in lines[1:]), "all has ended"
assert any(line["what"] == "computing" for line in lines[1:])' "$file" "$rank" || return 1
    done
}

# killed, one after the other; the launcher returns the code of the rank that was killed
for victim in 0 1 3; do
    start killed$victim
    check "a run of $ranks ranks gets on" trains killed$victim 3
    kill -KILL "$(rank_pid killed$victim $victim)"
    check "rank $victim is killed: the others end, and say so" ended killed$victim 137 \
        "rank $victim of $ranks \(.+, GPU $victim\) has ended, in step [0-9]+ .*its own messages"
    others=$(seq 0 3 | grep -v $victim)
    # shellcheck disable=SC2086
    check "and write what they were doing" recorded killed$victim $others
    if [ $victim -gt 0 ]; then check "the log says it, too" grep -q '"event":"lost"' "$work/killed$victim/log.jsonl"; fi
done

start stopped
check "a run to be stopped gets on" trains stopped 3
kill -STOP "$(rank_pid stopped 2)"
(sleep $((patience + 4)); kill -KILL "$(rank_pid stopped 2)") &
check "rank 2 is stopped: the others find it silent" ended stopped 76 "rank 2 of 4 \(.+, GPU 2\) has said nothing for $patience s, last in step"
check "and write what they were doing" recorded stopped 0 1 3

start paused
check "a run to be paused gets on" trains paused 3
pkill -STOP -f "log.run_dir=$work/paused "
sleep $((patience + 3))
pkill -CONT -f "log.run_dir=$work/paused "
check "a job that was stopped as a whole goes on" trains paused "$(($(grep -c ^step "$work/paused.out") + 20))"
pkill -TERM -f "^./train_gpt_emu train .*log.run_dir=$work/paused "
check "until it is told to end" ended paused 75 "stopped by signal 15"

# hangs, of a kernel or copy (N) or of the call that enqueues one (hN), in each kind of layout
hang() { # NAME RANK OPERATION [KEY=VALUE ...]
    local name=$1 rank=$2 at=$3
    shift 3
    EMU_HANG=$rank:$at start "$name" "$@"
    check "rank $rank hangs ($name, $at): it is named, and what the others wait for" ended "$name" 76 \
        "rank $rank of $ranks \(.+, GPU $rank\) hangs: it has been computing for [0-9]+ s, in step [0-9]+, and rank [0-9] waits for it in (all-gather|all-reduce|reduce-scatter|send|receive) of [0-9]+ bytes \(.+\); see flight/"
    check "$name: all of them wrote what they were doing" recorded "$name" 0 1 2 3
}
hang data_parallel 2 3001
hang data_parallel_host 0 h2503
hang zero_3 3 h2777 parallel.zero_stage=3
hang tensor 1 3333 parallel.tensor_parallel_size=2
hang pipeline 3 2950 parallel.pipeline_parallel_size=4
hang pipeline_first 0 h3100 parallel.pipeline_parallel_size=4
hang both 2 2111 parallel.pipeline_parallel_size=2 parallel.tensor_parallel_size=2
hang context 1 2600 parallel.context_parallel_size=2 parallel.pipeline_parallel_size=2

# one rank fails, of itself: the others end with its code
cp -r "$work/data" "$work/spoilt"
start spoilt "data.train=$work/spoilt/train_*.bin"
check "a run whose data will be damaged gets on" trains spoilt 3
truncate -s 2000 "$work/spoilt/train_000000.bin"
fails_alone() { # NAME
    over "$1"
    local code
    code=$(cat "$work/$1.code")
    [ "$code" = 65 ] || [ "$code" = 74 ] && grep -q '^error: .*train_000000.bin' "$work/$1.err" && return
    echo "code $code"
    cat "$work/$1.err"
    return 1
}
check "data that go away end all ranks with the same code" fails_alone spoilt

# the same on one rank alone, while what follows a save has not begun: rank 1's part of the fast tier is held up
mkdir -p "$work/fast" "$work"/node/{0,1,2,3}
for rank in 0 1 3; do ln -s "$work/data" "$work/node/$rank"; done
cp -r "$work/data" "$work/node/2"
(
    dev/emu/launch -n $ranks sh -c "root=\$PWD; cd $work/node/\$RANK; exec \$root/train_gpt_emu train \$root/configs/tiny_llama.json \"\$@\"" \
        sh "${data[@]}" "data.train=data/train_*.bin" "log.run_dir=$work/behind" "${small[@]}" checkpoint.fast_dir="$work/fast" \
        checkpoint.every=40 >"$work/behind.out" 2>"$work/behind.err"
    echo $? >"$work/behind.code"
) &
check "a run with a fast tier gets on" trains behind 41
flock "$work"/fast/*/*/rank_00001-of-00004 sleep 60 &
check "and saves while that is held up" trains behind 81
truncate -s 2000 "$work/node/2/data/train_000000.bin"
check "data that go away on one rank end all with the same code" fails_alone behind
check "and the log says which rank's" grep -qE '"event":"lost",.*"error":"rank 2: .*train_000000.bin' "$work/behind/log.jsonl"
pkill -KILL -P $! sleep

# the same while a save takes longer than a step may: the thread that syncs its files waits as long as $work/gate is there
printf '#include <sys/syscall.h>\n#include <unistd.h>
int fsync(int fd) {
    while (syscall(SYS_gettid) != getpid() && access("%s", F_OK) == 0) usleep(10000);
    return (int)syscall(SYS_fsync, fd);
}\n' "$work/gate" >"$work/fsync.c"
${CC:-cc} -shared -fPIC -o "$work/fsync.so" "$work/fsync.c" || exit 70
cp -r "$work/data" "$work/rotten"
LD_PRELOAD=$work/fsync.so start saving "data.train=$work/rotten/train_*.bin" checkpoint.every=100 log.every=20 parallel.zero_stage=0
check "a run with a slow disk gets on" trains saving 20
touch "$work/gate"
check "and trains beside a save" trains saving 120
truncate -s 2000 "$work/rotten/train_000000.bin"
sleep $((5 * patience)) # the watchdog has that long to be wrong
rm "$work/gate"
check "data that go away meanwhile end all ranks with the same code" fails_alone saving
check "and not before all is saved" ./train_gpt_cpu checkpoint verify "$work/saving/checkpoints/step_00000100"

# one connection that saves need breaks: what is on the disk stays, and the run ends to be started again
cut_off() { # PID: shuts its second connection down, that of those who save together. Exit code 77: not permitted here
    python3 - "$1" <<'PYTHON'
import ctypes, os, socket, sys
pid, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
links = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
process = libc.syscall(434, pid, 0)  # pidfd_open
copies = [libc.syscall(438, process, fd, 0) for fd in sorted(links) if links[fd].startswith("socket:")]  # pidfd_getfd
if process < 0 or min(copies) < 0:
    sys.exit(77)
connections = [s for s in map(lambda fd: socket.socket(fileno=fd), copies) if s.family in (socket.AF_INET, socket.AF_INET6)]
connections[1].shutdown(socket.SHUT_RDWR)
PYTHON
}
saves_lost() { # all ranks have ended behind the save that was due next, and the one before is whole
    local saved
    ended cut 76 "no more checkpoints can be written: rank [0-9] lost rank [0-9] of 4" || return
    saved=$(ls "$work/cut/checkpoints") && [[ "$saved" =~ ^step_0000[0-9]{4}$ ]] && grep -q '"event":"stop".*"error":"no more' "$work/cut/log.jsonl" &&
        ./train_gpt_cpu checkpoint verify "$work/cut/checkpoints/$saved" && return
    echo "$saved"
    tail -n 3 "$work/cut/log.jsonl"
    return 1
}
start cut checkpoint.every=40 checkpoint.keep_last=1
check "a run whose saves will be cut off gets on" trains cut 41
cut_off "$(rank_pid cut 2)"
if [ $? -eq 77 ]; then
    skip_test "a connection of those who save breaks" "pidfd_getfd is not permitted here"
else
    check "a connection of those who save breaks: the run ends, to be started again" saves_lost
fi
pkill -KILL -f "^./train_gpt_emu train .*log.run_dir=$work/cut " # if it goes on

# A config that is wrong in the same words on all ranks, and on one alone: it is said once, at the latest when nobody else
# has said it. A rank's code goes to NAME.code.RANK.
wrong() { # NAME 'what a rank does to its arguments'
    (
        LAUNCH_PATIENCE=1 dev/emu/launch -n $ranks sh -c "config=configs/tiny_llama.json; $2
            ./train_gpt_emu train \$config \"\$@\"; code=\$?; echo \$code >$work/$1.code.\$RANK; exit \$code" sh "${data[@]}" \
            "log.run_dir=$work/$1" "${small[@]}" schedule.max_steps=1 "parallel.start_timeout=${wait:-60}" >"$work/$1.out" 2>"$work/$1.err"
        echo $? >"$work/$1.code"
    ) &
}
wrong everywhere 'set -- "$@" model.hiden_size=8'
wrong words 'config=nonsense'
wrong alone '[ $RANK != 2 ] || set -- "$@" model.hiden_size=8'
wrong first '[ $RANK != 0 ] || set -- "$@" model.hiden_size=8'
wrong missing '[ $RANK != 3 ] || config=configs/not_there.json'
wait=20 wrong differs '[ $RANK != 2 ] || set -- "$@" guard.window=9'
said_once() { # NAME CODE 'regular expression' [RANK ...]: these ranks have ended by themselves, with the code
    local name=$1 code=$2 text=$3 rank
    shift 3
    over "$name"
    cat "$work/$name.err"
    [ "$(cat "$work/$name.code")" = "$code" ] && [ "$(grep -c '^error: ' "$work/$name.err")" = 1 ] && grep -qE "^error: .*$text" "$work/$name.err" || return
    for rank in "$@"; do
        [ "$(cat "$work/$name.code.$rank")" = "$code" ] || return
    done
}
check "an error of all ranks is said once, and is the code of all" said_once everywhere 78 hiden_size 0 1 2 3
check "so is one of the command line" said_once words 64 "nonsense is neither" 0 1 2 3
check "an error of one rank is said" said_once alone 78 hiden_size 2
check "one of the first rank alone is said once" said_once first 78 hiden_size 0
differs() { over differs; cat "$work/differs.err"; [ "$(grep -c '^warning: .*another run config' "$work/differs.err")" = 1 ]; }
check "a rank with another config is spoken of while it is waited for" differs
check "one rank's missing file is said" said_once missing 66 not_there 3

# the self-test: the program is started by a shell, which breaks the GPU of some ranks
# self_test NAME 'what breaks it' 'regular expression' [CODE [NODE]]: what it says, and the node in BAD_NODE
self_test() {
    local code bad
    dev/emu/launch -n $ranks sh -c "$2; exec ./train_gpt_emu train configs/tiny_llama.json \"\$@\"" sh "${data[@]}" \
        "log.run_dir=$work/$1" "${small[@]}" parallel.self_test=true schedule.max_steps=1 >"$work/$1.out" 2>"$work/$1.err"
    code=$?
    bad=$(cat "$work/$1/BAD_NODE" 2>/dev/null)
    [ "$code $bad" = "${4:-69} ${5-node_2}" ] && { [ -z "$3" ] || grep -qE "$3" "$work/$1.err"; } && return
    echo "code $code, BAD_NODE $bad"
    cat "$work/$1.err"
    return 1
}
clock='export EMU_MEMORY=1000000000 SLURMD_NODENAME=node_$RANK EMU_CLOCK=matmul=1e12,copy=1e12' on_2='[ $RANK != 2 ] ||'
check "GPUs that work pass the self-test" self_test works "$clock" "" 0 ""
check "bad memory is found" self_test memory "$clock; $on_2 export EMU_FAULT=memory" "^error: rank 2: this GPU's memory is bad: 1 of [0-9]+ words"
check "a wrong product is found" self_test matmul "$clock; $on_2 export EMU_FAULT=matmul" "^error: rank 2: this GPU computes wrong: 1 of 262144 elements"
check "a slow matmul is found" self_test slow "$clock; $on_2 EMU_CLOCK=matmul=6e11,copy=1e12" \
    "^error: rank 2: its GPU is slow: a matmul reaches 0.6 TFLOP/s, the median of 4 ranks is 1; leave node node_2 out"
check "a slow copy is found" self_test copies "$clock; $on_2 EMU_CLOCK=matmul=1e12,copy=6e11" "^error: rank 2: its GPU is slow: a copy reaches 0.6 TB/s"
check "a little slower is not slow" self_test little "$clock; $on_2 EMU_CLOCK=matmul=8e11,copy=8e11" "" 0 ""
check "a GPU that has vanished is found" self_test vanished "$clock; $on_2 export EMU_DEVICES=0" "^error: rank 2: no GPU that CUDA can use"
check "so is one that ends its process" self_test fails "$clock; $on_2 export EMU_FAULT=call" "failed to execute" 70
check "so are those of half of the nodes, the first one's first" self_test half "$clock; [ \$RANK -gt 1 ] || export EMU_FAULT=call" "failed to execute" 70 node_0
pairs='export EMU_MEMORY=1000000000 SLURMD_NODENAME=node_$((RANK / 2)) EMU_CLOCK=matmul=1e12,copy=1e12'
check "where each node lacks a GPU none is to blame" self_test many "$pairs; [ \$((RANK % 2)) = 0 ] || export EMU_DEVICES=0" "^error: rank 1: no GPU" 69 ""
check "nor where each has one that ends its process" self_test all "$pairs; [ \$((RANK % 2)) = 0 ] || export EMU_FAULT=call" "failed to execute" 70 ""
check "but one that computes wrong is, on any" self_test wrong "$pairs; [ \$((RANK % 2)) = 0 ] || export EMU_FAULT=matmul" \
    "^error: rank 1: this GPU computes wrong" 69 node_0

# a slow rank: stopped for a while, again and again
start slow schedule.max_steps=100000
check "a run with a slow rank gets on" trains slow 3
pid=$(rank_pid slow 1)
for _ in $(seq 100); do
    kill -STOP "$pid"
    sleep 0.15
    kill -CONT "$pid"
    sleep 0.05
    ! grep -q '^warning: rank 1 of 4 .*is slow' "$work/slow.err" || break
done
check "it is named" grep -qE '^warning: rank 1 of 4 \(.+, GPU 1\) is slow: [0-9.e-]+ s of its own work in a step, the median is' "$work/slow.err"
check "the log compares ranks" grep -q '"rank_seconds_min":.*"slowest_rank":1' "$work/slow/log.jsonl"
pkill -TERM -f "^./train_gpt_emu train .*log.run_dir=$work/slow "
wait
finish

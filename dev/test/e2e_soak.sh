#!/usr/bin/env bash
# A run that is hit again and again, while it trains and while it saves: one rank or all are killed, or told to stop.
# It must always go on from a checkpoint that is not older than before, and end with the bits of a run that was left
# alone. Each start draws whether it has a fast tier of checkpoints. SOAK_FAULTS=200 is how often; SOAK_SECONDS=0 goes
# on for at least so long; SOAK_SEED draws the faults.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LAUNCH_PATIENCE=20
. dev/test/small_corpus.sh
trap 'pkill -KILL -f "log.run_dir=$work/"; rm -rf "$work"' EXIT
mkdir "$work/fast"
ranks=2 faults=${SOAK_FAULTS:-200} seconds=${SOAK_SECONDS:-0}
RANDOM=${SOAK_SEED:-$(date +%N | sed 's/^0*//')}
settings=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=2 schedule.warmup_steps=1
    schedule.type=constant eval.every=0 eval.batches=1 model.num_hidden_layers=2 model.hidden_size=32
    model.intermediate_size=64 checkpoint.every=2 checkpoint.keep_last=2)

run() { # NAME [KEY=VALUE ...]
    local name=$1
    shift
    dev/emu/launch -n $ranks ./train_gpt_emu train configs/tiny_llama.json "${data[@]}" "log.run_dir=$work/$name" \
        "${settings[@]}" "$@" >"$work/$name.out" 2>"$work/$name.err"
}
newest() { # NAME: the step of the newest checkpoint; 0: there is none
    local steps
    steps=$(ls "$work/$1/checkpoints" 2>/dev/null | sed -n 's/^step_0*\([0-9]*\)$/\1/p' | sort -n | tail -n 1)
    echo "${steps:-0}"
}
open_doors() { # PID...: local addresses of these processes' listening sockets, in the kernel's hexadecimal
    local sockets
    sockets=$(for pid; do readlink /proc/"$pid"/fd/*; done 2>/dev/null | sed -n 's/^socket:\[\(.*\)\]$/\1/p')
    awk -v sockets="$sockets" 'BEGIN { split(sockets, all); for (i in all) own[all[i]] }
        $4 == "0A" && $10 in own { print $2 }' /proc/net/tcp /proc/net/tcp6
}
loopback='^(0100007F|0{24}01000000):'

# A rank that waits for another one listens, where it was told to.
waits() { # ADDRESS
    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=$1 MASTER_PORT=23987 ./train_gpt_emu train configs/tiny_llama.json \
        "${data[@]}" "log.run_dir=$work/waits" parallel.start_timeout=60 &>/dev/null &
    local pid=$! k
    for ((k = 0; k < 600; k++)); do
        seen=$(open_doors $pid)
        [ -z "$seen" ] || break
        sleep 0.1
    done
    kill -KILL $pid
    wait $pid 2>/dev/null
    [ -n "$seen" ]
}
waits_outside() { waits some.host && ! grep -Eq "$loopback" <<<"$seen"; }
waits_inside() { waits 127.0.0.1 && ! grep -Evq "$loopback" <<<"$seen"; }
check "with a master elsewhere rank 0 waits on all addresses" waits_outside
check "with one on the loopback it waits there" waits_inside

count=0 went_back=0 fast=0 unexpected=0 saving=0 before=0 doors="" started=$SECONDS
while [ $count -lt "$faults" ] || [ $((SECONDS - started)) -lt "$seconds" ]; do
    tier=()
    [ $((RANDOM % 2)) -eq 0 ] || tier=(checkpoint.fast_dir="$work/fast" checkpoint.fast_every=1)
    run hit schedule.max_steps=1000000 "${tier[@]}" &
    launch=$!
    pids=()
    while [ ${#pids[@]} -lt $ranks ]; do
        sleep 0.05
        mapfile -t pids < <(pgrep -f "^./train_gpt_emu train .*log.run_dir=$work/hit ")
    done
    sleep "$(awk -v r=$RANDOM 'BEGIN { print 1.2 * r / 32768 }')"
    doors+=$(open_doors "${pids[@]}" | grep -Ev "$loopback")
    [ ! -d "$work"/hit/checkpoints/*.tmp ] || saving=$((saving + 1))
    case $((RANDOM % 10)) in
    0) kill -KILL "${pids[@]}" ;;
    1) kill -TERM "${pids[@]}" ;;
    *) kill -KILL "${pids[RANDOM % ${#pids[@]}]}" ;;
    esac 2>/dev/null
    wait $launch
    code=$?
    count=$((count + 1))
    case $code in
    137 | 143 | 75 | 76) ;; # killed; before signals are blocked; stopped; the others of one that was killed
    *)
        unexpected=$((unexpected + 1))
        echo "# fault $count: code $code: $(tail -n 1 "$work/hit.err")"
        ;;
    esac
    ! grep -q "^weights from $work/fast" "$work/hit.err" || fast=$((fast + 1))
    now=$(newest hit)
    if [ "$now" -lt $before ]; then
        went_back=$((went_back + 1))
        echo "# fault $count: from step $before back to $now"
    fi
    before=$now
done
check "$count faults, $saving of them during a save: no run lost" [ $unexpected -eq 0 ]
check "no checkpoint lost: the newest is of step $before" [ $went_back -eq 0 ]
check "$fast starts went on from the fast tier" [ $fast -gt $((count / 50)) ]
check "it has got on" [ "$before" -ge $((count / 4)) ]
check "nobody listened but on the loopback" [ -z "$doors" ]
check "none was found damaged" sh -c "! ls '$work/hit/checkpoints' | grep -q bad"
last=$((before + 3))
check "it ends" run hit schedule.max_steps=$last
check "so does a run that was left alone" run clean schedule.max_steps=$last checkpoint.every=0
check "with the same bits" ./train_gpt_cpu checkpoint diff "$work/hit/checkpoints/$(printf 'step_%08d' $last)" \
    "$work/clean/checkpoints/$(printf 'step_%08d' $last)"
finish

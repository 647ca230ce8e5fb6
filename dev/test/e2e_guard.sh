#!/usr/bin/env bash
# The guard, on the CPU trainer and on the emulated one as 1, 2 and 4 processes, with numbers that go wrong on one of them
# (dev/test/faulty.h): every policy, the same decision everywhere, the same bits again.
#
#   dev/test/e2e_guard.sh [PART ...]     cpu, 1, 2, 4, replicas; all by default
set -u
. "$(dirname "$0")/tap.sh"
steps=24
. dev/test/faulty.sh
make -s build/test/faulty_cpu >"$work/log" 2>&1 || cat "$work/log"
check "the faulty trainers are built" test -x build/test/faulty_cpu -a -x "$work/faulty_gpu"

# far above what this text does of itself, whatever it becomes, and far below the faults
judge=(guard.sigma=100 guard.window=8)
for place in ${*:-cpu 1 2 4 replicas}; do
    [ "$place" != replicas ] || continue
    last=$((${place/cpu/1} - 1)) run=("$place" parallel.zero_stage=1 "${judge[@]}")
    # replicas that decided differently would differ, and the comparison would end the run
    [ $place != 2 ] || run=(2 parallel.zero_stage=0 guard.check_every=1 "${judge[@]}")
    [ $place != 4 ] || run=(4 parallel.pipeline_parallel_size=2 parallel.zero_stage=2 guard.check_every=1 "${judge[@]}")
    name=clean$place
    FAULT_TRACE=$work/rows.$place check "$place: a run without faults" train $name "${run[@]}"
    check "$place: there is no alarm" [ "$(events)" -eq 0 ]
    bad=$(rows $last 14) later=$(rows 0 20)

    # a step that is skipped, and behind it a detector that still sees
    for fault in "loss nan" "loss inf" "gradient nan" "gradient inf" "loss 1e6" "gradient 1e4"; do
        name=skip$place.${fault// /.} what=${fault% *} finite=0
        what=${what/gradient/grad_norm}
        [ "${fault/1e/}" = "$fault" ] || finite=1
        FAULT="$bad $fault;$later loss 1e6" check "$place: $fault" train "$name" "${run[@]}"
        check "$place: $fault: skipped in its step; and the spike later" [ "$(events ".*\"step\":14,\"what\":\"$what\".*\"action\":\"skipped\"") \
$(events '.*"step":20,"what":"loss".*"action":"skipped"') $(events) $(state "$name" skipped_steps) $(state "$name" "${what}_count")" = "1 1 2 2 $((23 + finite))" ]
    done
    check "$place: the log has where the rows are from and how the first begins" \
        grep -qE '"first_row":104,"rows":8,"batch":\[\{"row":104,"source":"[^"]*","shard":"[^"]*train_[^"]*","token":[0-9]+,"documents":[0-9]+\},.*"text":"..' \
        "$work/$name/log.jsonl"

    export FAULT="$bad loss 1e6"
    name=warn$place
    check "$place: warn applies a spike" train $name "${run[@]}" guard.policy=warn
    check "$place: and says so" [ "$(events '.*"action":"applied"') $(state $name skipped_steps)" = "1 0" ]
    check "$place: stop: exit 70" ends 70 "guard.policy" train stop$place "${run[@]}" guard.policy=stop
    check "$place: and its step is not saved" [ "$(ls "$work/stop$place/checkpoints" | tail -n 1)" = step_00000010 ]
    name=rewind$place
    check "$place: rewind" train $name "${run[@]}" guard.policy=rewind
    check "$place: from the checkpoint of step 10 to behind the batch" \
        grep -q '"event":"rewind",.*"step":10,"from_step":14,"row":112,"rewinds":1' "$work/$name/log.jsonl"
    check "$place: so many rows later is the end" [ "$(state $name rows) $(state $name rewinds) $(state $name skipped_steps)" = \
        "$((24 * 8 + 32)) 1 0" ]
    check "$place: the same run again" train again$place "${run[@]}" guard.policy=rewind
    check "$place: has the same bits" same $name again$place
    mkdir "$work/fast$place"
    check "$place: rewind to a step that only the fast tier has" train tier$place "${run[@]}" guard.policy=rewind checkpoint.every=20 \
        checkpoint.fast_dir="$work/fast$place" checkpoint.fast_every=5
    check "$place: it was that of step 10" grep -q "^weights from $work/fast$place/.*, step 10\$" "$work/tier$place.err"
    check "$place: the same bits" same $name tier$place
    for from in 10 15; do # before and behind the rewind
        rm -rf "$work/resumed"
        cp -r "$work/$name" "$work/resumed"
        for checkpoint in "$work"/resumed/checkpoints/step_*; do [ "${checkpoint##*_}" -le 000000$from ] || rm -r "$checkpoint"; done
        check "$place: resumed at step $from" train resumed "${run[@]}" guard.policy=rewind
        check "$place: the same bits" same $name resumed
    done
    export FAULT="* gradient nan"
    check "$place: too many rewinds: exit 70" ends 70 guard.rewind_max train max$place "${run[@]}" guard.policy=rewind guard.rewind_max=2
    check "$place: after two" [ "$(grep -c '"event":"rewind"' "$work/max$place/log.jsonl")" -eq 2 ]
    check "$place: too many skipped steps: exit 70" ends 70 guard.max_skipped_steps train skipped$place "${run[@]}" guard.max_skipped_steps=3
    unset FAULT
done

# ----------------------------------------------------------------------------
# one bit of one weight of one replica

case " ${*:-replicas} " in *" replicas "*) ;; *) finish ;; esac
place=four
FAULT_TRACE=$work/rows.four check "4 replicas" train clean 4 guard.check_every=1
for zero in 0 1 2; do
    name=clean$zero
    [ $zero -eq 1 ] || check "ZeRO $zero" train $name 4 parallel.zero_stage=$zero
    for rank in 0 2; do # who keeps that weight's state, and who has a copy of it
        FAULT="$(rows $rank 8) weight 0" check "ZeRO $zero: a bit flips on rank $rank: found at once, exit 70" \
            ends 70 "differ: rank $rank in step 8:" train flip 4 parallel.zero_stage=$zero guard.check_every=1
        rm -rf "$work/flip"
    done
done
FAULT="$(rows 3 7) weight 0"
export FAULT
check "ZeRO 0: found at the next check, two steps later" ends 70 "differ: rank 3 in step 9:" train flip 4 parallel.zero_stage=0 guard.check_every=3
check "without checks nobody knows" train blind 4 parallel.zero_stage=0
check "found before a checkpoint at the latest" ends 70 "differ: rank 3 in step 10:" train flip3 4 parallel.zero_stage=0 guard.check_every=24
check "so that none has it" [ "$(ls "$work/flip3/checkpoints")" = step_00000005 ]
check "rewind: goes on from the checkpoint, with the same data" train healed 4 parallel.zero_stage=0 guard.check_every=3 guard.policy=rewind
check "and has the bits of the run where nothing flipped" same_tensors clean0 healed
check "warn: goes on" train warned 4 parallel.zero_stage=0 guard.check_every=12 guard.policy=warn
name=warned
check "and says so" [ "$(events '.*"step":12,"what":"weights","policy":"warn","action":"applied","ranks":"3"')" -eq 1 ]
unset FAULT
FAULT_TRACE=$work/rows.two check "2 replicas" train two 2 parallel.zero_stage=0 guard.check_every=4
place=two
FAULT="$(rows 1 2) weight 0" check "of two nobody knows which" ends 70 "differ: rank 0-1 in step 4:" \
    train flip2 2 parallel.zero_stage=0 guard.check_every=4
check "no replicas: nothing to compare" train three 4 parallel.zero_stage=3 guard.check_every=1
finish

#!/usr/bin/env bash
# Is communication hidden behind compute? The emulated trainer under dev/emu's virtual clock: what overlaps is what the
# program's streams, events and waits let overlap. Matmuls and messages take time, all else takes none. At these rates
# a bucket's collective takes half as long as the matmuls of its layer in that pass.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
flops=1e12 link=12e9 latency=1e-7
layers=6 rows=128 channels=128

. dev/test/small_corpus.sh
settings=("${data[0]}" data.validation= data.tokenizer= eval.every=0 schedule.max_steps=3
    schedule.warmup_steps=1 model.num_hidden_layers=$layers model.hidden_size=$channels model.intermediate_size=352
    batch.sequence_length=8 batch.micro_batch_size=$((rows / 8)))

# train NAME RANKS [KEY=VALUE ...]: its timelines are NAME.RANK
train() {
    local name=$1 ranks=$2
    shift 2
    EMU_CLOCK=matmul=$flops,link=$link,latency=$latency EMU_CLOCK_FILE=$work/$name LAUNCH_PATIENCE=5 timeout 200 \
        dev/emu/launch -n "$ranks" "$program" configs/tiny_llama.json "${settings[@]}" "log.run_dir=$work/$name.run" "$@"
}
timeline() { # COMMAND NAME RANKS ...
    python3 dev/test/timeline.py "$1" "$work/$2" "${@:3}" || { python3 dev/test/timeline.py show "$work/$2" "$3" && return 1; }
}
# The step takes as long as llmc/layout_plan.h simulates.
simulated() { # NAME RANKS [KEY=VALUE ...]
    local name=$1 ranks=$2 seconds
    shift 2
    seconds=$(build/test/simulated_step $flops $link $latency "$ranks" configs/tiny_llama.json "${settings[@]}" "$@") || return 1
    timeline seconds "$name" "$ranks" "$seconds" 0.002
}

# The log knows it, too.
exposed() { timeline exposed "$1" "$2" "$work/$1.run/log.jsonl"; } # NAME RANKS

# Two micro-batches a rank. The embedding's bucket and the first layer's are gathered before anything can be computed,
# and summed behind the last matmul. All else has a matmul beside it.
zero=parallel.zero_stage
for z in 1 2 3; do
    name=zero$z more=($zero=$z batch.global_batch_size=$((4 * 2 * rows / 8)))
    passes=$((z == 1 ? 1 : 2)) # that sum
    check "dp 4, ZeRO $z" train $name 4 "${more[@]}"
    check "$name: sums of layers, but the last, are hidden" \
        timeline hidden $name 4 ncclReduceScatter block_backward $((passes * layers)) :-1 0.99 1
    check "$name: the first sum is, too, which is the head's" \
        timeline hidden $name 4 ncclReduceScatter step $((passes * 2)) :-1 0.99 1
    check "$name: a step takes as long as simulated" simulated $name 4 "${more[@]}"
    check "$name: the log says what is exposed" exposed $name 4
done
for z in 1 2; do
    check "zero$z: new weights come beside the next step's forward pass, but the first two buckets" \
        timeline hidden zero$z 4 ncclAllGather update $((layers + 2)) 2: 0.99 1
done
# Two layers are in their windows when the other pass turns round.
check "zero3: the second layer's weights come beside the first one's forward pass" \
    timeline hidden zero3 4 ncclAllGather step 3 2: 0.99 1
check "zero3: and so on" timeline hidden zero3 4 ncclAllGather block_forward $((layers - 1 + layers - 2)) : 0.99 1
check "zero3: backward, too" timeline hidden zero3 4 ncclAllGather block_backward $((2 * (layers - 2))) : 0.99 1

# Sums in order send everything, behind every micro-batch.
more=(parallel.deterministic=true batch.global_batch_size=$((4 * 2 * rows / 8)))
check "dp 4, deterministic" train ordered 4 "${more[@]}"
check "ordered: a step takes as long as simulated" simulated ordered 4 "${more[@]}"
check "ordered: the log says what is exposed" exposed ordered 4
echo "# deterministic: a step of $(timeline step zero1 4) s takes $(timeline step ordered 4) s"

# In two pieces: of the four gathers and scatters of a layer's forward pass the first or the last piece has no matmul
# beside it, nor has the first one of two of the six of its backward pass. (What every rank has a gradient of is summed
# with nothing beside it.)
more=(parallel.tensor_parallel_size=2 batch.global_batch_size=$((rows / 8)))
check "tp 2" train tp2 2 "${more[@]}"
check "tp2: half of a forward pass's is hidden" timeline together tp2 2 block_forward 0.499 0.501
check "tp2: five sixths of a backward pass's" timeline together tp2 2 block_backward 0.832 0.835
check "tp2: a step takes as long as simulated" simulated tp2 2 "${more[@]}"
check "tp2: the log says what is exposed" exposed tp2 2

# Four micro-batches: only the first messages and the last ones are waited for, whatever the schedule.
more=(parallel.pipeline_parallel_size=2 batch.global_batch_size=$((4 * rows / 8)))
check "pp 2" train pp2 2 "${more[@]}"
check "pp2: a step takes as long as simulated" simulated pp2 2 "${more[@]}"
check "pp2: the log says what is exposed" exposed pp2 2
check "pp 2, all forward passes first" train afab 2 "${more[@]}" parallel.pipeline_schedule=afab
check "afab: messages, but the last, are hidden" timeline hidden afab 2 ncclSend step 4 :-1 0.99 1
check "afab: a step takes as long as simulated" simulated afab 2 "${more[@]}" parallel.pipeline_schedule=afab
check "pp 2, zero bubble" train zb 2 "${more[@]}" parallel.pipeline_schedule=zero_bubble
check "zb: a step takes as long as simulated" simulated zb 2 "${more[@]}" parallel.pipeline_schedule=zero_bubble
faster() { [ "$(timeline step "$2" 2)" \< "$(timeline step "$1" 2)" ]; }
check "a step is shorter with zero bubble" faster pp2 zb
check "zb: the log says what is exposed" exposed zb 2

# Keys and values of the other rank: the backward pass has them beside the MLP's matmuls, and the last layer's still.
more=(parallel.context_parallel_size=2 batch.global_batch_size=$((rows / 8)))
check "cp 2" train cp2 2 "${more[@]}"
check "cp2: gathered beside the backward pass" \
    timeline hidden cp2 2 ncclAllGather block_backward $((layers - 1)) : 0.99 1
check "cp2: a step takes as long as simulated" simulated cp2 2 "${more[@]}"
check "cp2: the log says what is exposed" exposed cp2 2

# A rank that is half as fast: the first one waits for it, half of the time and what it waited before.
cat >"$work/second_is_slow" <<'END'
#!/bin/bash
[ "$RANK" != 1 ] || EMU_CLOCK=${EMU_CLOCK/matmul=1e12/matmul=5e11}
exec "$REAL" "$@"
END
chmod +x "$work/second_is_slow"
more=(batch.global_batch_size=$((2 * 2 * rows / 8)))
check "dp 2" train even 2 "${more[@]}"
REAL=$program program=$work/second_is_slow check "dp 2, the second rank is slow" train uneven 2 "${more[@]}"
check "the log says what is exposed" exposed even 2
check "and that of the rank that waits" exposed uneven 2
share() { exposed "$1" 2 | sed -n 's/^exposed share: //p'; }
check "half of its time" awk "BEGIN { even = $(share even); uneven = $(share uneven)
    exit !(even < 0.1 && uneven > 0.5 + even / 2 - 0.01 && uneven < 0.5 + even / 2 + 0.01) }"

# The clock is the program's, whatever order the emulator runs things in.
in_order() { sort -s -t $'\t' -k 3,3n "$work/$1"; }
same_clock() {
    local rank
    EMU_SEED=1 train "$1.drawn" "${@:2}" || return 1
    for ((rank = 0; rank < $2; rank++)); do
        [ -s "$work/$1.$rank" ] && diff <(in_order "$1.$rank") <(in_order "$1.drawn.$rank") || return 1
    done
}
check "the clock in a drawn order, ZeRO 3" same_clock zero3 4 $zero=3 batch.global_batch_size=$((4 * 2 * rows / 8))
check "the clock in a drawn order, tp 2" same_clock tp2 2 parallel.tensor_parallel_size=2 batch.global_batch_size=$((rows / 8))
finish

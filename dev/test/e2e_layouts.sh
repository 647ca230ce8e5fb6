#!/usr/bin/env bash
# Layouts: the emulated trainer as several processes. What must be equal to the bit is, ranks send what is planned, and a
# run goes on in any other layout (dev/doc/numerics.md). Whether each layout computes what one process does:
# dev/test/verify_layouts.sh.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
. dev/test/small_corpus.sh

# ----------------------------------------------------------------------------
# to the bit

small=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=8 schedule.max_steps=4
    schedule.warmup_steps=1 eval.batches=4 model.num_hidden_layers=4 model.hidden_size=32 model.intermediate_size=64)

# train NAME RANKS [KEY=VALUE ...]
train() {
    local name=$1 ranks=$2
    shift 2
    LAUNCH_PATIENCE=5 timeout 100 dev/emu/launch -n "$ranks" "$program" configs/tiny_llama.json "${data[@]}" "${small[@]}" \
        "log.run_dir=$work/$name" "$@" >"$work/$name.out" 2>&1
}
step() { printf '%s/%s/checkpoints/step_%08d' "$work" "$1" "$2"; }
same() { ./train_gpt_cpu checkpoint diff "$(step "$1" "${3:-4}")" "$(step "$2" "${3:-4}")" | grep -qE '^[0-9]+ tensors are the same to the bit$|, 0 are not$'; }

tp=parallel.tensor_parallel_size dp=parallel.data_parallel_size pp=parallel.pipeline_parallel_size
cp=parallel.context_parallel_size
det=(parallel.deterministic=true log.layers_every=2)
for ranks in 1 2 4 8; do check "deterministic, dp $ranks" train det$ranks $ranks "${det[@]}"; done
for ranks in 2 4 8; do check "deterministic: dp $ranks has the weights of dp 1" same det1 det$ranks; done
check "deterministic, ZeRO 3" train det4z3 4 "${det[@]}" parallel.zero_stage=3
check "deterministic: ZeRO 3 has them, too" same det1 det4z3
check "deterministic, dp 2 x pp 2" train det2pp2 4 "${det[@]}" parallel.pipeline_parallel_size=2
check "deterministic: and so has a pipeline" same det1 det2pp2
for zero in 0 1 2 3; do
    check "ZeRO $zero" train zero$zero 4 parallel.zero_stage=$zero batch.global_batch_size=4 log.layers_every=2
    [ $zero -eq 0 ] || check "ZeRO $zero: the bits of ZeRO 0" same zero0 zero$zero
done
for zero in 0 1 2 3; do check "ZeRO $zero, two micro-batches a rank" train twice$zero 4 parallel.zero_stage=$zero; done
check "two micro-batches a rank: ZeRO 1 has the bits of ZeRO 0" same twice0 twice1
check "two micro-batches a rank: ZeRO 3 has the bits of ZeRO 2" same twice2 twice3
for seed in 1 2; do
    check "shuffled streams, seed $seed" env EMU_SEED=$seed dev/emu/launch -n 4 "$program" \
        configs/tiny_llama.json "${data[@]}" "${small[@]}" "log.run_dir=$work/seed$seed" batch.global_batch_size=4 \
        parallel.zero_stage=3
    check "shuffled streams: the same bits" same zero3 seed$seed
done

# ----------------------------------------------------------------------------
# the norms of layers

layers() { grep '"event":"layers"' "$work/$1/log.jsonl" | sed 's/"time":[^,]*,//'; }
same_layers() { [ "$(layers "$1" | wc -l)" -eq 2 ] && diff <(layers "$1") <(layers "$2"); }
for name in det2 det4 det8 det4z3 det2pp2; do check "$name: the norms of layers are those of one process" same_layers det1 $name; done
for zero in 1 2 3; do check "ZeRO $zero: the norms of layers are those of ZeRO 0" same_layers zero0 zero$zero; done
check "one process, layers are not measured" train plain1 1
check "to measure them changes nothing" same det1 plain1
for schedule in zero_bubble interleaved; do
    check "norms of layers, $schedule" train layers_$schedule 2 log.layers_every=2 $pp=2 parallel.pipeline_schedule=$schedule \
        parallel.virtual_pipeline_size=$([ $schedule = interleaved ] && echo 2 || echo 1)
    check "$schedule: they are those of one process" same_layers det1 layers_$schedule
done
# In layouts that add up in another order: near those of one process. In all: gradients add up to the norm of all.
close_layers() { # NAME NAME TOLERANCE
    python3 - "$3" "$work/$1/log.jsonl" "$work/$2/log.jsonl" <<'PYTHON'
import json, sys
tolerance, runs = float(sys.argv[1]), []
for path in sys.argv[2:]:
    events = [json.loads(line) for line in open(path)]
    norms = {e["step"]: e["grad_norm"] for e in events if e["event"] == "step"}
    layers = [e for e in events if e["event"] == "layers"]
    assert [e["step"] for e in layers] == [2, 4]
    for e in layers:
        assert abs(sum(x * x for x in e["grad_norm"]) / norms[e["step"]] ** 2 - 1) < 1e-7, e
    runs.append([x for e in layers for key, xs in e.items() if isinstance(xs, list) for x in xs])
worst = max(abs(x / y - 1) for x, y in zip(*runs))
print(worst)
sys.exit(len(runs[0]) != 48 or len(runs[1]) != 48 or worst > tolerance)
PYTHON
}
near() { # NAME OF RANKS [KEY=VALUE ...]
    local name=$1 of=$2 ranks=$3
    shift 3
    train "$name" "$ranks" log.layers_every=2 "$@" && close_layers "$name" "$of" 0.01
}
tied=model.tie_word_embeddings=true
check "norms of layers, tp 4 with 2 key/value heads" near layers_tp det1 4 $tp=4
check "norms of layers, tp 2 x cp 2, recomputed" near layers_cp det1 4 $tp=2 $cp=2 batch.recompute=block
check "norms of layers, tied" train tied1 1 log.layers_every=2 $tied
check "norms of layers, tied, dp 2 x pp 2" near layers_tied tied1 4 $tied $pp=2

# ----------------------------------------------------------------------------
# what ranks send is what plan says

# One more step sends so many bytes more: the busiest rank of each axis, against plan's lines.
traffic() { # RANKS [KEY=VALUE ...]
    local ranks=$1 steps
    shift
    local more=(data.validation= data.tokenizer= eval.every=0 "$@")
    "$program" plan configs/tiny_llama.json "${data[@]}" "${small[@]}" "${more[@]}" >"$work/plan" 2>&1 || { cat "$work/plan"; return 1; }
    rm -rf "$work"/traffic[23]
    for steps in 2 3; do
        EMU_NCCL_TRAFFIC=$work/sent$steps train traffic$steps "$ranks" "${more[@]}" schedule.max_steps=$steps || return 1
    done
    python3 - "$work" "$ranks" <<'PYTHON'
import collections, re, sys
work, ranks = sys.argv[1], int(sys.argv[2])
axes = {0: "sums of the step", 1: "tensor parallel", 2: "data parallel", 3: "tensor parallel", 4: "context parallel",
        5: "tied embedding"}
most = collections.Counter()
for rank in range(ranks):
    sent = collections.Counter()
    for steps, sign in ((2, -1), (3, 1)):
        for line in open(f"{work}/sent{steps}.{rank}"):
            number, _, _, _, bytes = line.split()
            sent[axes.get(int(number), "pipeline")] += sign * int(bytes)
    for axis, bytes in sent.items():
        most[axis] = max(most[axis], bytes)
planned = {name.strip(): int(n.replace(",", "")) for name, n in
           re.findall(r"^  ([a-z ]+?)  +([0-9,]+)$", open(f"{work}/plan").read().split("traffic  ")[1], re.M)}
counted = {axis: bytes for axis, bytes in most.items() if bytes}
print("planned", planned, "counted", counted)
sys.exit(planned != counted)
PYTHON
}
check "traffic, tp 2" traffic 2 $dp=1 $tp=2
check "traffic, tp 4 with 2 key/value heads" traffic 4 $dp=1 $tp=4 batch.recompute=block
for zero in 0 1 2 3; do check "traffic, dp 2, ZeRO $zero" traffic 2 $dp=2 parallel.zero_stage=$zero; done
check "traffic, dp 2, deterministic" traffic 2 $dp=2 parallel.deterministic=true
check "traffic, pp 2, two chunks" traffic 2 $dp=1 $pp=2 parallel.virtual_pipeline_size=2 parallel.pipeline_schedule=interleaved
check "traffic, cp 2" traffic 2 $dp=1 $cp=2
check "traffic, cp 2 x pp 2, zero bubble" traffic 4 $dp=1 $cp=2 $pp=2 parallel.pipeline_schedule=zero_bubble
check "traffic, tp 2 x cp 2 x pp 2, two chunks, recomputed" traffic 8 $dp=1 $tp=2 $cp=2 $pp=2 batch.recompute=block \
    parallel.virtual_pipeline_size=2 parallel.pipeline_schedule=interleaved
check "traffic, tp 2 x pp 2, zero bubble" traffic 4 $dp=1 $tp=2 $pp=2 parallel.pipeline_schedule=zero_bubble
check "traffic, tp 2 x dp 2 x pp 2, tied" traffic 8 $dp=2 $tp=2 $pp=2 parallel.zero_stage=2 model.tie_word_embeddings=true

# ----------------------------------------------------------------------------
# a run goes on in any layout

goes_on() { # RANKS LAST STEP [KEY=VALUE ...]
    local ranks=$1 last=$2
    shift 2
    train elastic "$ranks" "${det[@]}" checkpoint.every=2 checkpoint.keep_last=9 schedule.max_steps=10 "$@"
}
# The learning rate must be that of ten steps, so runs are stopped, not shortened.
stop_at() { # RANKS STEP [KEY=VALUE ...]: ends it once the checkpoint of that step is there
    local ranks=$1 at=$2 pid
    shift 2
    (goes_on "$ranks" "$at" "$@") &
    pid=$!
    for _ in $(seq 600); do
        [ -d "$(step elastic "$at")" ] && break
        sleep 0.05
    done
    pkill -KILL -f "log.run_dir=$work/elastic" -n # one rank dies; the launcher ends the others
    wait $pid 2>/dev/null
    [ -d "$(step elastic "$at")" ]
}
check "ten steps without a break" train whole 4 "${det[@]}" schedule.max_steps=10
check "on 4 ranks, until one is killed" stop_at 4 2
check "on 2 ranks, tensor parallel off, ZeRO 2, until one is killed" stop_at 2 4 parallel.zero_stage=2
check "on 8 ranks, until one is killed" stop_at 8 6
check "on one, to the end" goes_on 1 10
check "the weights are those of the run without a break" same whole elastic 10
check "the losses, too" diff <(grep -h '"event":"step"' "$work/whole/log.jsonl" | sed 's/.*"step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2/') \
    <(grep -h '"event":"step"' "$work/elastic/log.jsonl" | sed 's/.*"step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2/' | sort -snk1 -u)
round_trip() {
    local from=round1 n
    train round1 1 schedule.max_steps=2 || return 1
    for n in "2 tensor_parallel_size=2" "4 pipeline_parallel_size=2" \
        "8 zero_stage=3 parallel.context_parallel_size=2" "1 zero_stage=1"; do
        set -- $n
        train "trip$1" "$1" "parallel.$2" ${3:-} schedule.max_steps=2 "checkpoint.load_from=$(step $from 2)" optimizer.learning_rate=0 || return 1
        from=trip$1
    done
    cmp "$(step round1 2)/model.safetensors" "$(step trip1 2)/model.safetensors"
}
check "weights survive 1, 2, 4, 8 and 1 processes to the bit" round_trip
validation_loss() { sed -n 's/.*"event":"eval".*"loss":\([0-9.]*\).*/\1/p' "$work/$1/log.jsonl" | tail -n 1; }
# The same tokens are evaluated, by all ranks that have rows; one step changes weights by next to nothing.
same_evaluation() { # NAME RANKS [KEY=VALUE ...]
    local name=$1 ranks=$2
    shift 2
    train "$name" "$ranks" schedule.max_steps=1 optimizer.learning_rate=0 eval.every=1 "$@" &&
        python3 -c 'import sys; a, b = map(float, sys.argv[1:]); print(a, b); sys.exit(abs(a - b) > 2e-4 * a)' \
            "$(validation_loss alone)" "$(validation_loss "$name")"
}
check "evaluation on one process" train alone 1 schedule.max_steps=1 optimizer.learning_rate=0 eval.every=1
check "evaluation: cp 2" same_evaluation eval_cp 2 $cp=2
check "evaluation: dp 2 x cp 2 with documents" same_evaluation eval_dpcp 4 $cp=2
check "evaluation: tp 2 x cp 2 x pp 2" same_evaluation eval_all 8 $cp=2 $tp=2 $pp=2

# A head larger than all else is written by a stage that does not have it.
big_head() {
    train big4 4 "${big[@]}" parallel.pipeline_parallel_size=4 && train big1 1 "${big[@]}" && same big1 big4
}
big=(model.vocab_size=8192 schedule.max_steps=4)
check "a stage writes what is larger than its own layers" big_head

# ----------------------------------------------------------------------------
# saving together

# A disk that is full for one of them: all go on without that checkpoint, and it is said once.
full_disk() {
    rm -rf "$work/full"
    LAUNCH_PATIENCE=5 timeout 60 dev/emu/launch -n 2 bash -c 'if [ $RANK = 1 ]; then trap "" XFSZ; ulimit -f 700; fi; exec "$@"' - \
        "$program" configs/tiny_llama.json "${data[@]}" "${small[@]}" "log.run_dir=$work/full" checkpoint.every=2 \
        model.hidden_size=128 model.intermediate_size=256 >"$work/full.out" 2>&1
    [ $? -eq 74 ] && [ "$(grep -c 'warning: no checkpoint at step 2: rank 1: cannot write' "$work/full.out")" = 1 ] &&
        [ "$(grep -c 'error: ' "$work/full.out")" = 1 ] && [ -z "$(ls "$work/full/checkpoints")" ] || { cat "$work/full.out"; return 1; }
}
check "a disk that is full for one process" full_disk
# The first process has the clock; all of them save together.
by_the_clock() {
    train clock 4 checkpoint.minutes=0.0001 checkpoint.keep_last=9 parallel.pipeline_parallel_size=2 &&
        [ -d "$(step clock 2)" ] && [ -z "$(grep 'warning: no checkpoint' "$work/clock.out")" ] ||
        { cat "$work/clock.out"; return 1; }
}
check "checkpoints by the clock" by_the_clock
stop_one() {
    rm -rf "$work/stop"
    (train stop 2 schedule.max_steps=2000; echo "exit $?" >>"$work/stop.out") &
    for _ in $(seq 300); do grep -q '^step' "$work/stop.out" 2>/dev/null && break; sleep 0.05; done
    pkill -TERM -f "log.run_dir=$work/stop" -n
    wait $!
    grep -q 'exit 75' "$work/stop.out" && [ "$(grep -c 'error: stopped by' "$work/stop.out")" = 1 ] &&
        [ -d "$(ls -d "$work"/stop/checkpoints/step_*)" ] || { cat "$work/stop.out"; return 1; }
}
check "a signal to one process stops all, behind a checkpoint" stop_one
# stop_beside STEP [KEY=VALUE ...]: a signal to the second process alone, behind that step
stop_beside() {
    local from=$1
    shift
    rm -rf "$work/beside"
    (train beside 2 schedule.max_steps=2000 "$@"; echo "exit $?" >>"$work/beside.out") &
    for _ in $(seq 600); do grep -q "^step *$from/" "$work/beside.out" 2>/dev/null && break; sleep 0.05; done
    pkill -TERM -f "log.run_dir=$work/beside" -n
    wait $!
    last=$(ls "$work/beside/checkpoints") last=$((10#${last#step_}))
    grep -q 'exit 75' "$work/beside.out" && ! grep -qaE "^eval +$last |sample 1 at step $last\$" "$work/beside.out" && return
    grep -av '^step' "$work/beside.out"
    return 1
}
long() { stop_beside 3 eval.every=3 eval.batches=0 "data.validation=$work/data/train_*.bin" && [ "$last" -eq 3 ]; }
check "it cuts an evaluation short, whose step is saved" long
check "it leaves no time for what is due" stop_beside 5 eval.every=1 sample.every=1 sample.max_new_tokens=4
damaged() {
    train damaged 2 checkpoint.every=2 || { cat "$work/damaged.out"; return 1; }
    python3 -c 'import sys; f = open(sys.argv[1], "r+b"); f.seek(3000); b = f.read(1)[0]; f.seek(3000); f.write(bytes([b ^ 1]))' \
        "$(ls "$(step damaged 4)"/model-00002*)" # whatever is there, it is different now
    train damaged 4 checkpoint.every=2 checkpoint.keep_last=9 || { cat "$work/damaged.out"; return 1; }
    grep -q 'step_00000004 cannot be used' "$work/damaged.out" && grep -q 'checkpoints, step 2' "$work/damaged.out" &&
        [ -d "$(step damaged 4).bad" ] && [ -d "$(step damaged 4)" ]
}
check "a damaged file of one process: all take the checkpoint before" damaged
# What all found out together is said by one of them.
together() { # CODE 'regular expression' [KEY=VALUE ...]
    local code=$1 text=$2
    shift 2
    train damaged 4 schedule.max_steps=6 "$@"
    [ $? -eq "$code" ] && [ "$(grep -c '^error: ' "$work/damaged.out")" -eq 1 ] && grep -qE "^error: .*$text" "$work/damaged.out" && return
    cat "$work/damaged.out"
    return 1
}
check "other data than the checkpoint's are said once" together 78 'not those that the newest checkpoint' seed=2
spoil() { for file in "$work"/damaged/checkpoints/step_*[0-9]/state.json; do echo '{}' >"$file"; done; }
spoil
check "that no checkpoint is whole is said once" together 65 'no checkpoint in .* is whole'

# ----------------------------------------------------------------------------
# layouts that cannot run

refused() { # RANKS 'regular expression' [KEY=VALUE ...]
    local ranks=$1 text=$2
    shift 2
    train refused "$ranks" "$@"
    [ $? -eq 78 ] && grep -qE -- "$text" "$work/refused.out" || { cat "$work/refused.out"; return 1; }
}
check "heads that do not divide" refused 3 'tensor_parallel_size is 3 and model.num_attention_heads 4.* 2 works|1 works' parallel.tensor_parallel_size=3
check "positions that do not divide" refused 4 'context_parallel_size is 4 and batch.sequence_length 12.*multiple of 8; 3 works' \
    parallel.context_parallel_size=4 batch.sequence_length=12
check "too few layers" refused 8 'needs a layer for each.* 4 stages' parallel.pipeline_parallel_size=8
check "processes that do not divide" refused 3 '3 processes were started' parallel.tensor_parallel_size=2
check "a batch that does not divide" refused 3 'global_batch_size is 8' model.num_hidden_layers=4
check "ZeRO 0 with ordered sums" refused 2 'zero_stage=1' parallel.zero_stage=0 parallel.deterministic=true
check "weight gradients put off, of what is not kept" refused 2 'zero_bubble.*recompute=none' parallel.pipeline_parallel_size=2 \
    parallel.pipeline_schedule=zero_bubble batch.recompute=block
advice() { # what would fit is what can run
    local more=(parallel.pipeline_parallel_size=2 parallel.pipeline_schedule=zero_bubble data.tokenizer= eval.every=0 data.validation=) planned
    planned=$("$program" plan configs/tiny_llama.json "${data[@]}" "${small[@]}" "${more[@]}" | sed -n 's/^  memory, stage 1 *\([0-9,]*\) .*/\1/p' | tr -d ,)
    EMU_MEMORY=$((planned - 1)) train advice 2 "${more[@]}"
    [ $? -ne 0 ] && grep -q 'set precision.moments=bf16' "$work/advice.out" && ! grep -q 'recompute=' "$work/advice.out" || { cat "$work/advice.out"; return 1; }
}
check "memory advice for zero bubble does not recompute" advice
check "samples in a pipeline" refused 2 'sample.every' parallel.pipeline_parallel_size=2 sample.every=1 sample.prompt=a
check "micro-batches that interleaving cannot place" refused 2 'micro' parallel.pipeline_parallel_size=2 \
    parallel.virtual_pipeline_size=2 parallel.pipeline_schedule=interleaved batch.global_batch_size=3
check "a layout that is misspelt" bash -c "! '$program' verify configs/tiny_gpt2.json dp2xx2 ${data[0]@Q} 2>&1 | grep -qv 'is wanted'"
check "the CPU reference is one process" bash -c "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 timeout 20 ./train_gpt_cpu configs/tiny_gpt2.json ${data[0]@Q} parallel.start_timeout=1 2>&1 | grep -qE 'error'"
finish

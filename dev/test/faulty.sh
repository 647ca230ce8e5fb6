# Sourced by tests that train with numbers that go wrong where they are told to (dev/test/faulty.h), behind tap.sh: builds the
# faulty GPU trainer, and makes data and a small run of $steps steps of it.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LAUNCH_PATIENCE=10
. dev/test/small_corpus.sh
dev/emu/compile "$work/faulty_gpu" dev/test/faulty_gpu.cu -O2 -march=native -fopenmp -Wall -Wextra -Werror -DUSE_NCCL \
    -lcjson -lxxhash -lpcre2-8 -lz -lzstd >"$work/log" 2>&1 || cat "$work/log"
small=(data.validation= batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=8 schedule.max_steps=$steps
    schedule.warmup_steps=1 checkpoint.every=5 checkpoint.keep_last=9 model.num_hidden_layers=2 model.hidden_size=32
    model.intermediate_size=64)

# train NAME PLACE [KEY=VALUE ...]: PLACE is cpu, or a number of processes
train() {
    local name=$1 place=$2 command=(dev/emu/launch -n "$2" "$work/faulty_gpu")
    shift 2
    [ "$place" != cpu ] || command=(build/test/faulty_cpu)
    timeout 200 "${command[@]}" configs/tiny_llama.json "${data[@]}" "${small[@]}" "log.run_dir=$work/$name" "$@" \
        >"$work/$name.out" 2>"$work/$name.err"
}
step() { printf '%s/%s/checkpoints/step_%08d' "$work" "$1" "$steps"; }
same() { ./train_gpt_cpu checkpoint diff "$(step "$1")" "$(step "$2")"; } # state.json, too
same_tensors() { same "$1" "$2" | grep -qE '^[0-9]+ tensors are the same to the bit$|, 0 are not$'; }
events() { grep -c "\"event\":\"guard\"${1:-}" "$work/$name/log.jsonl"; } # [MORE OF THE LINE]
state() { sed -n "s/.*\"$2\": \([0-9]*\),*/\1/p" "$(step "$1")/state.json"; }
# ends CODE TEXT command...: that exit code, and the text on stderr, said once
ends() {
    local code=$1 text=$2 got
    shift 2
    "$@"
    got=$?
    [ $got -eq "$code" ] && [ "$(grep -c '^error: ' "$work/$2.err")" -eq 1 ] && grep -qF -- "$text" "$work/$2.err" && return
    echo "exit code $got, not $code; or stderr lacks: $text"
    cat "$work/$2.err"
    return 1
}
# The hash of the rows of a rank in step N of the run with that FAULT_TRACE, from 1 on.
rows() { sed -n "$2p" "$work/rows.$place.$1"; } # RANK STEP

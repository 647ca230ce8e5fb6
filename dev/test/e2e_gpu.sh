#!/usr/bin/env bash
# The CUDA trainer from a shell: what e2e_train.sh asks of the CPU reference, and what only a GPU program has:
# memory that was planned, recompute, storage in bf16, graphs, autotuning, checkpoints that cross over to the
# CPU and back, a missing driver. The emulated program runs everywhere; TRAIN_GPT=./train_gpt takes a real one.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=2

. dev/test/small_corpus.sh

# Small enough for an emulated GPU, with heads of 64, which have the tensor cores' kernels. The learning rate keeps
# bf16 and fp32 together (0.001 apart after 8 steps, whatever the text says; at 1e-2 now and then 0.02).
small=(batch.micro_batch_size=2 batch.sequence_length=32 batch.global_batch_size=4 schedule.max_steps=8
    schedule.warmup_steps=2 optimizer.learning_rate=3e-3 eval.batches=8)
declare -A heads=([tiny_gpt2]=model.n_head=1
    [tiny_llama]="model.num_attention_heads=2 model.num_key_value_heads=1 model.head_dim=64")

# with PROGRAM COMMAND CONFIG RUN_DIR [argument | key=value ...]
with() {
    local binary=$1 name=$2 config=$3 run=$4
    shift 4
    "$binary" "$name" "configs/$config.json" ${OUT_DIR:-} "data.train=$work/data/train_*.bin" \
        "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
        "log.run_dir=$work/$run" "${small[@]}" ${heads[$config]} "$@" 2>"$work/err"
}
train() { with "$program" train "$@" >"$work/out"; }
on_cpu() { with ./train_gpt_cpu train "$@" >"$work/out"; }
same() { ./train_gpt_cpu checkpoint diff "$work/$1" "$work/$2"; }
differ() { ! same "$@" >/dev/null 2>&1; }
exits() { # CODE 'text in stderr' command...
    local code=$1 text=$2 got
    shift 2
    "$@" >/dev/null
    got=$?
    [ "$got" -eq "$code" ] && grep -qF -- "$text" "$work/err" && [ "$(grep -c '^error: ' "$work/err")" -eq 1 ] && return
    echo "exit code $got, not $code; or stderr lacks: $text"
    cat "$work/err"
    return 1
}
exits_internal() { # the same for an internal error
    local code=$1 text=$2 got
    shift 2
    "$@" >/dev/null
    got=$?
    [ "$got" -eq "$code" ] && grep -qF -- "$text" "$work/err" && grep -q '^internal error' "$work/err"
}
json() { grep -F -- "$1" | tail -n 1 | grep -oE "\"$2\":[-0-9.e+]+" | cut -d: -f2; } # FILTER KEY
near() { awk -v a="$1" -v b="$2" -v d="$3" 'BEGIN { e = a - b; exit !(a != "" && b != "" && e < d && e > -d) }'; }
last=checkpoints/step_00000008

for config in tiny_gpt2 tiny_llama; do
    check "$config trains" train $config $config
    first=$(json '"event":"step"' loss <<<"$(grep '"step":1,' "$work/$config/log.jsonl")")
    loss=$(json '"event":"eval"' loss <"$work/$config/log.jsonl")
    check "$config learns: validation loss $loss is at least 0.3 below $first" \
        awk -v a="$first" -v b="$loss" 'BEGIN { exit !(a > 5.9 && a < 6.6 && b < a - 0.3) }'
    check "$config: the checkpoint verifies" ./train_gpt_cpu checkpoint verify "$work/$config/$last"
    train $config $config.again
    check "$config: the same command gives the same bits" same $config/$last $config.again/$last

    on_cpu $config $config.cpu
    cpu=$(json '"event":"eval"' loss <"$work/$config.cpu/log.jsonl")
    check "$config: the CPU reference gets there too ($cpu)" near "$loss" "$cpu" 0.005

    # half the way on one, the other half on the other
    train $config $config.to_cpu schedule.max_steps=4 schedule.type=constant
    check "$config: a GPU checkpoint goes on on the CPU" on_cpu $config $config.to_cpu schedule.type=constant
    on_cpu $config $config.to_gpu schedule.max_steps=4 schedule.type=constant
    check "$config: a CPU checkpoint goes on on the GPU" train $config $config.to_gpu schedule.type=constant
    on_cpu $config $config.constant schedule.type=constant
    reference=$(json '"event":"eval"' loss <"$work/$config.constant/log.jsonl")
    for way in to_cpu to_gpu; do
        crossed=$(json '"event":"eval"' loss <"$work/$config.$way/log.jsonl")
        check "$config, $way: and ends where the CPU does ($crossed, $reference)" near "$crossed" "$reference" 0.005
    done

    train $config $config.stopped schedule.max_steps=3 checkpoint.every=3 schedule.type=constant
    train $config $config.stopped schedule.type=constant
    train $config $config.through schedule.type=constant
    check "$config: a resume gives the bits of a run that never stopped" same $config.stopped/$last $config.through/$last
    for delay in 0.3 0.6 0.9; do
        (timeout --foreground -s KILL $delay "$program" configs/$config.json "data.train=$work/data/train_*.bin" \
            "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
            "log.run_dir=$work/$config.killed" "${small[@]}" ${heads[$config]} checkpoint.every=2; true) >/dev/null 2>&1
    done
    flock -w 10 "$work/$config.killed" true # the last one may still be dying, and holds the run's lock
    train $config $config.killed checkpoint.every=2
    check "$config: killed three times, resumed, the same bits" same $config/$last $config.killed/$last

    evaluated=$(with "$program" eval $config $config | json loss loss)
    check "$config: eval repeats the run's last validation loss" near "$loss" "$evaluated" 1e-6
    OUT_DIR=$work/$config.export check "$config: export writes a model directory" with "$program" export $config $config
    exported=$(with ./train_gpt_cpu eval $config nothing "checkpoint.load_from=$work/$config.export" | json loss loss)
    check "$config: the exported model evaluates alike on the CPU ($exported)" near "$exported" "$evaluated" 0.005

    # memory against time: the same numbers
    train $config $config.none precision.fused_gelu=false
    for level in activation norm block; do
        train $config $config.$level precision.fused_gelu=false batch.recompute=$level
        check "$config: recompute $level gives the same bits" same $config.none/$last $config.$level/$last
    done
    train $config $config.graph parallel.cuda_graph=true
    check "$config: a CUDA graph gives the same bits" same $config/$last $config.graph/$last

    # storage in bf16: other numbers, the same curve
    for storage in gradients=bf16 moments=bf16 "gradients=bf16 precision.moments=bf16 precision.master_weights=bf16"; do
        # shellcheck disable=SC2086
        train $config "$config.${storage##* }.lean" precision.$storage
        lean=$(json '"event":"eval"' loss <"$work/$config.${storage##* }.lean/log.jsonl")
        check "$config: precision.$storage trains alike ($lean)" near "$loss" "$lean" 0.005
        check "$config: precision.$storage is not ignored" differ $config/$last "$config.${storage##* }.lean/$last"
    done
done

check "documents are masked" train tiny_llama masked data.document_mask=true
on_cpu tiny_llama masked.cpu data.document_mask=true
a=$(json '"event":"eval"' loss <"$work/masked/log.jsonl") b=$(json '"event":"eval"' loss <"$work/masked.cpu/log.jsonl")
check "as on the CPU ($a, $b)" near "$a" "$b" 0.005

train tiny_gpt2 tuned parallel.autotune=true
check "autotuning stores its choices beside the run" grep -q . "$work/tuned/matmul_algorithms.txt"
train tiny_gpt2 tuned.again parallel.autotune=true schedule.max_steps=4
cp "$work/tuned/matmul_algorithms.txt" "$work/choices"
train tiny_gpt2 tuned schedule.max_steps=10 parallel.autotune=true
check "and a resume keeps them" cmp "$work/choices" "$work/tuned/matmul_algorithms.txt"

train tiny_gpt2 sampled schedule.max_steps=24 optimizer.learning_rate=1e-2 # has clear favourites among the tokens
sample() { with "$1" sample tiny_gpt2 sampled sample.prompt=static "${@:2}"; }
sample "$program" >"$work/a"
sample "$program" >"$work/b"
sample "$program" sample.temperature=0 sample.max_new_tokens=8 >"$work/c"
sample ./train_gpt_cpu sample.temperature=0 sample.max_new_tokens=8 >"$work/d"
check "a sample continues the prompt" continues static "$work/a"
check "the same seed, the same text" cmp "$work/a" "$work/b"
check "the likeliest text is the CPU's" cmp "$work/c" "$work/d"

# what cannot run
check "the CPU's precision: exit 78" exits 78 "precision.compute" train tiny_gpt2 none precision.compute=fp32
check "a size that is no multiple of 8: exit 78" exits 78 "hidden_size" train tiny_gpt2 none model.n_embd=60 model.n_head=5
check "the fused GELU and recompute: exit 78" exits 78 "precision.fused_gelu" train tiny_gpt2 none batch.recompute=norm
check "a diverging run gives up: exit 70" exits 70 "not finite" train tiny_gpt2 diverged optimizer.learning_rate=100 \
    optimizer.grad_clip=0 optimizer.weight_decay=100 schedule.warmup_steps=0 schedule.max_steps=200 guard.max_skipped_steps=3
train tiny_gpt2 skipped optimizer.learning_rate=100 optimizer.grad_clip=0 optimizer.weight_decay=100 \
    schedule.warmup_steps=0 schedule.max_steps=200 checkpoint.every=1 checkpoint.keep_last=2 guard.max_skipped_steps=3
check "a skipped step leaves the weights as they were" sh -c "cmp $work/skipped/checkpoints/step_*/model.safetensors"
check "the CPU cannot train with bf16 moments: exit 78" exits 78 "precision.moments" on_cpu tiny_gpt2 none precision.moments=bf16

if [ "$program" != ./train_gpt_emu ]; then
    finish
fi
# the emulated device can be told to be small, old or absent
planned=$(with "$program" plan tiny_gpt2 tiny_gpt2 | awk '/^  total/ { gsub(",", "", $2); print $2 }')
check "plan says how much memory a run takes ($planned bytes)" [ "${planned:-0}" -gt 1000000 ]
exact() { EMU_MEMORY=$planned train "$@"; }
check "with exactly that the run runs" exact tiny_gpt2 exact
less() { EMU_MEMORY=$((planned - 1)) train "$@"; }
check "with a byte less it is refused: exit 71" exits 71 "batch.recompute=" less tiny_gpt2 none
refused() { EMU_CUBLASLT_REFUSE=GELU_AUX_BIAS train "$@"; }
check "no fused GELU in cuBLASLt: exit 70, and what to set" exits_internal 70 "precision.fused_gelu=false" refused tiny_gpt2 none
check "and it is in the run directory" grep -q '^70 internal error at .*fused_gelu' "$work/none/FATAL"
absent() { EMU_NO_DRIVER=1 train "$@"; }
check "no driver: exit 69" exits 69 "driver" absent tiny_gpt2 none
old() { EMU_ARCH=75 train "$@"; }
check "an old GPU: exit 69" exits 69 "sm_75" old tiny_gpt2 none
plan_absent() { EMU_NO_DRIVER=1 with "$program" plan tiny_gpt2 none | grep -q "^  total"; }
check "plan without a driver" plan_absent
finish

#!/usr/bin/env bash
# train_gpt_cpu from a shell, on this project's own text: training, resuming, evaluating, sampling, exporting,
# being killed, and being given what cannot run.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=2 # a run is bitwise repeatable on the same number of threads

. dev/test/small_corpus.sh

# train CONFIG RUN_DIR [key=value ...]
train() {
    local config=$1 run=$2
    shift 2
    ./train_gpt_cpu "configs/$config.json" "data.train=$work/data/train_*.bin" \
        "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
        "log.run_dir=$work/$run" "$@" >"$work/out" 2>"$work/err"
}
command() { # COMMAND CONFIG RUN_DIR [argument | key=value ...]
    local name=$1 config=$2 run=$3
    shift 3
    ./train_gpt_cpu "$name" "configs/$config.json" ${OUT_DIR:-} "data.train=$work/data/train_*.bin" \
        "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
        "log.run_dir=$work/$run" "$@" 2>"$work/err"
}
same() { ./train_gpt_cpu checkpoint diff "$work/$1" "$work/$2"; }
# exits CODE 'text in stderr' command...: the command must exit with that code and say that
exits() {
    local code=$1 text=$2 got
    shift 2
    "$@" >/dev/null
    got=$?
    [ "$got" -eq "$code" ] && grep -qF -- "$text" "$work/err" && [ "$(grep -c '^error: ' "$work/err")" -eq 1 ] && return
    echo "exit code $got, not $code; or stderr lacks: $text"
    cat "$work/err"
    return 1
}
json() { # FILTER KEY: the KEY of the last line of stdin that has FILTER
    grep -F -- "$1" | tail -n 1 | grep -oE "\"$2\":[-0-9.e+]+" | cut -d: -f2
}

for config in tiny_gpt2 tiny_llama; do
    check "$config trains" train $config $config
    first=$(json '"event":"step","' loss <<<"$(grep '"step":1,' "$work/$config/log.jsonl")")
    last=$(json '"event":"eval"' loss <"$work/$config/log.jsonl")
    check "$config learns: validation loss $last is at least 0.4 below $first" \
        awk -v a="$first" -v b="$last" 'BEGIN { exit !(a > 5.9 && a < 6.6 && b < a - 0.4) }'
    check "$config: the checkpoint verifies" ./train_gpt_cpu checkpoint verify "$work/$config/checkpoints/step_00000040"

    train $config $config.again
    check "$config: the same command gives the same bits" \
        same $config/checkpoints/step_00000040 $config.again/checkpoints/step_00000040
    for compute in fp32 bf16; do # few and small steps: later a rounding error may decide where a run gets to
        train $config $config.$compute precision.compute=$compute optimizer.learning_rate=1e-3 schedule.max_steps=10
    done
    fp32=$(json '"event":"eval"' loss <"$work/$config.fp32/log.jsonl")
    bf16=$(json '"event":"eval"' loss <"$work/$config.bf16/log.jsonl")
    check "$config: bf16 matmuls train alike ($bf16, $fp32)" \
        awk -v a="$fp32" -v b="$bf16" 'BEGIN { d = a - b; exit !(d != 0 && d < 0.001 && d > -0.001) }'

    # stopped, then resumed: by a signal, and by SIGKILL at a moment of nobody's choosing
    for signal in TERM INT; do
        run=stopped_$signal
        (
            exec ./train_gpt_cpu configs/$config.json "data.train=$work/data/train_*.bin" \
                "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
                "log.run_dir=$work/$config.$run" >"$work/out" 2>"$work/err"
        ) &
        pid=$!
        until grep -q '"step":5,' "$work/$config.$run/log.jsonl" 2>/dev/null || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
        for _ in 1 2 3 4 5 6 7 8; do kill -s $signal $pid 2>/dev/null; done # an impatient user
        wait $pid
        check "$config: SIG$signal saves and exits 75" [ $? -eq 75 ]
        check "$config: what it saved verifies" ./train_gpt_cpu checkpoint verify "$work/$config.$run"/checkpoints/step_*
        check "$config: it says so" grep -q 'stopped by signal' "$work/err"
        check "$config: to scripts, too" [ "$(cat "$work/$config.$run/RUN_STATE")" = stopped ]
        check "$config: it goes on from there" train $config $config.$run
        check "$config: with the bits of a run that never stopped" \
            same $config/checkpoints/step_00000040 $config.$run/checkpoints/step_00000040
        check "$config: and is done" [ "$(cat "$work/$config.$run/RUN_STATE")" = done ]
    done
    for delay in 0.05 0.15 0.25 0.4; do
        # the subshell keeps bash from reporting the kill; in the foreground, timeout waits for what it has killed
        (timeout --foreground -s KILL $delay ./train_gpt_cpu configs/$config.json "data.train=$work/data/train_*.bin" \
            "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/data/tokenizer.json" \
            "log.run_dir=$work/$config.killed" checkpoint.every=3; true) >/dev/null 2>&1
    done
    train $config $config.killed checkpoint.every=3
    check "$config: killed four times, resumed, the same bits" \
        same $config/checkpoints/step_00000040 $config.killed/checkpoints/step_00000040

    evaluated=$(command eval $config $config | json loss loss)
    check "$config: eval repeats the run's last validation loss" \
        awk -v a="$last" -v b="$evaluated" 'BEGIN { exit !(a - b < 1e-6 && b - a < 1e-6) }'
    OUT_DIR=$work/$config.export check "$config: export writes a model directory" command export $config $config
    exported=$(command eval $config nothing "checkpoint.load_from=$work/$config.export" | json loss loss)
    check "$config: the exported model evaluates to the same loss" [ "$exported" = "$evaluated" ]
    check "$config: plan names parameters, FLOPs and memory" \
        awk '/^parameters /{p=1} /PaLM/{f=1} /^  total/{m=1} END {exit !(p && f && m)}' <(command plan $config $config)
done

# accumulation: the same batch in one piece and in four
train tiny_gpt2 whole schedule.max_steps=10
train tiny_gpt2 quarters schedule.max_steps=10 batch.micro_batch_size=2 batch.global_batch_size=8
a=$(json '"event":"eval"' loss <"$work/whole/log.jsonl") b=$(json '"event":"eval"' loss <"$work/quarters/log.jsonl")
check "micro-batches add up to the batch ($a, $b)" awk -v a="$a" -v b="$b" 'BEGIN { exit !(a - b < 1e-4 && b - a < 1e-4) }'
check "documents are masked without complaint" train tiny_llama masked data.document_mask=true
c=$(json '"event":"eval"' loss <"$work/masked/log.jsonl")
check "and the mask changes the loss ($c)" [ "$c" != "$(json '"event":"eval"' loss <"$work/tiny_llama/log.jsonl")" ]

# a model that knows nothing gives every token 1/512: a loss of ln 512, a perplexity of 512, 9 bits a token
train tiny_gpt2 uniform model.initializer_range=1e-9 optimizer.learning_rate=1e-12 schedule.max_steps=1 schedule.warmup_steps=0
loss=$(json '"event":"eval"' loss <"$work/uniform/log.jsonl") perplexity=$(json '"event":"eval"' perplexity <"$work/uniform/log.jsonl")
bits=$(json '"event":"eval"' bits_per_byte <"$work/uniform/log.jsonl")
check "a uniform model: loss $loss, perplexity $perplexity" \
    awk -v l="$loss" -v p="$perplexity" 'BEGIN { exit !(l > 6.2382 && l < 6.2384 && p > 511.9 && p < 512.1) }'
shards=$(cat "$work"/data/*.bin | wc -c) # 2 bytes a token
check "its bits per byte, $bits, are 9 bits a token" awk -v b="$bits" -v bytes="$(wc -c <"$work/text.txt")" \
    -v tokens=$((shards / 2)) 'BEGIN { r = b * bytes / tokens / 9; exit !(r > 0.85 && r < 1.15) }'
tokens=$(json '"event":"step"' tokens <"$work/tiny_gpt2/log.jsonl")
planned=$(command plan tiny_gpt2 tiny_gpt2 | sed -nE 's/.*; ([0-9,]+) tokens in 40 steps.*/\1/p' | tr -d ,)
check "a finished run has seen the tokens that were planned ($tokens)" [ "$tokens" = "$planned" ]

# what is due when
train tiny_gpt2 due schedule.max_steps=25 checkpoint.every=10 checkpoint.keep_last=9 eval.every=20 log.every=5
check "checkpoints every 10 steps and at the end" [ "$(cd "$work/due/checkpoints" && echo *)" = \
    "step_00000010 step_00000020 step_00000025" ]
check "evaluations every 20 steps and at the end, log lines every 5" [ \
    "$(grep -c '"event":"eval"' "$work/due/log.jsonl") $(grep -c '"event":"step"' "$work/due/log.jsonl")" = "2 5" ]
check "eval.batches counts micro-batches" [ "$(command eval tiny_gpt2 due eval.batches=2 | json loss tokens)" = 1024 ]
for field in loss grad_norm learning_rate tokens tokens_per_second step_seconds gflops skipped_steps; do
    check "a step in the log has $field" grep -q "\"event\":\"step\".*\"$field\":" "$work/due/log.jsonl"
done
check "the first step warms up: 1/5 of the peak" grep -q '"learning_rate":0.0006,' "$work/tiny_gpt2/log.jsonl"

# samples
command sample tiny_gpt2 tiny_gpt2 sample.prompt=static >"$work/a"
command sample tiny_gpt2 tiny_gpt2 sample.prompt=static >"$work/b"
command sample tiny_gpt2 tiny_gpt2 sample.prompt=static sample.seed=2 >"$work/c"
command sample tiny_gpt2 tiny_gpt2 sample.prompt=static sample.temperature=0 >"$work/d"
command sample tiny_gpt2 tiny_gpt2 sample.prompt=static sample.top_k=1 sample.seed=9 >"$work/e"
check "a sample continues the prompt" continues static "$work/a"
check "the same seed, the same text" cmp "$work/a" "$work/b"
check "another seed, another text" sh -c "! cmp -s $work/a $work/c"
check "temperature 0 is top_k 1 whatever the seed" cmp "$work/d" "$work/e"
check "samples during training are in the log" sh -c "$(declare -f train); work=$work; train tiny_gpt2 sampled \
    schedule.max_steps=4 sample.every=2 && [ \$(grep -c '\"event\":\"sample\"' $work/sampled/log.jsonl) -eq 2 ]"

# what cannot run
check "no shards: exit 66" exits 66 "nowhere" train tiny_gpt2 none "data.train=$work/nowhere_*.bin"
check "tokens beyond the vocabulary: exit 65" exits 65 "vocab" train tiny_gpt2 none model.vocab_size=300
head -c 5000 "$work/data/train_000000.bin" >"$work/short.bin"
check "a truncated shard: exit 65" exits 65 "short.bin" train tiny_gpt2 none "data.train=$work/short.bin"
check "other data on resume: exit 78" exits 78 "fingerprint" train tiny_gpt2 whole schedule.max_steps=20 \
    "data.train=$work/data/val_*.bin"
check "another model on resume" exits 78 "n_embd is 64 and 32" train tiny_gpt2 whole schedule.max_steps=20 model.n_embd=32
check "what a rerun cannot mend is in the run directory" grep -q '^78 .* 64 and 32' "$work/whole/FATAL"
check "a run that was done is not, any more" [ ! -e "$work/whole/RUN_STATE" ]
check "a diverging run gives up: exit 70" exits 70 "not finite" train tiny_gpt2 diverged optimizer.learning_rate=100 \
    optimizer.grad_clip=0 optimizer.weight_decay=100 schedule.warmup_steps=0 schedule.max_steps=200
check "and leaves the reason" grep -q '^70 training diverged' "$work/diverged/FATAL"
check "its checkpoints are not touched by that" sh -c "! ls $work/diverged/checkpoints/step_* 2>/dev/null"
train tiny_gpt2 skipped optimizer.learning_rate=100 optimizer.grad_clip=0 optimizer.weight_decay=100 \
    schedule.warmup_steps=0 schedule.max_steps=200 checkpoint.every=1 checkpoint.keep_last=2 guard.max_skipped_steps=3
check "a skipped step leaves the weights as they were" sh -c "cmp $work/skipped/checkpoints/step_*/model.safetensors"
check "eval without a checkpoint: exit 66" exits 66 "no checkpoint" command eval tiny_gpt2 none
touch "$work/file"
check "a run directory that is a file: exit 73" exits 73 "$work/file" train tiny_gpt2 file/run
check "no such config: exit 66" exits 66 "absent.json" train absent none
check "tf32 is not the CPU's: exit 78" exits 78 "precision.compute=fp32 or bf16" train tiny_gpt2 none precision.compute=tf32
for key in master_weights gradients moments; do
    check "training with precision.$key=bf16 is not the CPU's: exit 78" exits 78 "precision.$key=fp32" \
        train tiny_gpt2 none precision.$key=bf16
    check "what was trained so may be evaluated" command eval tiny_gpt2 tiny_gpt2 precision.$key=bf16 eval.batches=1
done
config=$work/whole/run_config.json
cp "$config" "$work/before"
check "a lower schedule.max_steps trains nothing" train tiny_gpt2 whole schedule.max_steps=6 optimizer.learning_rate=1
check "and the run's config stays that of its steps" cmp "$work/before" "$config"
check "it is done, and nothing stands against that" [ "$(cat "$work/whole/RUN_STATE")" = done -a ! -e "$work/whole/FATAL" ]
for arguments in "help" "help config" "--version" "checkpoint info $work/whole/checkpoints/step_00000010"; do
    # shellcheck disable=SC2086 # words
    ./train_gpt_cpu $arguments >/dev/full 2>"$work/err"
    check "${arguments%% /*} to a full disk: exit 74" [ $? -eq 74 ]
done
./train_gpt_cpu >/dev/null 2>&1
check "no arguments: usage, exit 64" [ $? -eq 64 ]
check "--help exits 0" ./train_gpt_cpu --help
knob() { ./train_gpt_cpu knob configs/tiny_gpt2.json "$@"; } # KEY [KEY=VALUE ...]
check "a path of the config as it is" [ "$(knob log.run_dir 'log.run_dir=a "b" \1  *')" = 'a "b" \1  *' ]
check "a number, a choice, a default" [ "$(knob seed seed=7) $(knob schedule.type) $(knob eval.every eval.every=3)" = '7 "cosine" 3' ]
check "a key that is none: exit 64" sh -c './train_gpt_cpu knob configs/tiny_gpt2.json log.rundir; [ $? -eq 64 ]'
# another run has the directory: what ends this one is not for it to find
mkdir -p "$work/held"
exec 9<"$work/held"
flock -n 9
check "a wrong config beside a run: exit 78" exits 78 "data_parallel_size" train tiny_gpt2 held parallel.data_parallel_size=2
check "leaves no FATAL there" [ ! -e "$work/held/FATAL" ]
exec 9<&-
check "without that run: exit 78" exits 78 "data_parallel_size" train tiny_gpt2 held parallel.data_parallel_size=2
check "leaves one" grep -q '^78 .*data_parallel_size' "$work/held/FATAL"
finish

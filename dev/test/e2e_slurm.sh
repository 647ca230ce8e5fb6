#!/usr/bin/env bash
# scripts/train.sbatch on a real Slurm (dev/test/slurm_cluster.sh): jobs of the emulated trainer, two ranks on two nodes,
# meet what jobs meet on a cluster. Whatever it was, the weights at the end are those of a run that met nothing.
# All at a time: what they wait for is mostly Slurm.
set -u
. "$(dirname "$0")/tap.sh"
. dev/test/slurm_cluster.sh
if why=$(cluster_missing); then
    skip_test "training on Slurm" "$why"
    finish
fi
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive EMU_DEVICES=2 MASTER_ADDR=127.0.0.1 EMU_NCCL_TOKEN=slurm_$$
. dev/test/small_corpus.sh
stop_all() {
    cluster_stop
    umount "$work/full_disk" 2>/dev/null
    rm -rf "$work" /dev/shm/"emu_nccl_$EMU_NCCL_TOKEN"_*
}
trap stop_all EXIT
TRAIN_GPT=$(realpath "$program")
export TRAIN_GPT
chmod 755 "$work" # munged is another user
# n3 is the node that dies, n4 the one that two partitions want, n5 the spare.
cluster_start "$work/cluster" 5 'PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=p Nodes=n[1-2] Default=YES
PartitionName=dying Nodes=n[1,3]
PartitionName=low Nodes=n4 PriorityTier=1
PartitionName=urgent Nodes=n4 PriorityTier=2
PartitionName=spare Nodes=n[1-2,5]' >"$work/start.log" 2>&1
started=$?
check "a cluster starts" eval "cat '$work/start.log' && [ $started = 0 ]"
[ $started = 0 ] || finish

# ----------------------------------------------------------------------------
# a job, $job, whose run is called $name

small=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=4 schedule.max_steps=80
    schedule.warmup_steps=1 eval.batches=2 model.hidden_size=32 model.intermediate_size=64 checkpoint.every=10
    checkpoint.keep_last=99)
submit() { # NAME [SBATCH OPTION ...] [KEY=VALUE ...]
    local options=()
    name=$1
    shift
    while [[ ${1:-} == -* ]]; do options+=("$1") && shift; done
    job=$(sbatch --parsable --job-name="$name" --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 \
        --output="$work/$name.out" "${options[@]}" scripts/train.sbatch configs/tiny_llama.json "${data[@]}" "${small[@]}" parallel.self_test=false \
        "log.run_dir=$work/$name" "$@")
}
until_true() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || { echo "not within its time: $*" && return 1; }
        sleep 0.2
    done
}
step() { printf '%s/%s/checkpoints/step_%08d' "$work" "$1" "$2"; }
trained() { until_true 200 [ -d "$(step "$name" 10)" ]; }
said() { grep -qE "$1" "$work/$name.out" 2>/dev/null; } # 'regular expression'
says() { until_true 150 said "$1"; } # the same, some time
field() { scontrol show job "$job" | sed -nE "s/.*\<$1=([^ ]*).*/\1/p" | tail -n 1; } # FIELD
ranks() { job_pids "SLURM_JOB_NAME=$name" "SLURM_PROCID=$1" | xargs -r ps -o pid=,comm= -p | sed -n 's/ train_gpt.*//p'; }
over() { case $(field JobState) in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL) ;; *) false ;; esac; }
ends() { # STATE EXIT_CODE RESTARTS
    local end
    until_true 250 over
    end="$(field JobState) $(field ExitCode) $(field Restarts)"
    echo "wanted: $1 $2:0 $3, got: $end"
    [ "$end" = "$1 $2:0 $3" ]
}
# The run is done, and its weights and moments are those of the run that nothing happened to.
well() {
    [ "$(cat "$work/$name/RUN_STATE")" = done ] && [ ! -e "$work/$name/FATAL" ] &&
        until_true 200 [ -e "$work/undisturbed/RUN_STATE" ] &&
        ./train_gpt_cpu checkpoint diff "$(step undisturbed 80)" "$(step "$name" 80)" | tee /dev/stderr |
        grep -qE '^[0-9]+ tensors are the same to the bit$|, 0 are not$'
}
ends_well() { ends COMPLETED 0 "$1" && well; } # RESTARTS

# A trainer whose second rank takes long to end, so that srun kills it and returns the code of that; one that dies.
cat >"$work/slow" <<'PROGRAM'
#!/bin/bash
trap : TERM
"$REAL" "$@"
code=$?
trap '' TERM
[ "$1:${SLURM_PROCID:-0}" != train:1 ] || sleep 12
exit $code
PROGRAM
printf '#!/bin/bash\n[ "$1" != train ] || kill -SEGV $$\nexec "$REAL" "$@"\n' >"$work/dies"
chmod +x "$work/slow" "$work/dies"
export REAL=$TRAIN_GPT

# ----------------------------------------------------------------------------
# what happens to jobs

undisturbed() { submit undisturbed && ends_well 0 && said '^NCCL_DEBUG=WARN' && said 'GPUs [0-9]+ of each node'; }
# As before a time limit, to the task of a job array whose number is the array's.
early_signal() {
    submit early_%a --array=6-7 --output="$work/early_%a.out" && name=early_7 && trained &&
        scancel --signal=USR2 --batch "${job}_7" || return 1
    local array=$job
    job=${array}_7 && ends_well 1 && said 'start 1: srun.* state stopped' && said "job ${array}_7, start 2" &&
        job=${array}_6 && ends COMPLETED 0 0
}
# Ranks are frozen, and go on when the script has sent its signal, or when Slurm ends them.
time_limit() { SBATCH_SIGNAL=B:USR2@20 submit "$1" --time=1 && trained && kill -STOP $(ranks 0) $(ranks 1) && says 'limit is near'; }
limit() { time_limit limit && sleep 1 && kill -CONT $(ranks 0) $(ranks 1) && ends_well 1 && said '1: srun.* state stopped'; }
limit_late() { time_limit limit_late && ends_well 1 && said 'start 1: requeued'; }
limit_short() { submit limit_short --time=8 && ends FAILED 64 0 && said 'given up, exit code 64: .* 480 s' && [ ! -e "$work/limit_short" ]; }
limit_long() { submit limit_long --time=9 && ends_well 0; }
preempted() {
    submit preempted --partition=low --nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --exclusive && trained &&
        sbatch --partition=urgent --exclusive --output=/dev/null --wrap='sleep 2' && ends_well 1 && said 'start 1: ended by Slurm'
}
# SIGTERM while the job runs on, as in the grace time of a preemption.
warned() { submit warned && trained && scancel --full --signal=TERM "$job" && ends_well 1 && said 'start 1: requeued'; }
# Its directory has a name that a shell, sed and JSON have to be careful with.
requeued() { submit 're"queued  \1 *' && trained && scontrol requeue "$job" && ends_well 1; }
crash() { submit crash && trained && kill -KILL $(ranks 1) && until_true 50 said 'start 2' && ends_well 1; }
pending() { [ "$(field JobState)" = PENDING ]; }
dead_node() {
    submit dead_node --partition=dying && trained && node_kill n3 && until_true 100 pending && node_start n3 && ends_well 1
}
config_error() {
    submit config_error model.hiden_size=8 && ends FAILED 78 0 && said hidden_size && said 'given up, exit code 78' &&
        [ ! -e "$work/config_error" ]
}
# One that the ranks find, together.
bad_layout() {
    submit bad_layout parallel.tensor_parallel_size=3 && ends FAILED 78 0 &&
        grep -q '^78 .*tensor_parallel_size 3' "$work/bad_layout/FATAL"
}
slow_teardown() {
    TRAIN_GPT=$work/slow submit slow_teardown && trained && scancel --signal=USR2 --batch "$job" && ends_well 1 &&
        said 'exit code 137, state stopped'
}
corrupt_data() {
    local shard=$work/corrupt/train_000000.bin
    cp -r "$work/data" "$work/corrupt" && printf garbage | dd of="$shard" conv=notrunc status=none &&
        TRAIN_GPT=$work/slow submit corrupt_data "data.train=$work/corrupt/train_*.bin" && ends FAILED 65 0 &&
        said 'exit code 137, state none' && said "given up, exit code 65: .*$shard"
}
# Full behind a checkpoint, and until the second start, which may notice or not.
full_disk() {
    local disk=$work/full_disk
    submit full_disk checkpoint.keep_last=2 && trained || return 1
    head -c 9000000 /dev/zero >"$disk/ballast"
    says 'start 2: n' && rm "$disk/ballast" && until_true 250 over && ends_well "$(field Restarts)" &&
        [ "$(field Restarts)" -le 2 ] && said 'start 1: srun.s exit code 74'
}
cancelled() {
    submit cancelled && trained && scancel "$job" && says 'unless it was cancelled' && sleep 12 && ends CANCELLED 143 0 &&
        [ "$(cat "$work/cancelled/PROGRESS")" = "0 1" ] && [ ! -e "$(step cancelled 80)" ] &&
        submit cancelled && ends_well 0
}
no_progress() {
    TRAIN_GPT=$work/dies submit no_progress && ends FAILED 70 2 && said 'given up, exit code 70: three starts.* code was 139'
}
no_requeue() {
    submit no_requeue --no-requeue && trained && kill -KILL $(ranks 0) && ends FAILED 75 0 && said 'submit it again' &&
        submit no_requeue && ends_well 0
}
bad_node() {
    submit bad_node --partition=spare --nodelist=n1,n2 --exclude=n3 --time=100 && trained &&
        echo n2 >"$work/bad_node/BAD_NODE" && kill -KILL $(ranks 1) && ends FAILED 75 0 &&
        job=$(sed -n 's/^Submitted batch job //p' "$work/bad_node.out") && ends_well 0 &&
        [ "$(field ExcNodeList) $(field NodeList) $(field TimeLimit)" = "n[2-3] n[1,5] 01:40:00" ]
}

scenarios=(undisturbed early_signal limit limit_late limit_short limit_long preempted requeued warned crash dead_node config_error bad_layout slow_teardown
    corrupt_data full_disk cancelled no_progress no_requeue bad_node)
if ! { mkdir "$work/full_disk" && mount -t tmpfs -o size=8m none "$work/full_disk"; } 2>/dev/null; then
    skip_test "full_disk" "no tmpfs can be mounted here"
    scenarios=("${scenarios[@]/full_disk/}")
fi
for scenario in ${SCENARIOS:-${scenarios[@]}}; do
    ( $scenario >"$work/$scenario.log" 2>&1; echo $? >"$work/$scenario.code" ) &
done
result() { # SCENARIO
    until_true 280 [ -s "$work/$1.code" ] && [ "$(cat "$work/$1.code")" = 0 ] && return
    cat "$work/$1.log"
    grep -E 'train\.sbatch|srun|slurm|error|warning' "$work/${1/early_signal/early_7}.out"
    return 1
}
for scenario in ${SCENARIOS:-${scenarios[@]}}; do check "$scenario" result $scenario; done
cluster_stop
check "nothing is left running" [ -z "$(job_pids SLURM_CLUSTER_NAME=t)" ]
finish

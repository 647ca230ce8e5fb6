#!/usr/bin/env bash
# A node that does not see the run directory (llmc/run_identity.h): it is named, nothing is set aside, nothing is trained.
# A node is a directory here, with the shared file system behind a link in it: without a mount it is an empty directory.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LAUNCH_PATIENCE=20
. dev/test/small_corpus.sh
trap 'pkill -KILL -f "data.train=$work/"; rm -rf "$work"' EXIT
settings=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=6 schedule.warmup_steps=1
    schedule.type=constant eval.every=0 eval.batches=1 model.num_hidden_layers=1 model.hidden_size=32
    model.intermediate_size=64 checkpoint.every=4 checkpoint.keep_last=9 parallel.start_timeout=8)

# start NAME RANKS [KEY=VALUE ...]: in the background; its exit code goes to NAME.code
start() {
    local name=$1 ranks=$2
    shift 2
    (
        dev/emu/launch -n "$ranks" sh -c "export SLURMD_NODENAME=node_\$RANK; root=\$PWD; cd $work/$name/\$RANK
            exec \$root/train_gpt_emu train \$root/configs/tiny_llama.json \"\$@\"" sh "${data[@]}" \
            log.run_dir=shared/run "${settings[@]}" schedule.max_steps=12 "$@" >"$work/$name.out" 2>"$work/$name.err"
        echo $? >"$work/$name.code"
    ) &
}
nodes() { # NAME: three of them, and what they share
    local rank
    mkdir -p "$work/$1"/{0,1,2,shared}
    for rank in 0 1 2; do ln -s ../shared "$work/$1/$rank/shared"; done
}
unmount() { rm "$work/$1/$2/shared" && mkdir "$work/$1/$2/shared"; } # NAME RANK
older() {   # NAME: a run that has got to step 8
    nodes "$1"
    cp -a "$work/base/shared/run" "$work/$1/shared"
    sed -i "s|$work/base/|$work/$1/|" "$work/$1/shared/run/run_id"
    names "$1" >"$work/$1.names"
}
names() { (cd "$work/$1/shared" && find . ! -name '*.prom' ! -name RUN_STATE | sort); }
untouched() { diff "$work/$1.names" <(names "$1" | grep -v 'BAD_NODE\|FATAL\|flight'); }
failed() { # NAME CODE 'regular expression': an error that says that, and no step
    for _ in $(seq 1200); do
        [ ! -s "$work/$1.code" ] || break
        sleep 0.05
    done
    cat "$work/$1.err"
    [ "$(cat "$work/$1.code")" = "$2" ] && grep -qE "^error: $3" "$work/$1.err" && ! grep -q '^step ' "$work/$1.out"
}
ended() { failed "$@" && [ "$(grep -c '^error: ' "$work/$1.err")" -eq 1 ]; } # the same, said once
named() { [ "$(cat "$1/BAD_NODE")" = "$2" ] && [ ! -e "$1/FATAL" ]; } # DIRECTORY NODE
mounted='is its file system mounted there\?$'

nodes base
start base 3 schedule.max_steps=8
wait
check "a run gets to step 8" test "$(cat "$work/base.code")" = 0

older other && unmount other 1
start other 3
older first && unmount first 0 && cp "$work/first/shared/run/run_id" "$work/first.run_id"
start first 3
older early && unmount early 1 && cp -a "$work/early/shared/run" "$work/early/1/shared"
start early 3
older two && unmount two 1
start two 2
older partly && unmount partly 1 && mkdir -p "$work/partly/1/shared/run/checkpoints" && ln -s "$work/partly/shared/run/run_id" "$work/partly/1/shared/run"
start partly 3
nodes new && unmount new 2
start new 3
nodes alone && unmount alone 0
start alone 3
older late && unmount late 1 && cp "$work/late/shared/run/run_id" "$work/late.run_id"
start late 3 parallel.start_timeout=60
shards() { # NAME RANK: data of the node's own; those of RANK are other ones
    local rank
    for rank in 0 1 2; do
        mkdir "$work/$1/$rank/local" && cp "$work/data/train_000000".* "$work/$1/$rank/local"
    done
    cp "$work/data/val_000000.bin" "$work/$1/$2/local/train_000000.bin" && cp "$work/data/val_000000.idx" "$work/$1/$2/local/train_000000.idx"
}
older stale && shards stale 2
start stale 3 'data.train=local/train_*.bin'
nodes mixed && shards mixed 1
start mixed 3 'data.train=local/train_*.bin'
for _ in $(seq 1200); do # until rank 0 has written that it is there
    cmp -s "$work/late/shared/run/run_id" "$work/late.run_id" || break
    sleep 0.05
done
sleep 2
rmdir "$work/late/1/shared" && ln -s ../shared "$work/late/1/shared"

check "rank 1 has no mount: it is named, and its node" \
    ended other 74 "rank 1: on its node, node_1, log.run_dir, shared/run, is not what rank 0 sees on node_0 \(cannot open .*\): $mounted"
check "another start goes without that node" named "$work/other/shared/run" node_1
check "no checkpoint was touched" untouched other
check "rank 0 has none: it is named" ended first 74 "rank 0: on its node, node_0, log.run_dir, shared/run, is not the run that most of the 3 ranks see there: $mounted"
check "where who started it looks" named "$work/first/0/shared/run" node_0
check "where nothing is left that looks like a run" test ! -e "$work/first/0/shared/run/run_id"
check "the run does not know of it" cmp "$work/first/shared/run/run_id" "$work/first.run_id"
check "no checkpoint of the run was touched" untouched first
check "rank 1 sees an earlier state: it is named" ended early 74 "rank 1: on its node, node_1, .* is that of an earlier start, or a copy, not what rank 0 sees on node_0: $mounted"
check "and its node" named "$work/early/shared/run" node_1
check "of two nodes the one without the run is bad" ended two 74 "rank 1: .*$mounted"
check "it is named" named "$work/two/shared/run" node_1
check "checkpoints that one rank does not see are not damaged" failed partly 74 'rank 1: shared/run/checkpoints/step_00000008 is not there; rank 0 does not find that'
check "and are not set aside" untouched partly
check "a new run says it, too" ended new 74 "rank 2: on its node, node_2, .*$mounted"
check "and names the node" named "$work/new/shared/run" node_2
check "a directory that only rank 0 has is none for a run" ended alone 66 "rank 1: .*$mounted"
check "which no other start can mend" grep -q '^66 ' "$work/alone/0/shared/run/FATAL"
check "and no node is to blame" test ! -e "$work/alone/0/shared/run/BAD_NODE"
goes_on() {
    wait
    cat "$work/late.err"
    [ "$(cat "$work/late.code")" = 0 ] && grep -q '^weights from .*, step 8$' "$work/late.err" && [ ! -e "$work/late/shared/run/BAD_NODE" ]
}
check "a file system that comes late is waited for" goes_on
check "a node with other data than the run's is named" ended stale 78 'rank 2: the training data are not those that the newest checkpoint in shared/run was trained on'
check "which no other start can mend" grep -q '^78 rank 2' "$work/stale/shared/run/FATAL"
check "in a new run, too" ended mixed 78 'rank 1: the training data are not those of rank 0'
finish

#!/usr/bin/env bash
# The fast tier of checkpoints (llmc/fast_tier.h): what is copied from it is what a direct save writes; a run that is
# killed goes on from it; whatever is wrong with it, the durable checkpoints do, and the bits at the end are the same.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LAUNCH_PATIENCE=20
. dev/test/small_corpus.sh
trap 'pkill -KILL -f "log.run_dir=$work/"; umount "$work/small" 2>/dev/null; rm -rf "$work"' EXIT
fast=$work/fast last=16
mkdir "$fast" "$work/small"
settings=(batch.sequence_length=16 batch.micro_batch_size=1 batch.global_batch_size=4 schedule.warmup_steps=1
    schedule.type=constant eval.every=0 eval.batches=1 model.num_hidden_layers=2 model.hidden_size=32
    model.intermediate_size=64 checkpoint.every=4 checkpoint.keep_last=2)
tier=(checkpoint.fast_dir="$fast" checkpoint.fast_every=2)

# run RANKS NAME [KEY=VALUE ...]; 0 ranks: the CPU program
run() {
    local ranks=$1 name=$2 program=(./train_gpt_cpu)
    shift 2
    [ "$ranks" -eq 0 ] || program=(dev/emu/launch -n "$ranks" ./train_gpt_emu)
    timeout 120 "${program[@]}" train configs/tiny_llama.json "${data[@]}" "log.run_dir=$work/$name" "${settings[@]}" \
        "schedule.max_steps=$last" "$@" >"$work/$name.out" 2>"$work/$name.err" || { cat "$work/$name.err" && return 1; }
}
step() { printf '%s/%s/checkpoints/step_%08d' "$work" "$1" "$2"; }
same() { ./train_gpt_cpu checkpoint diff "$(step "$1" $last)" "$(step "$2" $last)"; } # NAME NAME
part() { # RUN RANK OF [STEP]: a directory of the tier
    printf '%s/%s/rank_%05d-of-%05d' "$fast" "$(sed 's|^\([^ ]*\) \([^ ]*\) .*|\1/\2|' "$work/$1/run_id")" "$2" "$3"
    [ $# -lt 4 ] || printf '/step_%08d' "$4"
}
said() { # NAME 'regular expression'
    grep -qE -- "$2" "$work/$1.err" || { cat "$work/$1.err" && return 1; }
}

# ----------------------------------------------------------------------------
# what is copied is what a direct save writes; run_config.json names other directories

same_files() { # NAME NAME: of every durable checkpoint
    local a b file
    [ "$(cd "$work/$1/checkpoints" && find . | sort)" = "$(cd "$work/$2/checkpoints" && find . | sort)" ] || return 1
    for a in "$work/$1"/checkpoints/*/*; do
        file=${a##*/} b=$work/$2/checkpoints/${a#"$work/$1/checkpoints/"}
        case $file in
        run_config.json) ;;
        manifest.json) diff <(grep -v 'run_config.json\|manifest_' "$a") <(grep -v 'run_config.json\|manifest_' "$b") || return 1 ;;
        *) cmp "$a" "$b" || return 1 ;;
        esac
    done
}
events() { # NAME: step and tier of each checkpoint, in order of steps
    sed -nE 's/.*"event":"checkpoint".*"step":([0-9]+),"tier":"([a-z]+)".*/\1 \2/p' "$work/$1/log.jsonl" | sort -n | tr '\n' ' '
}
kept() { # NAME RANKS: the newest two of each process, and nothing else
    local rank
    for ((rank = 0; rank < $2; rank++)); do
        [ "$(cd "$(part "$1" $rank "$2")" && echo *)" = "step_00000014 step_00000016" ] || return 1
    done
}
for ranks in 0 1 4; do
    check "$ranks ranks: a run without the tier" run $ranks plain$ranks
    check "$ranks ranks: and one with it" run $ranks fast$ranks "${tier[@]}"
    check "$ranks ranks: the durable checkpoints are the same, byte for byte" same_files plain$ranks fast$ranks
    check "$ranks ranks: the log has both tiers" test "$(events fast$ranks)" = \
        "2 fast 4 durable 4 fast 6 fast 8 durable 8 fast 10 fast 12 durable 12 fast 14 fast 16 durable 16 fast "
    check "$ranks ranks: the newest two stay" kept fast$ranks $((ranks > 0 ? ranks : 1))
    check "$ranks ranks: nothing was said" sh -c "! grep -E 'warning|note' '$work/fast$ranks.err'"
done

# ----------------------------------------------------------------------------
# while nothing gets into the durable directory: its lock is held, and a copy waits for it (10 s at most)

held() { # NAME: its lock; until `free`
    mkdir -p "$work/$1/checkpoints"
    flock "$work/$1/checkpoints" sleep 100 &
    lock=$!
}
free() {
    pkill -KILL -P $lock
    wait $lock
}
saved() { # NAME RANK STEP: waits until that process has that step in its tier
    for _ in $(seq 1200); do
        [ ! -d "$(part "$1" "$2" 4 "$3" 2>/dev/null)" ] || return 0
        sleep 0.05
    done
}
slow() { # the copy of step 4 waits for the lock, and the save of step 8 for the copy
    local trainer
    held slow
    run 4 slow "${tier[@]}" checkpoint.fast_every=1 &
    trainer=$!
    saved slow 0 7
    sleep 3
    free
    wait $trainer
}
longest_stall() { grep '"event":"checkpoint"' "$work/$1/log.jsonl" | sed 's/.*"stall"://; s/[,}].*//' | sort -g | tail -n 1; }
check "copies that take longer than training" slow
check "are waited for, one after the other" same_files plain4 slow
check "which the stall of the save that waits says" awk -v s="$(longest_stall slow)" 'BEGIN { exit !(s > 1) }'

killed() {
    local rank trainer
    run 4 hit "${tier[@]}" schedule.max_steps=4 || return 1
    held hit
    run 4 hit "${tier[@]}" schedule.max_steps=100000 checkpoint.fast_every=1 &
    trainer=$!
    for rank in 0 1 2 3; do saved hit $rank 11; done
    pkill -KILL -f "log.run_dir=$work/hit "
    wait $trainer
    free
    ls "$work/hit/checkpoints"
    [ ! -e "$(step hit 8)" ] && [ "$(cd "$(part hit 3 4)" && echo *[0-9])" = "step_00000008 step_00000010 step_00000011" ]
}
again() { # as it was when it was killed
    rm -rf "$work/hit" "$fast"
    cp -a "$work/saved/hit" "$work/saved/fast" "$work"
}
goes_on() { # STEP DIRECTORY [RANKS]: from there, and ends with the bits of a run that was left alone
    run "${3:-4}" hit "${tier[@]}" || return 1
    said hit "^weights from $2.*, step $1\$" && { [ "${3:-4}" -ne 4 ] || same hit plain4; }
}
damage() { # FILE: its last byte
    local size
    size=$(stat -c %s "$1")
    printf '\x55' | dd of="$1" bs=1 seek=$((size - 1)) conv=notrunc status=none
}

check "killed behind the fast save of step 11, while step 8 is being copied, which stays" killed
mkdir "$work/saved" && cp -a "$work/hit" "$fast" "$work/saved"
check "goes on from step 11" goes_on 11 "$fast"
check "which is copied at once" grep -q 'save *11 .*hit/checkpoints' "$work/hit.out"
again
kept_for_good() { # what was being copied is older than what it goes on from, and would be pruned in both places
    run 4 hit "${tier[@]}" checkpoint.permanent_every=8 checkpoint.keep_last=1 && ls "$work/hit/checkpoints" &&
        [ "$(cd "$work/hit/checkpoints" && echo *)" = "step_00000008 step_00000016" ] && same hit plain4
}
check "a permanent checkpoint that was being copied is there, too" kept_for_good
again
rm -r "$(part hit 2 4)"
check "one process has lost its disk: all go on from step 4" goes_on 4 "$work/hit"
check "that is said" said hit '^note: step 11 is not in checkpoint.fast_dir of every process'
check "what was left of the other future is gone" kept hit 4
again
damage "$(part hit 1 4 11)/$(cd "$(part hit 1 4 11)" && ls | grep optim)"
check "a byte is wrong in one process: all go on from step 10" goes_on 10 "$fast"
check "that is said, with the file" said hit '^warning: step 11 of checkpoint.fast_dir .*rank_00001-of-00004/.*optim'
again
rm -r "$(part hit 3 4 11)" && cp -a "$(part fast4 3 4 14)" "$(part hit 3 4 11)"
check "a part of another step: all go on from step 10" goes_on 10 "$fast"
again
run 4 other "${tier[@]}" schedule.max_steps=10
rm -r "$(part hit 3 4)" && cp -a "$(part other 3 4)" "$(part hit 3 4)"
check "a part of the same step of another run: all go on from step 4" goes_on 4 "$work/hit"
check "that is said, too" said hit 'step 10 .* is of another save'
again
rm "$work/hit/run_id"
check "no run_id: the checkpoints of another run are not used" goes_on 4 "$work/hit"
again
mv "$work/hit" "$work/first" && cp -a "$work/first" "$work/hit" && sed -i "s|/hit\$|/first|" "$work/hit/run_id"
check "nor are they in a copy of a run's directory" goes_on 4 "$work/hit"
check "which is said" said hit '^note: .*run_id was not of this directory'
again
check "another number of processes goes on from the durable one" goes_on 4 "$work/hit" 2
check "and says what it does not use" said hit '^note: .* has checkpoints that the run does not go on from: .*another number of processes'
again
run 2 hit "${tier[@]}" schedule.max_steps=8
check "which leaves nothing behind that this number could take up again" run 4 hit "${tier[@]}"
check "it goes on from the durable one, too" said hit "^weights from $work/hit.*, step 8\$"
again
run 4 hit schedule.max_steps=8
check "a start without the tier gives up what it has" goes_on 8 "$work/hit"
newer() { # the past of step 8 is back, with a durable checkpoint that is not of it
    run 0 newer "${tier[@]}" schedule.max_steps=8 && cp "$work/newer/run_id" "$work" && run 0 newer schedule.max_steps=12 &&
        ! cmp "$work/newer/run_id" "$work/run_id" && mv "$work/run_id" "$work/newer" && run 0 newer "${tier[@]}" &&
        said newer "^weights from $work/newer.*, step 12\$"
}
check "a durable checkpoint that is newer is used" newer
again
rm "$work/hit/run_id" && mkdir "$work/hit/run_id"
unread() { ! run 4 hit "${tier[@]}" && said hit '^error: .*run_id.*; remove it to give up what checkpoint.fast_dir has$'; }
check "a run_id that cannot be read is no reason to forget the tier" unread

# ----------------------------------------------------------------------------
# nodes with a disk each: what ranks leave there when they move is of a past that others go on from elsewhere

placed() { # "NODE NODE" [KEY=VALUE ...]: two ranks, one on each of these
    local nodes=$1
    shift
    mkdir -p "$work"/{n1,n2,n3}/tier
    timeout 120 dev/emu/launch -n 2 sh -c "root=\$PWD; set -- \"\$root/configs/tiny_llama.json\" \"\$@\"
        cd $work/\$(echo $nodes | cut -d ' ' -f \$((RANK + 1))); exec \$root/train_gpt_emu train \"\$@\"" sh "${data[@]}" \
        "log.run_dir=$work/moved" "${settings[@]}" checkpoint.every=0 checkpoint.fast_dir=tier "$@" >"$work/moved.out" 2>"$work/moved.err"
}
moved() { # to the nodes n1 and n2, and back
    local trainer
    placed "n2 n3" schedule.max_steps=8 || return 1
    placed "n2 n3" schedule.max_steps=100000 checkpoint.fast_every=2 &
    trainer=$!
    for _ in $(seq 1200); do
        [ ! -d "$(echo "$work"/n3/tier/*/*/rank_00001-of-00002/step_00000014)" ] || break
        sleep 0.05
    done
    pkill -KILL -f "log.run_dir=$work/moved "
    wait $trainer
    [ ! -e "$(step moved 14)" ] && placed "n1 n2" schedule.max_steps=12 optimizer.learning_rate=0.01 && said moved ', step 8$' &&
        placed "n2 n3" schedule.max_steps=$last && said moved "^weights from $work/moved.*, step 12\$"
}
left_alone() {
    run 2 unmoved checkpoint.every=0 schedule.max_steps=8 && run 2 unmoved checkpoint.every=0 schedule.max_steps=12 optimizer.learning_rate=0.01 &&
        run 2 unmoved checkpoint.every=0 && same moved unmoved
}
one_each() { # checkpoints of one rank, that of the last past
    local n
    for n in n2 n3; do
        [ "$(cd "$work/$n/tier" && echo */*/*)" = "$(cut -d ' ' -f 1 "$work/moved/run_id")/$(cut -d ' ' -f 2 "$work/moved/run_id")/rank_0000$((${n#n} - 2))-of-00002" ] ||
            { ls -d "$work"/n?/tier/*/*/*/* && return 1; }
    done
}
check "ranks that have moved and come back go on from the durable checkpoint" moved
check "with the bits of a run that was left alone" left_alone
check "a node keeps nothing of other ranks" one_each

spoilt() { # the last step is whole in memory, and not in the tier, while its copy has not begun
    local rank trainer
    held end
    run 4 end "${tier[@]}" checkpoint.every=0 &
    trainer=$!
    for rank in 0 1 2 3; do saved end $rank $last; done
    damage "$(part end 1 4 $last)/$(cd "$(part end 1 4 $last)" && ls | grep optim)"
    free
    wait $trainer
}
check "a last step that the tier does not give back" spoilt
check "is said" said end "^warning: step $last cannot be copied from checkpoint.fast_dir: .*rank_00001-of-00004"
check "and is written from memory" same end plain4

# ----------------------------------------------------------------------------
# a tier that cannot be written

check "a directory that is not there" run 4 missing checkpoint.fast_dir="$work/none"
check "is a warning at each save" test "$(grep -c '^warning: step .*is its disk mounted' "$work/missing.err")" -eq 4
check "and the durable checkpoints are there" same_files plain4 missing
check "nothing was made in its place" test ! -e "$work/none"
if mount -t tmpfs -o size=2000k tmpfs "$work/small" 2>/dev/null; then
    check "a disk that is too small" run 4 full checkpoint.fast_dir="$work/small"
    check "is a warning" said full '^warning: step .* is not in checkpoint.fast_dir: .*(free some space|No space)'
    check "and the durable checkpoints are there, too" same_files plain4 full
    left() { # the first save has room, the others have not
        local steps
        steps=$(cd "$work/small" && ls -d */*/rank*/step_* | sed 's|.*/||' | sort | uniq -c)
        echo "$steps"
        [ -n "$steps" ] && ! grep -qv '^ *4 ' <<<"$steps"
    }
    check "what is left in the tier is left in every process" left
else
    skip_test "a disk that is too small" "mount is not permitted here"
fi
fast_only() { ! run 0 refused checkpoint.fast_every=2 && said refused 'fast_dir is empty'; }
check "fast_every without fast_dir is refused" fast_only
among() { # it would be removed with an old checkpoint
    mkdir -p "$work/among/checkpoints/tier" && ! run 2 among checkpoint.fast_dir="$work/among/checkpoints/tier" &&
        said among 'fast_dir, .*, is in .*, from which the run removes' &&
        [ ! -e "$work/among/checkpoints/step_00000004" ]
}
check "fast_dir among the durable checkpoints is refused" among
finish

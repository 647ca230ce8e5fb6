#!/usr/bin/env bash
# Saves that are killed, starved and lied to at every system call they make. Whatever happens, the newest
# whole checkpoint is the old or the new one, nothing fails silently, the next save works and cleans up.
set -u
# In memory where there is some: thousands of small files, and no disk to wait for.
[ ! -w /dev/shm ] || export TMPDIR=${TMPDIR:-/dev/shm}
. "$(dirname "$0")/tap.sh"
trap 'mountpoint -q "$work/small" && umount "$work/small"; rm -rf "$work"' EXIT
driver=$work/save_driver run=$work/run said=$work/said fast=$work/fast
mkdir "$work/small" "$fast"

die() { # `check` runs each test in a subshell, which this ends
    echo "$*"
    exit 1
}

compile() {
    ${CC:-cc} -std=gnu11 -O1 -I. -o "$driver" dev/test/save_driver.c -lcjson -lxxhash -lm
}

# A run whose only checkpoint is of step 10.
fresh_run() {
    rm -rf "$run" "${fast:?}"/*
    cp -r "$work/base" "$run"
}

# examine WHAT STEPS [ASIDE]: after WHAT was done to a save, one of STEPS is found, ASIDE was set aside, and a
# save of step 30 works and leaves nothing else behind.
examine() {
    local step left
    step=$("$driver" load "$run" 2>"$work/load.err") || die "$1: load failed: $(cat "$work/load.err")"
    [[ " $2 " == *" $step "* ]] || die "$1: found step $step instead of $2"
    "$driver" save "$run" 30 1 || die "$1: the next save failed"
    [ "$("$driver" load "$run")" = 30 ] || die "$1: step 30 does not load"
    left=$(cd "$run" && echo *)
    [ "$left" = "${3:+$3 }step_00000030" ] || die "$1: left behind: $left"
    [ -n "${FAST_DIR:-}" ] || return 0
    left=$(cd "$fast"/run/past/rank* && echo *)
    [[ "$left" =~ ^(step_000000[12]0 )?step_00000030$ ]] || die "$1: left in the tier: $left"
}

# ----------------------------------------------------------------------------
# strace: $command is what is disturbed

inject() { # SYSCALL WHAT K: does WHAT to the K-th call; exit code of $command, whose stderr goes to $said
    strace -f -qq -y -o "$work/trace" -e "inject=$1:$2:when=$3" "${command[@]}" 2>"$said"
}

# The calls of an undisturbed $command, in $work/calls.
record() {
    fresh_run
    strace -f -qq -y -o "$work/calls" "${command[@]}" >/dev/null 2>&1
    sed -i -E 's/^[0-9]+ +//' "$work/calls"
}

calls() { # SYSCALL: how many of them there are
    grep -c "^$1(" "$work/calls"
}

kill_at_every_call() { # STEP to save, steps that may be found then, [SYSCALL...] (default: all)
    command=("$driver" save "$run" "$1" 1)
    local expected=$2 syscall total k points=0
    shift 2
    record
    # All but the first and the last, which are not the program's.
    mapfile -t all < <(sed -nE '/^(execve|exit_group)/!s/^([a-z0-9_]+)\(.*/\1/p' "$work/calls" | sort -u)
    for syscall in "${@:-${all[@]}}"; do
        total=$(calls "$syscall")
        for ((k = 1; k <= total; k++)); do
            fresh_run
            inject "$syscall" signal=KILL $k && die "$syscall $k of $total: not killed"
            examine "killed at $syscall $k of $total" "$expected"
            points=$((points + 1))
        done
    done
    [ "$points" -gt 10 ] || die "only $points system calls seen"
}

env_fast() { FAST_DIR=$fast "$@"; }

fail_every_call() { # ERRNO
    command=("$driver" save "$run" 20 1)
    local syscall total k code what strict
    record
    for syscall in mkdir openat write fsync close rename unlinkat rmdir flock getdents64 statfs; do
        total=$(calls "$syscall")
        [ "$total" -gt 0 ] || die "a save makes no $syscall"
        for ((k = 1; k <= total; k++)); do
            what="$1 at $syscall $k of $total"
            fresh_run
            inject "$syscall" "error=$1" $k
            code=$?
            # Unreported may stay, if all is well then: a filesystem without locks, and what happened to other
            # files than the new checkpoint's.
            case $syscall in
            close | flock | openat | getdents64) strict='step_00000020.tmp/.*INJECTED' ;;
            *) strict=INJECTED ;;
            esac
            [ -s "$said" ] || ! grep -q "$strict" "$work/trace" || die "$what: not a word"
            if [ "$code" -eq 0 ]; then
                examine "$what, saved" 20
            else
                [ -s "$said" ] || die "$what: exit code $code and not a word"
                [ ! -e "$run/step_00000020.tmp" ] || die "$what: half a checkpoint stays"
                examine "$what" "10 20"
            fi
        done
    done
}

# The disk says that it wrote one byte and wrote none.
swallow_a_byte_of_every_write() {
    command=("$driver" save "$run" 20 2)
    local total k
    record
    total=$(calls write)
    for ((k = 1; k <= total; k++)); do
        fresh_run
        inject write retval=1 $k || die "write $k: the save noticed, how?"
        examine "a byte lost in write $k of $total" 10 step_00000020.bad
    done
}

# A load that meets I/O errors gives the right weights of some step, or an error. Exit code 1: wrong weights.
fail_every_read() {
    command=("$driver" load "$run")
    local syscall total k code step what
    record
    for syscall in openat read newfstatat getdents64; do
        total=$(calls "$syscall")
        for ((k = 1; k <= total; k++)); do
            what="EIO at $syscall $k of $total"
            fresh_run
            "$driver" save "$run" 20 2
            step=$(inject "$syscall" error=EIO $k)
            code=$?
            [ "$code" -ne 1 ] || die "$what: wrong weights"
            [ "$code" -ne 65 ] && [ "$code" -ne 66 ] || die "$what: the run would not be started again"
            [ "$code" -ne 0 ] || [[ "$step" =~ ^[12]0$ ]] || die "$what: found '$step'"
            [ "$code:$step" != 0:10 ] || [ -s "$said" ] || die "$what: fell back without a word"
        done
    done
}

# What a power cut needs, read off the calls of a save: every file written is synced before the rename, its
# directory too, and the name of the directory of checkpoints; that directory itself after the rename and before
# anything is removed.
synced_before_named() {
    command=("$driver" save "$run" 20 1)
    record
    awk -v parent="$work" -v run="$run" -v tmp="$run/step_00000020.tmp" '
        function wrong(what) { print what; failed = 1 }
        { path = $0; sub(/^[^<]*</, "", path); sub(/>.*/, "", path) } # of the first descriptor
        /^openat.*O_CREAT/ {
            file = $0; sub(/.*</, "", file); sub(/>.*/, "", file) # of the last descriptor, the new one
            created[file]
            synced[tmp] = 0
        }
        /^write/ { synced[path] = 0 }
        /^fsync.* = 0$/ { synced[path] = 1 }
        /^rename.*step_00000020.tmp/ {
            renamed++
            for (file in created) if (++files && !synced[file]) wrong(file " is not synced")
            if (!synced[tmp]) wrong("the directory is not synced")
            if (!synced[parent]) wrong("the name of the directory of checkpoints is not synced")
            synced[run] = 0
        }
        /^rename.*delete/ {
            if (!synced[run]) wrong("pruned before the new name was synced")
            synced[run] = 0
        }
        /^unlinkat/ && !synced[run] { wrong("files removed before their name was") }
        END { exit failed || files < 7 || renamed != 1 || !synced[run] }' "$work/calls"
}

# ----------------------------------------------------------------------------
# limits, full filesystems, power cuts, company

# Writes that are really short, then EFBIG.
limited_file_size() {
    local kilobytes
    for kilobytes in 1 2 4 6; do
        fresh_run
        (trap '' XFSZ && ulimit -f $kilobytes && exec "$driver" save "$run" 20 1) 2>"$said" && die "saved?"
        grep -q 'File too large' "$said" || die "$(cat "$said")"
        examine "$kilobytes kB" 10
    done
}

full_filesystem() { # mount options, what the message must say
    mount -t tmpfs -o "$1" tmpfs "$work/small" || die "cannot mount"
    run=$work/small/run
    cp -r "$work/base" "$run"
    "$driver" save "$run" 20 1 2>"$said"
    local code=$? step left
    step=$("$driver" load "$run") left=$(cd "$run" && echo *)
    umount "$work/small"
    [ "$code" -ne 0 ] && grep -q "$2" "$said" || die "exit code $code: $(cat "$said")"
    [ "$step:$left" = 10:step_00000010 ] || die "found step $step; left: $left"
}

mount_image() { # FILE
    mount -o loop "$1" "$work/small"
}

# A filesystem whose only checkpoint, of step 10, is on the disk.
new_image() {
    run=$work/small/run
    mkfs.ext4 -q -F "$work/disk.base" 24M >"$said" 2>&1 && mount_image "$work/disk.base" &&
        "$driver" save "$run" 10 1 && umount "$work/small"
}

# The power goes: what has reached the disk is what a copy of the image holds that is taken without a sync.
cut() { # WHAT STEPS: one of them is found then, nothing had to be set aside, and the next save works
    cp "$work/disk" "$work/disk.cut"
    pkill -KILL -f "^$driver save"
    wait
    umount "$work/small" || die "$1: cannot unmount"
    mount_image "$work/disk.cut" || die "$1: the copy does not mount"
    (examine "$1" "$2")
    local code=$?
    umount "$work/small"
    [ $code -eq 0 ] || exit $code
}

cut_behind_a_save() {
    for step in 20 21 22; do
        cp "$work/disk.base" "$work/disk" && mount_image "$work/disk" || die "cannot mount"
        "$driver" save "$run" $step 1
        cut "power cut behind a save" $step
    done
}

# Stopped behind a system call, with all that it has not synced still in memory, and then the power goes.
cut_at_every_call() {
    local syscall total k pid points=0
    command=("$driver" save "$run" 20 1)
    cp "$work/disk.base" "$work/disk" && mount_image "$work/disk" || die "cannot mount"
    strace -f -qq -y -o "$work/calls" "${command[@]}" && umount "$work/small"
    sed -i -E 's/^[0-9]+ +//' "$work/calls"
    for syscall in mkdir openat write fsync rename unlinkat rmdir; do
        total=$(calls "$syscall")
        for ((k = 1; k <= total; k++)); do
            cp "$work/disk.base" "$work/disk" && mount_image "$work/disk" || die "cannot mount"
            inject "$syscall" signal=STOP $k &
            until pid=$(pgrep -f "^$driver save") && grep -q '^State:.[Tt]' /proc/$pid/status 2>/dev/null; do
                kill -0 $! || die "$syscall $k of $total: not stopped"
                sleep 0.01
            done
            cut "power cut at $syscall $k of $total" "10 20"
            points=$((points + 1))
        done
    done
    [ "$points" -ge 50 ] || die "only $points cuts"
    echo "$points cuts"
}

several_processes() {
    local step pids=() pid k
    fresh_run
    for step in 20 30 40 50 60 70; do
        "$driver" save "$run" $step 1 &
        pids+=($!)
    done
    for ((k = 0; k < 40; k++)); do
        "$driver" load "$run" >/dev/null || die "a load beside saves failed"
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || die "a save failed"
    done
    [ "$("$driver" load "$run")" = 70 ]
}

# ----------------------------------------------------------------------------

check "the driver compiles" compile
check "saves step 10" "$driver" save "$work/base" 10 1
if strace -qq -o /dev/null -e inject=all:error=EIO:when=60000 true 2>/dev/null; then
    check "SIGKILL at every system call of a save: nothing lost, the next save works" \
        kill_at_every_call 20 "10 20"
    check "the same where the step is there already and is replaced" \
        kill_at_every_call 10 10 fsync rename renameat2 unlinkat rmdir
    for code in ENOSPC EIO EDQUOT; do
        check "$code from every system call of a save: nothing lost, nothing silent" fail_every_call $code
    done
    check "everything is synced before it gets its name" synced_before_named
    check "SIGKILL at every system call of a save through the fast tier" \
        env_fast kill_at_every_call 20 "10 20" mkdir openat write fsync rename read close
    check "ENOSPC from every system call of a save through the fast tier" env_fast fail_every_call ENOSPC
    check "a write that loses a byte unnoticed: the load finds it and falls back" \
        swallow_a_byte_of_every_write
    check "EIO from every system call of a load: never wrong weights" fail_every_read
    check "the same of a load from the fast tier" env_fast fail_every_read
else
    skip_test "kills and errors at every system call" "strace cannot trace here"
fi
check "short writes and a file size limit" limited_file_size
if mount -t tmpfs -o size=64k tmpfs "$work/small" 2>/dev/null; then
    umount "$work/small"
    check "a full filesystem is noticed before anything is written" \
        full_filesystem size=256k "free some space"
    check "no more inodes half-way: the older checkpoint stays" \
        full_filesystem size=64m,nr_inodes=16 "No space left"
else
    skip_test "full filesystems" "mount is not permitted here"
fi
if new_image 2>/dev/null; then
    check "power cuts behind a save: the new step is on the disk" cut_behind_a_save
    check "power cuts at every system call of a save: the old step is, or the new one, and whole" cut_at_every_call
else
    skip_test "power cuts" "no ext4 image can be mounted here"
fi
check "several processes saving and loading at once" several_processes
finish

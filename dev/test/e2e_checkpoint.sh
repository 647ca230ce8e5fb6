#!/usr/bin/env bash
# Saves that are killed, starved and lied to, at every system call they make. Whatever happens, the newest whole
# checkpoint is the old or the new one, nothing fails silently, and the next save works and cleans up.
set -u
. dev/test/tap.sh

# Memory, where there is some: thousands of small files, and no disk to wait for.
work=$(mktemp -d "${TMPDIR:-$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)}/e2e_checkpoint.XXXXXX") || exit 73
trap 'mountpoint -q "$work/small" && umount "$work/small"; rm -rf "$work"' EXIT
driver=$work/save_driver
run=$work/run

compile() {
    ${CC:-cc} -std=gnu11 -O1 -I. -o "$driver" dev/test/save_driver.c -lcjson -lxxhash -lm
}

# A run whose only checkpoint is of step 10, ready to save step 20.
fresh_run() {
    rm -rf "$run"
    cp -r "$work/base" "$run"
}

# $1: what was done to the save of step 20; $2: the steps that may be found now; $3: what may be set aside.
# Then goes on with step 30.
examine() {
    local step left
    step=$("$driver" load "$run" 2>"$work/load.err") || { echo "$1: load failed: $(cat "$work/load.err")"; return 1; }
    case " $2 " in *" $step "*) ;; *) echo "$1: found step $step instead of $2"; return 1 ;; esac
    "$driver" save "$run" 30 1 || { echo "$1: the next save failed"; return 1; }
    [ "$("$driver" load "$run")" = 30 ] || { echo "$1: step 30 does not load"; return 1; }
    left=$(cd "$run" && echo *)
    [ "$left" = "${3:+$3 }step_00000030" ] || { echo "$1: left behind: $left"; return 1; }
}

traced() { # INJECTION, command: its exit code; stderr in save.err
    strace -f -qq -o "$work/trace" -e trace=all -e "inject=$1" "${@:2}" >/dev/null 2>"$work/save.err"
}

calls() { # SYSCALL (a pattern): how many of them the undisturbed $command makes
    fresh_run
    strace -f -qq -o "$work/calls" "${command[@]}" >/dev/null 2>&1
    grep -cE "^[0-9]+ +($1)\(" "$work/calls"
}

kill_at_every_call() { # STEP to save, steps that may be found then, SYSCALL... (default: whatever is called)
    command=("$driver" save "$run" "$1" 1)
    local expected=$2 syscall total k points=0
    shift 2
    calls . >/dev/null
    # not before the program begins, nor behind its end
    [ $# -gt 0 ] || mapfile -t all < <(sed -nE '/execve|exit_group/!s/^[0-9]+ +([a-z0-9_]+)\(.*/\1/p' "$work/calls" | sort -u)
    for syscall in "${@:-${all[@]}}"; do
        total=$(calls "$syscall")
        for ((k = 1; k <= total; k++)); do
            fresh_run
            traced "$syscall:signal=KILL:when=$k" "${command[@]}" && { echo "$syscall $k: not killed"; return 1; }
            examine "killed at $syscall $k of $total" "$expected" || return 1
            points=$((points + 1))
        done
    done
    [ "$points" -gt 10 ] || { echo "only $points system calls seen"; return 1; }
}

fail_every_call() { # ERRNO
    command=("$driver" save "$run" 20 1)
    local syscall total k code
    for syscall in mkdir openat write fsync close rename unlinkat rmdir flock getdents64 statfs; do
        total=$(calls "$syscall")
        [ "$total" -gt 0 ] || { echo "a save makes no $syscall"; return 1; }
        for ((k = 1; k <= total; k++)); do
            fresh_run
            traced "$syscall:error=$1:when=$k" "${command[@]}"
            code=$?
            case $syscall in
            # Unreported may stay: a close that had nothing to write, a filesystem without locks, a file that the
            # C library can do without, the end of a list that was removed entirely.
            close | flock | openat | getdents64) ;;
            *) [ -s "$work/save.err" ] || { echo "$1 at $syscall $k: not a word"; return 1; } ;;
            esac
            if [ "$code" -eq 0 ]; then
                examine "$1 at $syscall $k of $total, saved" 20 || return 1
            else
                [ -s "$work/save.err" ] || { echo "$1 at $syscall $k: exit code $code without a word"; return 1; }
                [ ! -e "$run/step_00000020.tmp" ] || { echo "$1 at $syscall $k: half a checkpoint stays"; return 1; }
                examine "$1 at $syscall $k of $total" "10 20" || return 1
            fi
        done
    done
}

# What a power cut needs, read off the trace of a save: every file written is synced before the rename, its
# directory too and last, the directory of checkpoints after the rename.
synced_before_named() {
    command=(-y "$driver" save "$run" 20 1) # -y: strace shows the paths of descriptors
    calls . >/dev/null
    sed -E 's/^[0-9]+ +//' "$work/calls" | awk -v run="$run" '
        { path = $0; sub(/^[^<]*</, "", path); sub(/>.*/, "", path) }
        /^openat.*O_CREAT/ { file = $0; sub(/.*</, "", file); sub(/>.*/, "", file); created[file] = 1 }
        /^write/ { synced[path] = 0 }
        /^fsync.* = 0$/ { synced[path] = 1 }
        /^openat.*O_CREAT/ { synced[run "/step_00000020.tmp"] = 0 }
        /^rename.*step_00000020.tmp/ {
            renamed++
            for (file in created) { files++; if (!synced[file]) { print file " is not synced"; bad++ } }
            if (!synced[run "/step_00000020.tmp"]) { print "the directory is not synced"; bad++ }
            synced[run] = 0
        }
        /^rename.*delete/ { if (!synced[run]) { print "pruned before the new name was synced"; bad++ } synced[run] = 0 }
        /^unlinkat/ { if (!synced[run]) { print "removed before the name was"; bad++ } }
        END { exit bad > 0 || files < 7 || renamed != 1 || !synced[run] }'
}

# The disk says that it wrote one byte and wrote none.
swallow_a_byte_of_every_write() {
    command=("$driver" save "$run" 20 2)
    local total k
    total=$(calls write)
    for ((k = 1; k <= total; k++)); do
        fresh_run
        traced "write:retval=1:when=$k" "${command[@]}" || { echo "write $k: the save noticed, how?"; return 1; }
        examine "one byte lost in write $k of $total" 10 step_00000020.bad || return 1
    done
}

# A load that meets I/O errors gives the right weights of some step, or an error; never wrong ones (exit code 1).
fail_every_read() {
    command=("$driver" load "$run")
    local syscall total k code step
    for syscall in openat read newfstatat getdents64; do
        total=$(calls "$syscall")
        for ((k = 1; k <= total; k++)); do
            fresh_run
            "$driver" save "$run" 20 2
            step=$(strace -f -qq -o "$work/trace" -e "inject=$syscall:error=EIO:when=$k" "${command[@]}" 2>"$work/save.err")
            code=$?
            [ "$code" -ne 1 ] || { echo "EIO at $syscall $k: wrong weights"; return 1; }
            [ "$code" -ne 0 ] || case $step in
            20) ;;
            10) [ -s "$work/save.err" ] || { echo "EIO at $syscall $k: fell back without a word"; return 1; } ;;
            *) echo "EIO at $syscall $k of $total: found '$step'"; return 1 ;;
            esac
        done
    done
}

# A limit on the size of files: writes that are really short, then EFBIG.
limited_file_size() {
    local kilobytes
    for kilobytes in 1 2 4 6; do
        fresh_run
        (trap '' XFSZ; ulimit -f "$kilobytes"; "$driver" save "$run" 20 1 2>"$work/save.err") && { echo "saved?"; return 1; }
        grep -q 'File too large' "$work/save.err" || { cat "$work/save.err"; return 1; }
        examine "$kilobytes kB" 10 || return 1
    done
}

full_filesystem() { # mount options, what the message must say
    mount -t tmpfs -o "$1" tmpfs "$work/small" || return 1
    local result=0
    cp -r "$work/base" "$work/small/run"
    if "$driver" save "$work/small/run" 20 1 2>"$work/save.err"; then echo "saved into a full filesystem"; result=1; fi
    grep -q "$2" "$work/save.err" || { cat "$work/save.err"; result=1; }
    [ "$("$driver" load "$work/small/run")" = 10 ] || result=1
    [ "$(ls "$work/small/run")" = step_00000010 ] || { ls "$work/small/run"; result=1; }
    umount "$work/small"
    return $result
}

# What has reached the disk when the power goes: a copy of a filesystem's image, taken without a sync, right
# behind the save. The new step must be in it, every time.
power_cuts() {
    local step found
    for step in 20 30 40; do
        mkfs.ext4 -q -F "$work/disk" 24M >/dev/null 2>&1 && mount -o loop "$work/disk" "$work/small" || return 1
        "$driver" save "$work/small/run" 10 1 && sync && "$driver" save "$work/small/run" $step 1
        cp "$work/disk" "$work/cut"
        umount "$work/small"
        mount -o loop "$work/cut" "$work/small" || { echo "the copy does not mount"; return 1; }
        found=$("$driver" load "$work/small/run")
        umount "$work/small"
        [ "$found" = "$step" ] || { echo "found step $found instead of $step"; return 1; }
    done
}

several_processes() {
    fresh_run
    local step pids=() pid k
    for step in 20 30 40 50 60 70; do
        "$driver" save "$run" $step 1 &
        pids+=($!)
    done
    for ((k = 0; k < 40; k++)); do
        "$driver" load "$run" >/dev/null || { echo "a load beside saves failed"; return 1; }
    done
    for pid in "${pids[@]}"; do wait "$pid" || { echo "a save failed"; return 1; }; done
    [ "$("$driver" load "$run")" = 70 ]
}

check "the driver compiles" compile
check "saves step 10" "$driver" save "$work/base" 10 1
if strace -qq -o /dev/null -e inject=all:error=EIO:when=60000 true 2>/dev/null; then
    check "SIGKILL at every system call of a save: nothing lost, the next save works" kill_at_every_call 20 "10 20"
    check "the same where the step is there already and is replaced" \
        kill_at_every_call 10 10 fsync rename renameat2 unlinkat rmdir
    for code in ENOSPC EIO EDQUOT; do
        check "$code from every system call of a save: nothing lost, nothing silent" fail_every_call $code
    done
    check "everything is synced before it gets its name" synced_before_named
    check "a write that loses a byte unnoticed: found by the load, which falls back" swallow_a_byte_of_every_write
    check "EIO from every system call of a load: never wrong weights" fail_every_read
else
    for what in "SIGKILL at" "errors from" "lost bytes in" "EIO of a load from"; do
        skip_test "$what every system call" "strace cannot trace here"
    done
fi
check "short writes and a file size limit" limited_file_size
mkdir -p "$work/small"
if mount -t tmpfs -o size=64k tmpfs "$work/small" 2>/dev/null && umount "$work/small"; then
    check "a full filesystem is noticed before anything is written" full_filesystem size=256k "free some space"
    check "no more inodes half-way: the older checkpoint stays" full_filesystem size=64m,nr_inodes=16 "No space left"
else
    skip_test "a full filesystem" "mount is not permitted here"
fi
if mkfs.ext4 -q -F "$work/disk" 24M >/dev/null 2>&1 && mount -o loop "$work/disk" "$work/small" 2>/dev/null; then
    umount "$work/small"
    check "power cuts behind a save: the new step is on the disk" power_cuts
else
    skip_test "power cuts" "no ext4 image can be mounted here"
fi
check "several processes saving and loading at once" several_processes
finish

#!/usr/bin/env bash
# Do the tests bite? Applies the mutations of dev/test/mutations.txt one at a time to a copy of the tree, and runs
# the tests that are named beside it: every mutation must make one fail. One that does not compile is a mistake of the list.
#
#   dev/test/mutations.sh [FIRST [LAST]]     numbers of the list; all by default; `make mutations`
#
# The tests, with commas between them: NAME, a group of test_gpt2_emu; test_NAME, a unit test; NAME.sh, a script with the
# emulated trainer. A line of the list: FILE <tab> TESTS <tab> OLD TEXT <tab> NEW TEXT
# <tab> WHAT IT BREAKS, with \n for the end of a line. OLD TEXT stands in FILE exactly once, so that a list that no
# longer fits the code is an error and not a mutation that was not made.
set -u
cd "$(dirname "$0")/../.."
list=dev/test/mutations.txt first=${1:-1} last=${2:-$(grep -c . "$list")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r Makefile ./*.c ./*.cu llmc dev scripts configs "$work"
mkdir "$work/original" && cp -r ./*.c ./*.cu llmc dev scripts "$work/original" # the tree may change meanwhile
make -s -C "$work" DNNL=0 build/reference.o build/reference32.o build/test/simulated_step train_gpt_cpu corpus >/dev/null || exit 70
export CMOCKA_MESSAGE_OUTPUT=TAP

emulated() { # PROGRAM SOURCE [what else the compiler is given]
    dev/emu/compile "$1" "$2" -O1 -march=native -fopenmp -w "${@:3}" -lcjson -lxxhash -lpcre2-8 -lz -lzstd
}
build() { # TEST: its command goes to `commands`
    case $1 in
    *.sh)
        make -s WARNINGS= DNNL=0 train_gpt_cpu && emulated ./train_gpt_emu train_gpt.cu -DUSE_NCCL '-DVERSION="mutant"' &&
            echo "bash dev/test/$1" >>commands
        ;;
    test_*) make -s WARNINGS= DNNL=0 "build/test/$1" && echo "build/test/$1" >>commands ;;
    *)
        [ "$1" != model ] || printf '#define TESTING\n#include "train_gpt.cu"\n' >"$1.cu"
        printf '#include "dev/test/cuda_%s.cuh"\nint main(void) { test_%s(); return tap_finish(); }\n' "$1" "$1" >>"$1.cu"
        emulated "./group_$1" "$1.cu" build/reference.o build/reference32.o && echo "./group_$1" >>commands
        rm "$1.cu"
        ;;
    esac
}
build_all() { # TESTS
    local test
    cd "$work" || return
    echo "set -e" >commands
    for test in ${1//,/ }; do build "$test" || return; done
}
survived=0 number=0

mutate() { # FILE OLD NEW
    python3 - "$@" <<'PYTHON'
import sys
path, old, new = sys.argv[1], *(x.replace("\\n", "\n") for x in sys.argv[2:])
new = "" if new == "(nothing)" else new
text = open(path).read()
if text.count(old) != 1:
    sys.exit(f"{path}: {old!r} is there {text.count(old)} times")
open(path, "w").write(text.replace(old, new))
PYTHON
}

# A test that fails anyway catches nothing.
for tests in $(sed -n "$first,${last}p" "$list" | cut -f 2 | tr , '\n' | sort -u); do
    (build_all "$tests" && timeout 600 bash commands) >"$work/log" 2>&1 && continue
    tail -n 20 "$work/log" | sed 's/^/#   /'
    echo "not ok - $tests fails without a mutation" && exit 1
done

while IFS=$'\t' read -r file tests old new what; do
    number=$((number + 1))
    if [ $number -lt "$first" ] || [ $number -gt "$last" ]; then continue; fi
    if ! (cd "$work" && mutate "$file" "$old" "$new"); then
        echo "not ok $number - $file: the list does not fit: $what"
        survived=$((survived + 1))
    elif ! (build_all "$tests") >"$work/log" 2>&1; then
        echo "not ok $number - $file: does not compile: $what"
        tail -n 5 "$work/log" | sed 's/^/#   /'
        survived=$((survived + 1))
    elif (cd "$work" && timeout 600 bash commands) >"$work/log" 2>&1; then
        echo "not ok $number - $file: SURVIVED: $what"
        survived=$((survived + 1))
    else
        echo "ok $number - $file: $what: $(grep -c '^not ok' "$work/log") failures"
    fi
    cp "$work/original/$file" "$work/$file"
done <"$list"
echo "1..$number"
[ $survived -eq 0 ]

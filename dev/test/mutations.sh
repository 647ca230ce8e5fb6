#!/usr/bin/env bash
# Do the tests bite? Applies the mutations of dev/test/mutations.txt one at a time to a copy of the tree, builds the
# group of test_gpt2_emu that is named beside it, and runs that: every mutation must make it fail. One that does not
# compile is a mistake of the list.
#
#   dev/test/mutations.sh [FIRST [LAST]]     numbers of the list; all by default; `make mutations`
#
# The groups "layouts", "overlap" and "replicas" are the trainer itself, as several processes (dev/test/layouts_quick.sh,
# e2e_overlap.sh and e2e_guard.sh: numbers, time, and faults); "guard" is test_guard and test_trainer, "telemetry" its unit
# tests and e2e_telemetry.sh, test_NAME that unit test. A line of the list: FILE <tab> TEST GROUP <tab> OLD TEXT <tab> NEW TEXT
# <tab> WHAT IT BREAKS, with \n for the end of a line. OLD TEXT stands in FILE exactly once, so that a list that no
# longer fits the code is an error and not a mutation that was not made.
set -u
cd "$(dirname "$0")/../.."
list=dev/test/mutations.txt first=${1:-1} last=${2:-$(grep -c . "$list")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r Makefile ./*.c ./*.cu llmc dev scripts configs "$work"
mkdir "$work/original" && cp -r ./*.c ./*.cu llmc dev "$work/original" # the tree may change meanwhile
for group in $(cut -f 2 "$list" | grep -vE '^(layouts|overlap|replicas|guard|telemetry|test_.*)$' | sort -u); do
    [ "$group" != model ] || printf '#define TESTING\n#include "train_gpt.cu"\n' >"$work/$group.cu"
    printf '#include "dev/test/cuda_%s.cuh"\nint main(void) { test_%s(); return tap_finish(); }\n' "$group" "$group" \
        >>"$work/$group.cu"
done
make -s -C "$work" DNNL=0 build/reference.o build/reference32.o build/test/simulated_step train_gpt_cpu corpus >/dev/null || exit 70
build() { # GROUP
    local script=dev/test/layouts_quick.sh
    if [[ $1 = test_* ]]; then
        cd "$work" && make -s "build/test/$1" DNNL=0 && cp "build/test/$1" mutant
        return
    fi
    [ "$1" != overlap ] || script=dev/test/e2e_overlap.sh
    case $1 in
    guard) # what is decided and done, on the CPU
        cd "$work" && printf '#!/bin/sh\nexport CMOCKA_MESSAGE_OUTPUT=TAP\nbuild/test/test_guard && build/test/test_trainer\n' >mutant && chmod +x mutant &&
            make -s WARNINGS= build/test/test_guard build/test/test_trainer
        return
        ;;
    replicas)
        cd "$work" && printf '#!/bin/sh\nexec bash dev/test/e2e_guard.sh replicas\n' >mutant && chmod +x mutant
        return
        ;;
    telemetry)
        cd "$work" && printf '#!/bin/sh\nexport CMOCKA_MESSAGE_OUTPUT=TAP\nbuild/test/test_metrics && build/test/test_telemetry && \
            exec bash dev/test/e2e_telemetry.sh\n' >mutant && chmod +x mutant &&
            make -s WARNINGS= build/test/test_metrics build/test/test_telemetry train_gpt_cpu train_gpt_emu
        return
        ;;
    esac
    if [ "$1" = layouts ] || [ "$1" = overlap ]; then
        cd "$work" && printf '#!/bin/sh\nexec bash %s\n' $script >mutant && chmod +x mutant &&
            dev/emu/compile ./train_gpt_emu train_gpt.cu -O1 -march=native -fopenmp -w -DUSE_NCCL '-DVERSION="mutant"' \
                -lcjson -lxxhash -lpcre2-8 -lz -lzstd
        return
    fi
    cd "$work" && dev/emu/compile ./mutant "$1.cu" -O1 -march=native -fopenmp -w build/reference.o build/reference32.o \
        -lcjson -lxxhash -lpcre2-8 -lz -lzstd
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

while IFS=$'\t' read -r file group old new what; do
    number=$((number + 1))
    if [ $number -lt "$first" ] || [ $number -gt "$last" ]; then continue; fi
    if ! (cd "$work" && mutate "$file" "$old" "$new"); then
        echo "not ok $number - $file: the list does not fit: $what"
        survived=$((survived + 1))
    elif ! (build "$group") >"$work/log" 2>&1; then
        echo "not ok $number - $file: does not compile: $what"
        tail -n 5 "$work/log" | sed 's/^/#   /'
        survived=$((survived + 1))
    elif (cd "$work" && timeout 600 ./mutant) >"$work/log" 2>&1; then
        echo "not ok $number - $file: SURVIVED: $what"
        survived=$((survived + 1))
    else
        echo "ok $number - $file: $what: $(grep -c '^not ok' "$work/log") failures"
    fi
    cp "$work/original/$file" "$work/$file"
done <"$list"
echo "1..$number"
[ $survived -eq 0 ]

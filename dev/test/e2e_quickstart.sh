#!/usr/bin/env bash
# scripts/quickstart.sh in its short form, on texts made here: every stage, a second run, what it refuses.
set -u
. "$(dirname "$0")/tap.sh"
if ! command -v python3 >/dev/null; then
    skip_test "scripts/quickstart.sh" "there is no python3"
    finish
fi

# 400 paragraphs of sentences that repeat themselves, about 250 kB; $1 between paragraphs
make_text() {
    python3 - "$1" <<'END'
import random, sys
random.seed(1)
words = ["".join(random.choices("aeioumnrst", k=random.randint(2, 7))) for _ in range(800)]
paragraphs = [" ".join(random.choices(words, k=120)) + "." for _ in range(400)]
sys.stdout.write(sys.argv[1].encode().decode("unicode_escape").join(paragraphs) + "\n")
END
}
quickstart() { TEXT=$1 DIR=$2 QUICK=1 scripts/quickstart.sh; }
refuses() { # CODE TEXT COMMAND...: exits so, and its last line has the text
    local code=$1 text=$2 output
    shift 2
    output=$("$@" 2>&1)
    [ $? -eq "$code" ] && [[ ${output##*$'\n'} == "error: "*"$text"* ]] || ! echo "$output"
}
# every file of a directory with its time and size, but for the report, which is always drawn anew
state() { find "$1" -type f ! -name report.html -printf '%p %T@ %s\n' | sort; }
# the text comes apart into its 400 paragraphs, whatever was between them
is_cut_in_400() {
    ./corpus info "$1"/data/*.bin | sed -E 's/.* ([0-9]+) documents .*/\1/' |
        awk '{ n += $1 } END { exit n != 400 }'
}

make_text '\n\n' >"$work/my text.txt"
check "from a text file to a model" quickstart "$work/my text.txt" "$work/one"
for file in tokenizer.json data/train_000000.bin data/val_000000.bin run/log.jsonl report.html sample.txt \
    run/checkpoints/step_00000030/{model.safetensors,config.json,tokenizer.json}; do
    check "which leaves $file" test -s "$work/one/$file"
done
check "and a checkpoint that verifies" \
    ./train_gpt_cpu checkpoint verify "$work/one/run/checkpoints/step_00000030"

before=$(state "$work/one")
check "a second run" quickstart "$work/my text.txt" "$work/one"
check "has nothing to do" diff <(echo "$before") <(state "$work/one")
rm -r "$work/one/data" "$work/one/sample.txt"
mkdir "$work/one/data.tmp" && echo half >"$work/one/data.tmp/train_000000.bin" # killed while encoding
check "after a kill while encoding" quickstart "$work/my text.txt" "$work/one"
check "what was missing is made, and the same as before" \
    diff <(awk '{ print $1, $3 }' <<<"$before") <(state "$work/one" | awk '{ print $1, $3 }')
check "another text for the same directory is refused" \
    refuses 64 "was made from" quickstart "$work" "$work/one"

for gap in '\n\n\n' '\r\n\r\n' '\n'; do
    name=$(printf '%s' "$gap" | tr -d '\\')
    make_text "$gap" >"$work/$name.txt"
    check "paragraphs apart by $gap" quickstart "$work/$name.txt" "$work/$name"
    check "are the documents" is_cut_in_400 "$work/$name"
done
mkdir "$work/folder" && split -n l/3 --additional-suffix=.txt "$work/my text.txt" "$work/folder/"
check "a folder of few files" quickstart "$work/folder" "$work/of_folder"

check "no such text" refuses 66 "no such file" quickstart "$work/none.txt" "$work/two"
head -c 5000 "$work/my text.txt" >"$work/short.txt"
check "too short a text" refuses 65 "at least 100 kB" quickstart "$work/short.txt" "$work/two"
check "leave nothing behind" test ! -e "$work/two"
finish

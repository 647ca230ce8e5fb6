#!/usr/bin/env bash
# `corpus` as a user runs it: text in, tokenizer and shards out, and every way of asking for something wrong.
set -u
. "$(dirname "$0")/tap.sh"
binary=$PWD/corpus
cd "$work" || exit 73
corpus() { "$binary" "$@"; }

# fails_with CODE TEXT command...: the command must end with that code and one line that has TEXT in it
fails_with() {
    local code=$1 text=$2 output actual
    shift 2
    output=$("$@" 2>&1 >/dev/null)
    actual=$?
    printf '%s\n' "$output"
    [ "$actual" -eq "$code" ] && [ "$(printf '%s\n' "$output" | wc -l)" -eq 1 ] && case $output in
        "error: "*"$text"*) return 0 ;;
        *) return 1 ;;
    esac
}

# A text of N pseudo-random sentences in the letters of English, a blank line behind every tenth.
make_text() {
    awk -v n="$1" -v seed="$2" 'BEGIN {
        srand(seed)
        split("the of and to in that was his he it with as for had is not but at on her be by you", w, " ")
        for (i = 1; i <= n; i++) {
            line = "Sentence " int(rand() * 100000) ":"
            for (k = 0; k < 12; k++) line = line " " w[int(rand() * 23) + 1]
            print line "."
            if (i % 10 == 0) print ""
        }
    }'
}

same_files() { # every file of folder A is in B, and the other way round, byte for byte
    diff -r "$1" "$2"
}

no_leftovers() { [ -z "$(find "$1" -name '*.tmp')" ]; }

# ---- a text becomes a tokenizer, shards and the text again
mkdir in && make_text 20000 1 >in/a.txt
printf 'caf\303\251 \360\237\230\200\r\n\n\nraw \377\376 bytes\n\n\001' >in/b.txt
encode() { corpus encode --tokenizer tokenizer.json --document-separator '\n\n' "$@"; }

check "bpe trains" corpus bpe --vocab-size 600 --document-separator '\n\n' --out tokenizer.json in
check "encode writes shards" encode --val-fraction 0.1 --out-dir out in
check "all files are there" test -s out/train_000000.bin -a -s out/train_000000.idx \
    -a -s out/val_000000.bin -a -s out/val_000000.idx -a -s out/tokenizer.json
check "nothing temporary is left" no_leftovers out
check "verify finds them good" corpus verify out/train_000000.bin out/val_000000.bin
check "info prints them" corpus info out/train_000000.bin

# ---- and the text again
whole_text() {
    corpus encode --tokenizer tokenizer.json --val-fraction 0 --out-dir whole in/a.txt &&
        corpus decode whole/train_000000.bin | cmp - in/a.txt
}
check "a document decodes to the bytes that it was" whole_text
documents() { # all of them in a row, cut exactly at the separators, bytes that are not UTF-8 included
    encode --val-fraction 0 --out-dir documents in/b.txt &&
        corpus decode --start 0 documents/train_000000.bin >documents/text &&
        printf 'caf\303\251 \360\237\230\200\r<|endoftext|>\nraw \377\376 bytes<|endoftext|>\001' |
            cmp - documents/text
}
check "and so do several" documents
first_document() {
    [ "$(corpus decode --document 0 out/train_000000.bin)" = "$(head -n 10 in/a.txt)" ]
}
check "the first document is the first one" first_document
range() { [ "$(corpus decode --start 1 --count 5 out/train_000000.bin | head -c 3)" = Sen ]; }
check "decode prints a range of tokens" range

# ---- the same bytes from any number of threads, from compressed files, from JSONL
for threads in 1 3; do
    check "bpe with $threads thread(s)" corpus bpe --vocab-size 600 --threads $threads \
        --document-separator '\n\n' --out "tokenizer_$threads.json" in
    check "encode with $threads thread(s)" encode --val-fraction 0.1 --threads $threads \
        --out-dir "out_$threads" in
    check "the tokenizers agree" cmp tokenizer.json "tokenizer_$threads.json"
    check "the shards agree" same_files out "out_$threads"
done
mkdir packed && gzip -k -c in/a.txt >packed/a.txt.gz
if command -v zstd >/dev/null; then
    zstd -q -c in/b.txt >packed/b.txt.zst
else
    cp in/b.txt packed/b.txt
fi
check "compressed files encode" encode --val-fraction 0.1 --out-dir out_packed packed
check "and give the same shards" same_files out out_packed
printf '{"id":1,"body":"one\\nA"}\n\n{"body":"two"}\n{"body":""}\n' >lines.jsonl
check "JSONL encodes" corpus encode --tokenizer tokenizer.json --field body --val-fraction 0 \
    --out-dir out_jsonl lines.jsonl
jsonl_text() { [ "$(corpus decode --document 0 out_jsonl/train_000000.bin; echo .)" = $'one\nA.' ]; }
check "and decodes" jsonl_text
two_documents() { corpus info out_jsonl/train_000000.bin | grep -q ' 2 documents'; }
check "an empty text is no document" two_documents

# ---- many shards, both widths, another seed, replacing
check "small shards" encode --val-fraction 0.1 --shard-tokens 20000 --width 32 --out-dir small in
check "are several" test -s small/train_000003.bin
check "and good" corpus verify small/*.bin
check "what is there is kept" fails_with 64 "is there already" encode --out-dir small in
check "unless told otherwise" encode --force --val-fraction 0.1 --seed 2 --out-dir small in
check "then nothing old remains" test ! -e small/train_000001.bin -a ! -e small/train_000003.idx
other_split() { ! cmp -s small/val_000000.bin out/val_000000.bin; }
check "another seed splits in another way" other_split

# ---- conversion
tail -c +1025 out/train_000000.bin >nano.bin
eot=$(corpus info out/train_000000.bin | sed 's/.*end-of-text \([0-9]*\).*/\1/')
check "convert from nanoGPT" \
    corpus convert --from nanogpt --eot "$eot" --vocab-size 600 --out converted.bin nano.bin
same_payload() { cmp <(tail -c +1025 converted.bin) nano.bin && cmp converted.idx out/train_000000.idx; }
check "keeps tokens and documents" same_payload
check "and is good" corpus verify --tokenizer tokenizer.json converted.bin

# ---- damage
damaged() { # damaged OFFSET OCTAL TEXT: with that byte there, verify says so
    cp out/train_000000.bin out/train_000000.idx out/tokenizer.json damaged/
    printf "\\$2" | dd of=damaged/train_000000.bin bs=1 seek="$1" conv=notrunc status=none
    fails_with 65 "$3" corpus verify damaged/train_000000.bin
}
mkdir damaged
check "a flipped token is found" damaged 5000 001 "not the ones that were written"
check "a changed header is found" damaged 24 377 "documents"
check "a changed tokenizer hash is found" damaged 40 0 "another tokenizer"
check "a changed text size is found" damaged 64 0 "decodes to"
cp out/val_000000.idx damaged/train_000000.idx
cp out/train_000000.bin damaged/
check "a foreign index is found" fails_with 65 "do not belong together" corpus verify damaged/train_000000.bin

# ---- asking for something wrong
commands() { ! corpus 2>/dev/null && corpus --help | grep -q "corpus encode"; }
check "no command prints the commands" commands
options() { corpus encode --help | grep -q -- --val-fraction; }
check "help of a command lists its options" options
check "an unknown command" fails_with 64 "nearest valid one is 'encode'" corpus encoed
check "an unknown option" fails_with 64 "nearest valid one is --vocab-size" corpus bpe --vocab_size 300 in
check "an option of another command" fails_with 64 "unknown option --seed" corpus bpe --seed 300 in
check "a missing value" fails_with 64 "--out needs a value" corpus bpe --vocab-size 300 in --out
check "a missing option" fails_with 64 "--out is required" corpus bpe --vocab-size 300 in
check "a value that is no number" fails_with 64 "whole number" corpus bpe --vocab-size 8k --out x in
check "a number out of range" fails_with 64 "from 1 to 1024" encode --threads 0 --out-dir x in
check "a fraction of 1" fails_with 64 "[0, 1)" encode --val-fraction 1 --out-dir x in
check "a width of 8" fails_with 64 "must be 16, 32 or auto" encode --width 8 --out-dir x in
check "an unknown pattern" fails_with 64 "llama3" corpus bpe --pattern gpt5 --vocab-size 300 --out x in
check "no input" fails_with 64 "no input" encode --out-dir x
check "an input that is not there" fails_with 66 "cannot read" encode --out-dir x nothing
check "a folder without text" fails_with 66 "has no .txt" encode --out-dir x damaged
check "one document and a validation part" fails_with 65 "none of 1 document(s) fell to" \
    corpus encode --tokenizer tokenizer.json --out-dir x in/a.txt
printf ' \n' >blank.txt
check "white space alone" fails_with 65 "no document" encode --out-dir x blank.txt
printf '{"text":"ok"}\n{"text":7}\n' >bad.jsonl
check "a bad line is named" fails_with 65 "bad.jsonl line 2: the field is not a string" \
    encode --out-dir x bad.jsonl
check "a failed run leaves no shard" bash -c "! ls x/*.bin x/*.tmp 2>/dev/null"
check "a vocabulary the text cannot fill" fails_with 64 "too small" \
    corpus bpe --vocab-size 5000 --out x lines.jsonl --field body
check "a tokenizer that is none" fails_with 65 "lines.jsonl" \
    corpus encode --tokenizer lines.jsonl --out-dir x in
check "a shard that is none" fails_with 65 "is not a token shard" corpus info in/a.txt
check "a document that is not there" fails_with 64 "has no document 999999" \
    corpus decode --document 999999 out/val_000000.bin

# ---- killed at any time: no shard under its final name unless all are complete
killed() {
    local i
    for i in 01 02 03 05 08; do
        rm -rf killed
        timeout -s KILL "0.$i" "$binary" encode --tokenizer tokenizer.json --document-separator '\n\n' \
            --val-fraction 0.1 --out-dir killed in >/dev/null 2>&1
        if [ -e killed/train_000000.bin ]; then
            corpus verify killed/*.bin || return 1
        fi
    done
    encode --force --val-fraction 0.1 --out-dir killed in && same_files out killed
}
check "killed runs leave nothing half-made, and the next one cleans up" killed

# A disk that fills up: the size limit stands for it.
disk_full() {
    (
        ulimit -f 8
        trap '' XFSZ
        fails_with 74 "cannot write" corpus encode --tokenizer tokenizer.json --document-separator '\n\n' \
            --val-fraction 0.1 --out-dir full in
    ) && [ -z "$(ls full)" ]
}
check "a full disk is an error and leaves nothing" disk_full
finish

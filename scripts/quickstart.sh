#!/usr/bin/env bash
# From raw text to a trained model: text, tokenizer, token shards, training, a sample, a report.
# Started by `make quickstart`, which has installed and built what this needs.
#
#   TEXT=PATH   your own text: a file or folder of .txt or .jsonl, .gz or .zst of both; default: six novels
#   QUICK=1     the short form: the same stages with a model that learns next to nothing, in half a minute
#   DIR=PATH    where everything goes; default: quickstart, or build/quickstart_short in the short form
#
# Each stage writes under another name first and renames at its end, so what is there is complete: a second
# run does only what is not yet done.
set -eu

TEXT=${TEXT:-} QUICK=${QUICK:-}
dir=${DIR:-$([ -n "$QUICK" ] && echo build/quickstart_short || echo quickstart)}
vocab_size=8192
overrides=()
if [ -n "$QUICK" ]; then
    vocab_size=1024
    overrides=(model.vocab_size=1024 model.hidden_size=64 model.intermediate_size=192
        model.num_hidden_layers=2 model.num_attention_heads=4 model.num_key_value_heads=2
        schedule.max_steps=30 schedule.warmup_steps=5 eval.every=15 eval.batches=4 log.every=5)
fi
own_text="or give a text of your own: make quickstart TEXT=/path/to/file"

say() { printf '\n== %s\n' "$*"; }
give_up() { # CODE SENTENCE
    echo "error: $2" >&2
    exit "$1"
}

# ----------------------------------------------------------------------------
# text

# Six novels by Jane Austen, public domain: $1, one JSON line a chapter.
fetch_austen() {
    local package=r-cran-janeaustenr work=$dir/austen.tmp
    rm -rf "$work" && mkdir -p "$work"
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        give_up 69 "the example text is in a Debian package: use Debian or Ubuntu, $own_text"
    # A machine that has no package lists yet must fetch them first, which takes root.
    if ! (cd "$work" && { apt-get -qq download $package ||
        { apt-get -qq update && apt-get -qq download $package; }; }) >"$work/log" 2>&1; then
        tail -n 3 "$work/log" >&2
        give_up 69 "cannot fetch package $package (apt-get says why above): try again later, $own_text"
    fi
    dpkg-deb -x "$work"/$package*.deb "$work/package"
    scripts/austen.py "$work/package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb" >"$work/austen.jsonl"
    mv "$work/austen.jsonl" "$1"
    rm -rf "$work"
}

# Training and validation text are told apart by documents, so one plain file ($1) has to be cut into some: at
# the widest gaps of which there are at least 100 (in its first 64 MB).
choose_separator() {
    local gap
    for gap in '\n\n\n' '\n\n' '\n'; do
        separator=(--document-separator "$(printf "$gap.")")
        separator[1]=${separator[1]%.} # $(...) drops newlines at the end
        python3 - "$1" "${separator[1]}" <<'END' && break
import sys
sys.exit(open(sys.argv[1], "rb").read(1 << 26).count(sys.argv[2].encode()) < 100)
END
    done
}

mkdir -p "$dir"
separator=()
if [ -z "$TEXT" ]; then
    input=$dir/austen.jsonl
    if [ ! -e "$input" ]; then
        say "text: six novels by Jane Austen"
        fetch_austen "$input"
    fi
else
    [ -r "$TEXT" ] || give_up 66 "TEXT=$TEXT: there is no such file or folder"
    input=$TEXT
    if [ -f "$TEXT" ] && [[ $TEXT != *.jsonl && $TEXT != *.gz && $TEXT != *.zst ]]; then
        choose_separator "$TEXT"
    fi
fi

# What the directory was made from; another text needs another directory.
if [ -e "$dir/source" ] && [ "$(cat "$dir/source")" != "$input" ]; then
    give_up 64 "$dir was made from $(cat "$dir/source"), not from $input: remove it or add DIR=/another/place"
fi
echo "$input" >"$dir/source"

# ----------------------------------------------------------------------------
# tokenizer and shards

if [ ! -e "$dir/tokenizer.json" ]; then
    say "tokenizer: byte-level BPE, $vocab_size tokens"
    ./corpus bpe --vocab-size $vocab_size --pattern cl100k --special '<|endoftext|>' \
        "${separator[@]}" --out "$dir/tokenizer.json" "$input"
fi
if [ ! -e "$dir/data" ]; then
    say "token shards: one document in twenty is kept for validation"
    rm -rf "$dir/data.tmp"
    ./corpus encode --tokenizer "$dir/tokenizer.json" --val-fraction 0.05 \
        "${separator[@]}" --out-dir "$dir/data.tmp" "$input"
    mv "$dir/data.tmp" "$dir/data"
fi

# ----------------------------------------------------------------------------
# training, which goes on from the newest checkpoint by itself

config=(configs/quickstart.json "data.train=$dir/data/train_*.bin" "data.validation=$dir/data/val_*.bin"
    "data.tokenizer=$dir/tokenizer.json" "log.run_dir=$dir/run" "${overrides[@]}")
if [ ! -e "$dir/run/done" ] || [ configs/quickstart.json -nt "$dir/run/done" ]; then
    say "training (Ctrl-C saves and stops; the same command goes on)"
    ./train_gpt_cpu "${config[@]}"
    touch "$dir/run/done"
    rm -f "$dir/sample.txt"
fi

if [ ! -e "$dir/sample.txt" ]; then
    say "a sample"
    ./train_gpt_cpu sample "${config[@]}" | tee "$dir/sample.tmp"
    mv "$dir/sample.tmp" "$dir/sample.txt"
fi

report=$(scripts/report "$dir/run" -o "$dir/report.html")
model=$(printf '%s\n' "$dir"/run/checkpoints/step_???????? | tail -n 1)
say "done"
cat <<END
model    $model (config.json, model.safetensors, tokenizer.json: opens in transformers as it is)
report   $report (loss, validation, learning rate and throughput curves)
sample   $dir/sample.txt
more     ./train_gpt_cpu sample ${config[*]@Q} sample.prompt="It was"
END

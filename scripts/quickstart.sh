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
set -euo pipefail

TEXT=${TEXT:-} QUICK=${QUICK:-}
dir=${DIR:-$([ -n "$QUICK" ] && echo build/quickstart_short || echo quickstart)}
vocab_size=8192
overrides=()
if [ -n "$QUICK" ]; then
    vocab_size=1024
    overrides=(model.hidden_size=64 model.intermediate_size=192 model.num_hidden_layers=2
        model.num_attention_heads=4 model.num_key_value_heads=2 schedule.max_steps=30
        schedule.warmup_steps=5 eval.every=15 eval.batches=4 log.every=5)
fi
# Threads that wait sleep: on a core that something else needs too, spinning holds up the thread waited for.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
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

# Validation text is set apart by whole documents, so a text in few files ($1) has to be cut into documents:
# at the widest gaps of which its first 64 MB have at least 100.
choose_separator() {
    local gap
    [ "$(find -L "$1" -type f | wc -l)" -lt 100 ] || return 0
    for gap in '\n\n\n' '\n\n' '\r\n\r\n' '\n'; do
        separator=(--document-separator "$gap")
        { find -L "$1" -type f -exec cat {} + 2>/dev/null || true; } | head -c 64M | python3 -c '
import sys
gap = sys.argv[1].encode().decode("unicode_escape").encode()
sys.exit(sys.stdin.buffer.read().count(gap) < 100)' "$gap" && break
    done
}

separator=()
if [ -z "$TEXT" ]; then
    input=$dir/austen.jsonl
    mkdir -p "$dir"
    if [ ! -e "$input" ]; then
        say "text: six novels by Jane Austen"
        fetch_austen "$input"
    fi
else
    [ -r "$TEXT" ] || give_up 66 "TEXT=$TEXT: there is no such file or folder"
    input=$TEXT bytes=$(du -bsL "$TEXT" | cut -f 1)
    [ "$bytes" -ge 100000 ] || give_up 65 "TEXT=$TEXT has $bytes bytes: at least 100 kB are needed to learn from"
    [ "$bytes" -ge 1000000 ] || vocab_size=1024 # it has too few different words for more
    case $TEXT in
    *.jsonl | *.jsonl.gz | *.jsonl.zst) ;; # a document a line
    *.gz | *.zst) separator=(--document-separator '\n\n') ;;
    *) choose_separator "$TEXT" ;;
    esac
fi

# What the directory was made from; another text needs another directory.
mkdir -p "$dir"
[ -e "$dir/source" ] || echo "$input" >"$dir/source"
if [ "$(cat "$dir/source")" != "$input" ]; then
    give_up 64 "$dir was made from $(cat "$dir/source"), not from $input: remove it or add DIR=/another/place"
fi

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

run=$dir/run
if [ ! -e "$run/done" ] || [ configs/quickstart.json -nt "$run/done" ]; then
    say "training (Ctrl-C saves and stops; the same command goes on)"
    ./train_gpt_cpu configs/quickstart.json "data.train=$dir/data/train_*.bin" \
        "data.validation=$dir/data/val_*.bin" "data.tokenizer=$dir/data/tokenizer.json" "log.run_dir=$run" \
        model.vocab_size=$vocab_size model.eos_token_id=$((vocab_size - 1)) "${overrides[@]}"
    touch "$run/done"
    rm -f "$dir/sample.txt"
fi
if [ ! -e "$dir/sample.txt" ]; then
    say "a sample"
    ./train_gpt_cpu sample "$run/run_config.json" | tee "$dir/sample.tmp"
    mv "$dir/sample.tmp" "$dir/sample.txt"
fi

scripts/report "$run" -o "$dir/report.html" >/dev/null
model=$(printf '%s\n' "$run"/checkpoints/step_???????? | tail -n 1)
say "done"
cat <<END
model directory   $model (opens in transformers as it is)
report            $dir/report.html (loss, validation, learning rate, throughput)
another sample    ./train_gpt_cpu sample $run/run_config.json sample.prompt="It was" sample.seed=2
END

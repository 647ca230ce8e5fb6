#!/usr/bin/env bash
# Trains a tiny model of each family and opens its checkpoint with transformers: same logits, same tokens.
# Started by `make check-hf`, which has made a Python with the packages it needs, $PYTHON.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Any text will do: this project's own.
./corpus bpe --vocab-size 512 --special '<|endoftext|>' --out "$work/tokenizer.json" llmc/*.h >/dev/null
./corpus encode --tokenizer "$work/tokenizer.json" --val-fraction 0 --out-dir "$work/data" llmc/*.h >/dev/null
for config in configs/tiny_*.json; do
    run=$work/$(basename "$config" .json)
    ./train_gpt_cpu "$config" model.vocab_size=512 "data.train=$work/data/train_*.bin" data.validation= \
        "data.tokenizer=$work/tokenizer.json" "log.run_dir=$run" schedule.max_steps=20 >/dev/null
    model=$run/checkpoints/step_00000020
    build/test/write_logits "$model" "$run/logits.safetensors"
    "$PYTHON" dev/test/check_hf.py "$model" "$run/logits.safetensors"
done

# Sourced by tests that train: $data, overrides for a run config, is a tokenizer of 512 tokens and shards of this
# repository's own text, in $work; $program is the trainer, emulated unless TRAIN_GPT names a real one.
program=${TRAIN_GPT:-./train_gpt_emu}
cat llmc/*.h dev/doc/*.md >"$work/text.txt"
./corpus bpe --vocab-size 512 --special '<|endoftext|>' --out "$work/tokenizer.json" "$work/text.txt" >/dev/null
./corpus encode --tokenizer "$work/tokenizer.json" --out-dir "$work/data" --val-fraction 0.1 \
    --document-separator $'\n\n' "$work/text.txt" >/dev/null
data=("data.train=$work/data/train_*.bin" "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/tokenizer.json")
continues() { [ "$(head -c ${#1} "$2")" = "$1" ] && [ "$(wc -c <"$2")" -gt $((${#1} + 1)) ]; } # PROMPT FILE

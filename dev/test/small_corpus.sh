# Sourced by tests that train: $data, overrides for a run config, is a tokenizer of 512 tokens and shards of a text, in
# $work; $program is the trainer, emulated unless TRAIN_GPT names a real one. The text is always the same, so that no
# change elsewhere gives a test other numbers: sentences of made-up words, frequent ones far more often than rare ones.
program=${TRAIN_GPT:-./train_gpt_emu}
awk '
function pick(n) { state = state * 16807 % 2147483647; return 1 + int(n * state / 2147483647) }
BEGIN {
    state = 1
    syllables = split("ba ce di fo gu lan mer ni po rus sa ten vi xo zu", syllable)
    for (w = 1; w <= 4000; w++)
        for (s = pick(4); s > 0; s--) word[w] = word[w] syllable[pick(syllables)]
    while (size < 1800000) {
        text = ""
        for (sentences = pick(9); sentences > 0; sentences--) {
            for (words = 3 + pick(12); words > 0; words--) text = text word[int(4000 ^ (pick(1000) / 1000))] " "
            sub(/ $/, ". ", text)
        }
        size += length(text) + 2
        print text "\n"
    }
}' >"$work/text.txt"
./corpus bpe --vocab-size 512 --special '<|endoftext|>' --out "$work/tokenizer.json" "$work/text.txt" >/dev/null
./corpus encode --tokenizer "$work/tokenizer.json" --out-dir "$work/data" --val-fraction 0.1 \
    --document-separator $'\n\n' "$work/text.txt" >/dev/null
data=("data.train=$work/data/train_*.bin" "data.validation=$work/data/val_*.bin" "data.tokenizer=$work/tokenizer.json")
continues() { [ "$(head -c ${#1} "$2")" = "$1" ] && [ "$(wc -c <"$2")" -gt $((${#1} + 1)) ]; } # PROMPT FILE

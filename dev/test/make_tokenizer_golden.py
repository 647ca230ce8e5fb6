#!/usr/bin/env python3
"""Golden token ids for dev/test/test_tokenizer.c, from two independent implementations that must agree.

    pip install tiktoken==0.14.0 tokenizers==0.23.3
    make_tokenizer_golden.py generate           write dev/test/golden/tokenizer_ids.json
    make_tokenizer_golden.py check NAME FILE    a tokenizer.json of ours gives Hugging Face the ids stored as NAME
    make_tokenizer_golden.py text               the text that the small tokenizers in dev/test/golden were trained on:
        make_tokenizer_golden.py text >text.txt
        for p in gpt2 cl100k llama3 qwen2; do
            ./corpus bpe --vocab-size 640 --pattern $p --special "<|endoftext|>" --out dev/test/golden/$p.json text.txt
        done

NAME is gpt2, cl100k, llama3, qwen2 (the small ones), or gpt2_release (../shared/data/gpt2, not in the repository).
The patterns below are the published ones, copied from tiktoken_ext/openai_public.py and from the tokenizer.json of
Llama 3 and Qwen2; the C program spells some of them differently.
"""
import json
import pathlib
import sys

import tiktoken
import tokenizers

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "tokenizer_ids.json"
RELEASE = HERE.parent.parent.parent / "shared" / "data" / "gpt2"
SHAKESPEARE = RELEASE.parent / "text" / "tinyshakespeare.txt"

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
              r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}

STRINGS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "\n ", " \n ", "\x0b\x0c", "a", "'", "\"",
    "Hello, world!", "Hello  world", "Hello   world", " leading", "trailing ", "trailing   ", "trailing\n",
    "trailing \n", "trailing \n\n", "trailing\n  ", "line one\nline two\r\nline three\rline four\n\n\nline eight",
    "tabs\tand\t\tmore\t tabs \t here", "\tindent\n\t\tindent\n    four\n        eight",
    "  \n  \n  x", " \t\n \t x", "a \n b", "a\n \nb", "a  \nb", "...\n\n...\r\n\r\n(\n", "!!!\n\n\nx", "x!\r\n\r\ny",
    "I'm you're he's we'll they've I'd don't", "I'M YOU'RE HE'S WE'LL THEY'VE I'D DON'T", "'s't're've'm'll'd",
    "'S'T'RE'VE'M'LL'D'Re'vE'lL", "'sa 'ta 'rea 'vea 'ma 'lla 'da", "'r 'v 'l 're 've 'll", "''s '''s \"'s\"", "'hello'",
    "'\u017f '\u017fa x'\u017f", "'l\u017f 'v\u0435", "it\u2019s \u2018quoted\u2019 \u201ctext\u201d", "rock'n'roll o'clock",
    "0", "12", "123", "1234", "12345", "1234567890", " 1 12 123 1234", "3.14159", "1,000,000", "v1.2.3", "x86_64",
    "\u0663\u0664\u0665\u0666", "12\u0663", "123\u0663", "1234\u0663\u0664", "\u00bd \u00b2\u00b3 \u2167 \u3007", "a1b2c3",
    "!", "!!", "!!!", "?!?!", "a!b", "a !b", "a! b", " !", " !!", "(a", "((a", "(((a)))", "$x$", "#include <stdio.h>",
    "int main(void) { return 0; }\n", "for (int i = 0; i < n; i++) {\n    x[i] += y[i] * 2.5e-3f;\n}\n",
    "https://example.org/a/b?c=d&e=%20f#g", "user@example.org", "C:\\Users\\x\\y.txt", "a_b_c __init__ CamelCaseWord",
    "<|endoftext|>", "text <|endoftext|> text", "<|im_start|>user\n", "[INST] </s> <s>",
    "\u00e9", "\u00e9t\u00e9", "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m", "abc\u00e9def", " \u00e9", "  \u00e9", "   \u00e9 x",
    "\n\u00e9", "\t\u00e9", "(\u00e9", "!\u00e9", "1\u00e9", "\u00e91", "e\u0301 combining", "a\u0300\u0301\u0302\u0303b", "\u0301x",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u0430\u043a \u0434\u0435\u043b\u0430?",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.",
    "\u4e2d\u6587 mixed \u4e2d\u6587english\u4e2d\u6587 123\u4e2d", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", "\u0939\u093f\u0928\u094d\u0926\u0940 \u0935\u093e\u0915\u094d\u092f",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\U0001f600", "\U0001f600\U0001f601 \U0001f602", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "x\U0001f600y", " \U0001f600", "\U0001d538\U0001d539 \U0001d7d8\U0001d7d9", "\u2764\ufe0f",
    "a\u00a0b", "\u00a0", " \u00a0 ", "\u00a0\u00a0x", "a\u0085b", "\u0085", "a \u0085 b", "\u3000", "a\u3000\u3000b", "\u3000\u4f60",
    "\u2028x\u2029y", "a\u200bb", "a\u180eb", " \u180e x", "\u1680x", "\u2003\u2003x", "\ufeffBOM", "a\u00adb", "\u202fx", " \n\u3000\n x",
    "\x1c\x1d\x1e\x1f", "a\x1cb", "\x01\x02\x7f", "\ufffd \ufffe \uffff", "\ue000\uf8ff", "\U0010ffff", "\u0080\u009f\u00ad\u00ff",
    "\u00c3\u00a9 \u00e2\u20ac\u2122 mojibake", "\u0120\u010a looks spelled", "\u212a\u212b \ufb01 \ufb06", "\u0130\u0131 \u00df\u1e9e", "\u01c5 \u02b0 \u16ee",
    " " * 7, " " * 16, " " * 100, "\n" * 50, " \n" * 30, "\t" * 33, "a" * 40, "a" * 700, "ab" * 200, "9" * 200, "!" * 200, "=" * 80,
    "-" * 3 + "\n" + "-" * 300, "x" * 95, "x" * 96, "x" * 97, "x" * 15, "x" * 16, " " + "x" * 14, "\u00e9" * 120, "\u4f60" * 90,
    "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis supercalifragilisticexpialidocious",
    "aaabaabaaab" * 20, "The quick brown fox jumps over the lazy dog. " * 3,
]


def alphabet():
    """GPT-2's printable character of each byte."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def tokens_of(vocab, specials):
    """token bytes -> id, from the "vocab" of a tokenizer.json or an encoder.json"""
    byte_of = alphabet()
    return {bytes(byte_of[c] for c in text): i for text, i in vocab.items() if text not in specials}


def small(name):
    path = HERE / "golden" / f"{name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    specials = {t["content"]: t["id"] for t in data["added_tokens"]}
    ranks = tokens_of(data["model"]["vocab"], specials)
    reference = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=specials)
    return reference, hugging_face(path)


def release():
    vocab = json.loads((RELEASE / "encoder.json").read_text(encoding="utf-8"))
    lines = (RELEASE / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    end = {"<|endoftext|>": vocab["<|endoftext|>"]}
    reference = tiktoken.Encoding("gpt2_release", pat_str=PATTERNS["gpt2"], mergeable_ranks=tokens_of(vocab, end),
                                  special_tokens=end)
    model = tokenizers.models.BPE(vocab, [tuple(line.split(" ")) for line in lines])
    other = tokenizers.Tokenizer(model)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = tokenizers.decoders.ByteLevel()
    return reference, other


def hugging_face(path):
    """A tokenizer.json with its special tokens taken out, so that their text is ordinary text."""
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    data["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def generate():
    table = [{"text": s, "ids": {}} for s in STRINGS]
    for name in [*PATTERNS, "gpt2_release"]:
        reference, other = release() if name == "gpt2_release" else small(name)
        for row in table:
            ids = reference.encode_ordinary(row["text"])
            theirs = other.encode(row["text"], add_special_tokens=False).ids
            assert reference.decode_bytes(ids) == row["text"].encode(), (name, row["text"])
            if ids != theirs:
                sys.exit(f"{name}: tiktoken and tokenizers disagree on {row['text']!r}: {ids} {theirs}")
            row["ids"][name] = ids
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table)
    GOLDEN.write_text(f"[\n{lines}\n]\n")
    print(f"{len(table)} strings x {len(PATTERNS) + 1} tokenizers -> {GOLDEN}")


def check(name, path):
    tokenizers.Tokenizer.from_file(path)  # opens as it stands, special tokens included
    ours = hugging_face(path)
    rows = json.loads(GOLDEN.read_text())
    wrong = [row["text"] for row in rows if ours.encode(row["text"], add_special_tokens=False).ids != row["ids"][name]]
    print(f"{path}: {len(rows) - len(wrong)} of {len(rows)} strings as {name}", *map(repr, wrong))
    sys.exit(bool(wrong))


def text():
    sys.stdout.buffer.write(SHAKESPEARE.read_bytes()[:60000])
    for s in STRINGS:
        sys.stdout.buffer.write((s + "\n" + s + "\n").encode())


if __name__ == "__main__":
    commands = {"generate": (generate, 0), "check": (check, 2), "text": (text, 0)}
    command, arguments = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if command not in commands or len(arguments) != commands[command][1]:
        sys.exit(__doc__)
    commands[command][0](*arguments)

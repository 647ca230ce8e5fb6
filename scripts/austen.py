#!/usr/bin/env python3
"""Six novels by Jane Austen, from the data file of Debian's package r-cran-janeaustenr, as JSON Lines.

    scripts/austen.py Rdata.rdb >novels.jsonl

One line for each chapter: {"text": "CHAPTER IV\\n\\nfirst paragraph\\n\\nsecond paragraph..."}. The package
has the novels as lines of about 72 columns; here a paragraph is one line, since where a typesetter broke it
is nothing to learn. Needs no R: Rdata.rdb is a sequence of serialised vectors of strings.

    Rdata.rdb   for each novel: u32 size of the vector, then the vector as a zlib stream
    vector      "X\\n"  i32 version  i32 writer  i32 reader  [version 3: i32 n, n bytes: name of the encoding]
                i32 type = 16  i32 count  count x (i32 flags, i32 n, n bytes)          all big-endian
Source: R Internals, sections 1.8 "Serialization Formats" and 1.15 (lazy-load databases).
"""
import hashlib
import json
import re
import struct
import sys
import zlib

STRSXP = 16  # R's type code of a vector of strings
SHA256 = "65b434d16a8755142bfa95ba19c5f9abd0d30cf3dffe3b6793e834f9f56dcc96"  # all lines, each with a newline
HEADING = re.compile(r"CHAPTER [IVXLC0-9]+", re.IGNORECASE)
NOT_TEXT = re.compile(r"VOLUME [IVX]+|THE END|FINIS", re.IGNORECASE)


def read_vector(data):
    """The strings of one vector."""
    position = 2

    def integer():
        nonlocal position
        position += 4
        return struct.unpack_from(">i", data, position - 4)[0]

    def string():
        nonlocal position
        size = integer()
        position += size
        return data[position - size : position].decode()

    version, _, _ = integer(), integer(), integer()
    if version == 3:
        string()
    if data[:2] != b"X\n" or integer() != STRSXP:
        raise ValueError("not a serialised vector of strings")
    strings = []
    for _ in range(integer()):
        integer()  # flags
        strings.append(string())
    return strings


def read_novels(data):
    """The lines of each novel."""
    while data:
        stream = zlib.decompressobj()
        yield read_vector(stream.decompress(data[4:]))
        data = stream.unused_data


def chapters(lines):
    """The chapters of a novel as text, without title page, volume headings and the word "Finis"."""
    found = []
    for block in "\n".join(lines).split("\n\n"):
        block = block.strip("\n")
        if HEADING.fullmatch(block):
            found.append([block])
        elif block and found and not NOT_TEXT.fullmatch(block):
            verse = block.startswith(" ")  # poems and letter heads are indented: their line breaks are meant
            found[-1].append(block if verse else re.sub(r"\s+", " ", block))
    return ["\n\n".join(blocks) for blocks in found]


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/austen.py Rdata.rdb >novels.jsonl")
    try:
        with open(sys.argv[1], "rb") as file:
            novels = list(read_novels(file.read()))
    except (OSError, ValueError, struct.error, zlib.error) as error:
        sys.exit(f"error: {sys.argv[1]}: {error}")
    text = "".join(line + "\n" for novel in novels for line in novel)
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        sys.exit(f"error: {sys.argv[1]} holds other text than the package's version 1.0.0 does")
    for novel in novels:
        for chapter in chapters(novel):
            print(json.dumps({"text": chapter}, ensure_ascii=False))


if __name__ == "__main__":
    main()

// `corpus convert` behind its options: token files of nanoGPT and Megatron-LM to token shards.
//
//   nanoGPT   NAME.bin: nothing but tokens, 16-bit unless told otherwise; end-of-text BEHIND each document
//   Megatron  NAME.bin: nothing but tokens; NAME.idx: their type, sequences and documents
//
// Where the end-of-text token is known, every document is written with it in front, as `corpus encode` does,
// and one behind it is dropped. Where it is not, tokens are copied as they are.
// Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (d98e8a64).
#pragma once
#include "dev/data/shard_writer.h" // defines: ShardWriter, shard_writer_tokens, shard_writer_end_document
#include "llmc/utils.h"            // defines: Error, fail, EXIT_*, checked_add, checked_mul

// The token types that Megatron's index names; its others are floating-point.
typedef struct {
    int code;
    int bytes;
    bool is_signed;
} TokenType;

static const TokenType TOKEN_TYPES[] = {{1, 1, false}, {2, 1, true}, {3, 2, true},
                                        {4, 4, true},  {5, 8, true}, {8, 2, false}};
static const TokenType TOKEN_U16 = {0, 2, false}, TOKEN_U32 = {0, 4, false};

// Tokens in a mapping, of any type and alignment.
typedef struct {
    const uint8_t* bytes;
    uint64_t count;
    TokenType type;
} TokenSpan;

static inline int64_t span_token(const TokenSpan* span, uint64_t i) {
    uint64_t value = 0;
    int bits = 8 * span->type.bytes;
    memcpy(&value, span->bytes + i * (uint64_t)span->type.bytes, (size_t)span->type.bytes);
    bool negative = span->type.is_signed && (value >> (bits - 1) & 1) != 0;
    return negative && bits < 64 ? (int64_t)(value | ~0ull << bits) : (int64_t)value;
}

// Appends a span to the document being written.
static inline bool write_span(ShardWriter* writer, const TokenSpan* span, Error* err) {
    uint32_t tokens[4096];
    for (uint64_t done = 0; done < span->count;) {
        size_t n = span->count - done < 4096 ? (size_t)(span->count - done) : 4096;
        for (size_t i = 0; i < n; i++) {
            int64_t token = span_token(span, done + i);
            if (token < 0 || token > INT32_MAX)
                return fail(err, EXIT_BAD_DATA,
                            "token %llu for %s is %lld, which no vocabulary has: is this the right dtype?",
                            (unsigned long long)(writer->header.num_tokens + i), writer->path,
                            (long long)token);
            tokens[i] = (uint32_t)token;
        }
        if (!shard_writer_tokens(writer, tokens, n, err)) return false;
        done += n;
    }
    return true;
}

// ----------------------------------------------------------------------------
// nanoGPT

// With eot < 0 the whole file is one run of tokens without documents.
static inline bool convert_nanogpt(ShardWriter* writer, const TokenSpan* all, int eot, Error* err) {
    if (eot < 0) return write_span(writer, all, err);
    for (uint64_t start = 0, end; start < all->count; start = end + 1) {
        for (end = start; end < all->count && span_token(all, end) != eot;) end++;
        if (end == start) continue;
        uint32_t separator = (uint32_t)eot;
        TokenSpan document = {all->bytes + start * (uint64_t)all->type.bytes, end - start, all->type};
        if (!shard_writer_tokens(writer, &separator, 1, err) || !write_span(writer, &document, err))
            return false;
        shard_writer_end_document(writer, 0);
    }
    return true;
}

// ----------------------------------------------------------------------------
// Megatron
//
//   byte 0               9         17      18               26               34
//        +---------------+---------+-------+----------------+----------------+
//        | "MMIDIDX\0\0" | version | type  | num_sequences  | num_boundaries |
//        |               | uint64 1| uint8 | uint64         | uint64         |
//        +---------------+---------+-------+----------------+----------------+
//        | lengths: int32 (num_sequences)            in tokens                |
//        | offsets: int64 (num_sequences)            in bytes of NAME.bin     |
//        | boundaries: int64 (num_boundaries)        document i is sequences  |
//        |     [boundaries(i), boundaries(i + 1)); the first one is 0         |
//        | modes: int8 (num_sequences), may be absent; not used here          |
//        +--------------------------------------------------------------------+

enum { MEGATRON_HEADER_BYTES = 34 };

typedef struct {
    TokenType type;
    uint64_t num_sequences, num_boundaries;
    const uint8_t *lengths, *offsets, *boundaries; // not aligned
} MegatronIndex;

static inline uint64_t load_u64(const uint8_t* p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

// Parses an index whose NAME.bin has payload_bytes; data must outlive *index. Holds afterwards: every
// sequence lies in the payload, the boundaries ascend and end at num_sequences.
static inline bool megatron_index_parse(MegatronIndex* index, const void* data, size_t size,
                                        uint64_t payload_bytes, const char* name, Error* err) {
    const uint8_t* bytes = (const uint8_t*)data;
    uint64_t expected;
    memset(index, 0, sizeof *index);
    if (size < MEGATRON_HEADER_BYTES || memcmp(bytes, "MMIDIDX\0\0", 9) != 0 || load_u64(bytes + 9) != 1)
        return fail(err, EXIT_BAD_DATA,
                    "%s is not a Megatron index: it does not start with MMIDIDX and version 1", name);
    for (size_t i = 0; i < sizeof TOKEN_TYPES / sizeof TOKEN_TYPES[0]; i++)
        if (TOKEN_TYPES[i].code == bytes[17]) index->type = TOKEN_TYPES[i];
    if (index->type.bytes == 0)
        return fail(err, EXIT_BAD_DATA, "%s: type code %u is not a type of tokens", name, bytes[17]);
    uint64_t n = index->num_sequences = load_u64(bytes + 18),
             m = index->num_boundaries = load_u64(bytes + 26);
    if (!checked_extent(MEGATRON_HEADER_BYTES, n, 12, &expected) ||
        !checked_extent(expected, m, 8, &expected) ||
        (expected != size && (!checked_add(expected, n, &expected) || expected != size)))
        return fail(err, EXIT_BAD_DATA,
                    "%s is %zu bytes, which does not fit its %llu sequences and %llu boundaries", name, size,
                    (unsigned long long)n, (unsigned long long)m);
    index->lengths = bytes + MEGATRON_HEADER_BYTES;
    index->offsets = index->lengths + 4 * n;
    index->boundaries = index->offsets + 8 * n;
    for (uint64_t i = 0; i < n; i++) {
        int32_t length;
        uint64_t end;
        memcpy(&length, index->lengths + 4 * i, sizeof length);
        if (length < 0 ||
            !checked_extent(load_u64(index->offsets + 8 * i), (uint64_t)length, (uint64_t)index->type.bytes,
                            &end) ||
            end > payload_bytes)
            return fail(err, EXIT_BAD_DATA,
                        "%s: sequence %llu of %d tokens does not lie in its .bin of %llu bytes", name,
                        (unsigned long long)i, length, (unsigned long long)payload_bytes);
    }
    for (uint64_t i = 0; i < m; i++) {
        uint64_t boundary = load_u64(index->boundaries + 8 * i);
        uint64_t before = i != 0 ? load_u64(index->boundaries + 8 * (i - 1)) : 0;
        if (boundary < before || boundary > n || (i == 0 && boundary != 0))
            return fail(err, EXIT_BAD_DATA,
                        "%s: document boundary %llu is sequence %llu, after %llu, of %llu", name,
                        (unsigned long long)i, (unsigned long long)boundary, (unsigned long long)before,
                        (unsigned long long)n);
    }
    if (m == 0 || load_u64(index->boundaries + 8 * (m - 1)) != n)
        return fail(err, EXIT_BAD_DATA, "%s: its documents do not end with its last sequence (%llu)", name,
                    (unsigned long long)n);
    return true;
}

static inline TokenSpan megatron_sequence(const MegatronIndex* index, const void* payload, uint64_t i) {
    int32_t length;
    memcpy(&length, index->lengths + 4 * i, sizeof length);
    TokenSpan span = {(const uint8_t*)payload + load_u64(index->offsets + 8 * i), (uint64_t)length,
                      index->type};
    return span;
}

static inline bool convert_megatron(ShardWriter* writer, const MegatronIndex* index, const void* payload,
                                    int eot, Error* err) {
    uint32_t separator = (uint32_t)eot;
    for (uint64_t document = 0; document + 1 < index->num_boundaries; document++) {
        uint64_t first = load_u64(index->boundaries + 8 * document);
        uint64_t end = load_u64(index->boundaries + 8 * (document + 1));
        if (first == end) continue;
        if (eot >= 0 && !shard_writer_tokens(writer, &separator, 1, err)) return false;
        for (uint64_t i = first; i < end; i++) {
            TokenSpan span = megatron_sequence(index, payload, i);
            if (i + 1 == end && eot >= 0 && span.count > 0 && span_token(&span, span.count - 1) == eot)
                span.count--;
            if (!write_span(writer, &span, err)) return false;
        }
        shard_writer_end_document(writer, 0);
    }
    return true;
}

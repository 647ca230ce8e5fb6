// `corpus info`, `verify` and `decode` behind their options: looking at finished shards.
#pragma once
#include "llmc/shard.h"     // defines: Shard, shard_*, ShardIndex, shard_index_*
#include "llmc/tokenizer.h" // defines: Tokenizer, token_bytes, token_byte_length, tokenizer_hash
#include "llmc/utils.h"     // defines: Error, fail, EXIT_*, String, write_all
#include <xxhash.h>

// ----------------------------------------------------------------------------
// info

static inline void print_shard(const Shard* shard) {
    const ShardHeader* h = &shard->header;
    printf("%s: %llu tokens of %d bits", shard->path, (unsigned long long)h->num_tokens,
           8 * shard->token_bytes);
    if (h->num_documents != 0)
        printf(", %llu documents (%.1f tokens each)", (unsigned long long)h->num_documents,
               (double)h->num_tokens / (double)h->num_documents);
    if (h->source_bytes != 0 && h->num_tokens != 0)
        printf(", %.3f bytes a token", (double)h->source_bytes / (double)h->num_tokens);
    if (h->vocab_size != 0) printf(", vocabulary %u", h->vocab_size);
    if (shard->eot_id >= 0) printf(", end-of-text %d first", shard->eot_id);
    if ((h->tokenizer_hash[0] | h->tokenizer_hash[1]) != 0)
        printf(", tokenizer %016llx%016llx", (unsigned long long)h->tokenizer_hash[1],
               (unsigned long long)h->tokenizer_hash[0]);
    printf("\n");
}

// ----------------------------------------------------------------------------
// verify

// Tokens below the vocabulary, as many end-of-text tokens as documents, source_bytes as the tokenizer says.
static inline bool verify_tokens(const Shard* shard, const Tokenizer* tokenizer, Error* err) {
    const ShardHeader* h = &shard->header;
    uint64_t limit = h->vocab_size != 0 ? h->vocab_size : (uint64_t)SHARD_MAX_VOCAB, bytes = 0,
             separators = 0;
    if (tokenizer != NULL && tokenizer->vocab_size < limit) limit = tokenizer->vocab_size;
    for (uint64_t i = 0; i < h->num_tokens; i++) {
        uint32_t token = shard_token(shard, i);
        if (token >= limit)
            return fail(err, EXIT_BAD_DATA, "%s: token %llu is %u, which must be below %llu", shard->path,
                        (unsigned long long)i, token, (unsigned long long)limit);
        separators += shard->eot_id >= 0 && token == (uint32_t)shard->eot_id;
        if (tokenizer != NULL) bytes += token_byte_length(tokenizer, token);
    }
    if (shard->eot_id >= 0 && separators != h->num_documents)
        return fail(err, EXIT_BAD_DATA, "%s has %llu end-of-text tokens (%d), but announces %llu documents",
                    shard->path, (unsigned long long)separators, shard->eot_id,
                    (unsigned long long)h->num_documents);
    if (tokenizer != NULL && h->source_bytes != 0 && bytes != h->source_bytes)
        return fail(err, EXIT_BAD_DATA, "%s decodes to %llu bytes, but announces %llu", shard->path,
                    (unsigned long long)bytes, (unsigned long long)h->source_bytes);
    return true;
}

static inline bool verify_payload_hash(const Shard* shard, Error* err) {
    const uint64_t* expected = shard->header.payload_hash;
    if (expected[0] == 0 && expected[1] == 0) return true;
    XXH128_hash_t hash = XXH3_128bits(shard->tokens, shard->map_bytes - SHARD_HEADER_BYTES);
    return (hash.low64 == expected[0] && hash.high64 == expected[1]) ||
           fail(err, EXIT_BAD_DATA,
                "%s: its tokens are not the ones that were written (hash %016llx instead of %016llx)",
                shard->path, (unsigned long long)hash.low64, (unsigned long long)expected[0]);
}

// The index, and that every document begins with the end-of-text token.
static inline bool verify_index(const Shard* shard, Error* err) {
    ShardIndex index;
    if ((shard->header.flags & SHARD_HAS_INDEX) == 0) return true;
    if (!shard_index_open(&index, shard, err)) return false;
    uint64_t start = 0;
    for (uint64_t i = 0; shard->eot_id >= 0 && err->code == 0 && i < index.num_documents;
         start = index.ends[i++])
        if (shard_token(shard, start) != (uint32_t)shard->eot_id)
            fail(err, EXIT_BAD_DATA, "%s: document %llu starts with token %u instead of end-of-text (%d)",
                 shard->path, (unsigned long long)i, shard_token(shard, start), shard->eot_id);
    shard_index_close(&index);
    return err->code == 0;
}

static inline bool same_tokenizer(const Shard* shard, const Tokenizer* tokenizer, Error* err) {
    TokenizerHash hash = tokenizer_hash(tokenizer);
    const uint64_t* expected = shard->header.tokenizer_hash;
    bool known = expected[0] != 0 || expected[1] != 0;
    return !known || (hash.low == expected[0] && hash.high == expected[1]) ||
           fail(err, EXIT_BAD_DATA,
                "%s was encoded with another tokenizer: its hash is %016llx, the one given has %016llx",
                shard->path, (unsigned long long)expected[0], (unsigned long long)hash.low);
}

// Everything that can be known of a shard; with its tokenizer (else NULL) also that they belong together.
static inline bool verify_shard(const Shard* shard, const Tokenizer* tokenizer, Error* err) {
    return (tokenizer == NULL || same_tokenizer(shard, tokenizer, err)) && verify_payload_hash(shard, err) &&
           verify_index(shard, err) && verify_tokens(shard, tokenizer, err);
}

// ----------------------------------------------------------------------------
// decode

// Tokens of document `number`: by the index, or by looking for end-of-text tokens where there is none.
static inline bool find_document(const Shard* shard, uint64_t number, uint64_t* start, uint64_t* end,
                                 Error* err) {
    uint64_t documents = 0;
    ShardIndex index;
    if ((shard->header.flags & SHARD_HAS_INDEX) != 0) {
        if (!shard_index_open(&index, shard, err)) return false;
        documents = index.num_documents;
        if (number < documents) {
            *start = number != 0 ? index.ends[number - 1] : 0;
            *end = index.ends[number];
        }
        shard_index_close(&index);
    } else if (shard->eot_id < 0) {
        return fail(err, EXIT_BAD_DATA, "%s knows nothing of documents; give --start and --count instead",
                    shard->path);
    } else {
        *end = shard->header.num_tokens;
        for (uint64_t i = 0; i < shard->header.num_tokens && documents <= number + 1; i++) {
            if (shard_token(shard, i) != (uint32_t)shard->eot_id) continue;
            if (documents == number) *start = i;
            if (documents == number + 1) *end = i;
            documents++;
        }
    }
    return number < documents || fail(err, EXIT_USAGE, "%s has no document %llu; it has %llu, counted from 0",
                                      shard->path, (unsigned long long)number, (unsigned long long)documents);
}

// For terminals: control characters other than line ends and tabs become \xNN: no text drives the screen.
static inline void append_visible(String* out, const char* bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F)
            string_append(out, "\\x%02X", c);
        else
            string_append_bytes(out, &bytes[i], 1);
    }
}

// The bytes of tokens [start, end) to standard output; end-of-text tokens in the middle show as their names.
static inline bool print_tokens(const Shard* shard, const Tokenizer* tokenizer, uint64_t start, uint64_t end,
                                Error* err) {
    String text = {NULL, 0, 0};
    bool terminal = isatty(STDOUT_FILENO), ok = true;
    for (uint64_t i = start; ok && i < end; i++) {
        size_t size;
        const char* bytes = token_bytes(tokenizer, shard_token(shard, i), &size);
        if (i == start && tokenizer->eot_id == (int64_t)shard_token(shard, i)) size = 0;
        if (terminal)
            append_visible(&text, bytes, size);
        else
            string_append_bytes(&text, bytes, size);
        if (text.size < 1 << 20 && i + 1 < end) continue;
        ok = write_all(STDOUT_FILENO, text.data, text.size);
        text.size = 0;
    }
    free(text.data);
    return ok || fail(err, EXIT_IO, "cannot write to standard output: %s", strerror(errno));
}

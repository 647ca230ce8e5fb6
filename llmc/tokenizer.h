// Byte-level byte-pair encoding: text to token ids and back.
//
//     "the cat"  --(pretokenize.h)-->  pieces "the", " cat"
//     piece "the":  t h e  --(merge t+h, of rank 12)-->  th e  --(th+e, of rank 35)-->  the, one id
//
// The merge of lowest rank goes first wherever it stands, the leftmost of equals before the others. Every
// byte is a token, so that any sequence of bytes encodes, and decoding is the concatenation of the tokens'
// bytes: it gives back the document, valid UTF-8 or not. The text of a special token inside a document is
// ordinary text (tiktoken's encode_ordinary, Hugging Face's add_special_tokens=False on a text without any):
// only the program puts specials between documents.
//
// Limits: 2^24 ids, 1 MiB a token; a piece of more than 4 MiB is encoded in parts of 4 MiB.
// Reading and writing of files: tokenizer_files.h. Training: dev/data/bpe_train.h.
#pragma once
#include <xxhash.h>           // defines: XXH3_64bits, XXH3_128bits_*
#include "llmc/pretokenize.h" // defines: Pattern, pattern_compile, Splitter, splitter_*
#include "llmc/utils.h"       // defines: Error, fail, CHECK, String, malloc_check, realloc_check

static const uint32_t MAX_VOCAB_SIZE = 1u << 24, MAX_TOKEN_SIZE = 1u << 20;
static const uint32_t NO_TOKEN = UINT32_MAX, NO_RANK = UINT32_MAX;

enum TokenKind {
    TOKEN_HOLE = 0,     // no token has this id
    TOKEN_ORDINARY = 1, // what text encodes to
    TOKEN_SPECIAL = 2,  // put there by the program: end of text, ...
};

typedef struct {
    uint32_t offset, size; // its bytes in Tokenizer.bytes
    uint32_t kind;         // a TokenKind
} Token;

typedef struct {
    uint32_t left, right, id; // left and right, side by side, become id
} Merge;

typedef struct {
    uint64_t pair; // left << 32 | right
    uint32_t rank; // index in Tokenizer.merges; NO_RANK: the slot is free
} PairSlot;

typedef struct {
    uint32_t vocab_size; // ids are 0 .. vocab_size - 1, specials and holes included
    int64_t eot_id;      // the token in front of each document, see document_separators; -1: there is none
    bool ignore_merges;  // a piece that is a token is that token, whatever the merges make of it
    Pattern pattern;
    Token* tokens; // (vocab_size)
    Merge* merges; // (num_merges), by rank: the lower one is applied first
    uint32_t num_merges;
    uint32_t byte_id[256]; // the token of each byte
    // private: storage and open-addressing tables, a power of two in size, at most half full
    String bytes;
    uint32_t tokens_capacity, merges_capacity, num_ordinary;
    uint32_t* id_slots;   // (id_slots_size): bytes -> id of an ordinary token
    PairSlot* pair_slots; // (pair_slots_size)
    uint32_t id_slots_size, pair_slots_size;
} Tokenizer;

// A list of token ids that grows. Start from {0}; free(tokens.data) at the end.
typedef struct {
    uint32_t* data;
    size_t size, capacity;
} Tokens;

static inline void tokens_reserve(Tokens* tokens, size_t more) {
    if (tokens->size + more <= tokens->capacity) return;
    tokens->capacity = (tokens->size + more) * 2;
    tokens->data = (uint32_t*)realloc_check(tokens->data, tokens->capacity * sizeof *tokens->data);
}

static inline void tokens_append(Tokens* tokens, const uint32_t* ids, size_t n) {
    tokens_reserve(tokens, n);
    if (n != 0) memcpy(tokens->data + tokens->size, ids, n * sizeof *ids);
    tokens->size += n;
}

// ----------------------------------------------------------------------------
// looking up

// The bytes of a token; none for a hole or an id out of range.
static inline const char* token_bytes(const Tokenizer* t, uint32_t id, size_t* size) {
    *size = id < t->vocab_size ? t->tokens[id].size : 0;
    return *size != 0 ? t->bytes.data + t->tokens[id].offset : "";
}

// The bytes of text that a token stands for, for bits per byte: none for specials.
static inline uint32_t token_byte_length(const Tokenizer* t, uint32_t id) {
    return id < t->vocab_size && t->tokens[id].kind == TOKEN_ORDINARY ? t->tokens[id].size : 0;
}

static inline bool token_equals(const Tokenizer* t, uint32_t id, const char* bytes, size_t size) {
    return t->tokens[id].size == size && memcmp(t->bytes.data + t->tokens[id].offset, bytes, size) == 0;
}

// The slot of these bytes in id_slots: where they are, or where they would go.
static inline uint32_t* id_slot(const Tokenizer* t, const char* bytes, size_t size) {
    uint32_t i = (uint32_t)XXH3_64bits(bytes, size);
    for (;; i++) {
        uint32_t* slot = &t->id_slots[i & (t->id_slots_size - 1)];
        if (*slot == NO_TOKEN || token_equals(t, *slot, bytes, size)) return slot;
    }
}

// The ordinary token of exactly these bytes, or NO_TOKEN.
static inline uint32_t tokenizer_find(const Tokenizer* t, const char* bytes, size_t size) {
    return *id_slot(t, bytes, size);
}

// The special token of this text, or -1.
static inline int64_t tokenizer_special_id(const Tokenizer* t, const char* text) {
    for (uint32_t id = 0; id < t->vocab_size; id++)
        if (t->tokens[id].kind == TOKEN_SPECIAL && token_equals(t, id, text, strlen(text))) return id;
    return -1;
}

static inline PairSlot* pair_slot(const Tokenizer* t, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    uint32_t i = (uint32_t)((pair * 0x9E3779B97F4A7C15u) >> 32);
    for (;; i++) {
        PairSlot* slot = &t->pair_slots[i & (t->pair_slots_size - 1)];
        if (slot->rank == NO_RANK || slot->pair == pair) return slot;
    }
}

// The rank of the merge of two tokens, or NO_RANK.
static inline uint32_t pair_rank(const Tokenizer* t, uint32_t left, uint32_t right) {
    return pair_slot(t, left, right)->rank;
}

// ----------------------------------------------------------------------------
// building: init, add tokens, add merges, finish

// (Re-)builds the table of ids with room for `size` slots.
static inline void tokenizer_index_ids(Tokenizer* t, uint32_t size) {
    t->id_slots_size = size;
    t->id_slots = (uint32_t*)realloc_check(t->id_slots, t->id_slots_size * sizeof *t->id_slots);
    for (uint32_t i = 0; i < t->id_slots_size; i++) t->id_slots[i] = NO_TOKEN;
    for (uint32_t id = 0; id < t->vocab_size; id++)
        if (t->tokens[id].kind == TOKEN_ORDINARY)
            *id_slot(t, t->bytes.data + t->tokens[id].offset, t->tokens[id].size) = id;
}

static inline void tokenizer_index_pairs(Tokenizer* t, uint32_t size) {
    t->pair_slots_size = size;
    t->pair_slots = (PairSlot*)realloc_check(t->pair_slots, t->pair_slots_size * sizeof *t->pair_slots);
    for (uint32_t i = 0; i < t->pair_slots_size; i++) t->pair_slots[i].rank = NO_RANK;
    for (uint32_t rank = 0; rank < t->num_merges; rank++) {
        const Merge* m = &t->merges[rank];
        PairSlot slot = {(uint64_t)m->left << 32 | m->right, rank};
        *pair_slot(t, m->left, m->right) = slot;
    }
}

static inline void tokenizer_init(Tokenizer* t) {
    memset(t, 0, sizeof *t);
    t->eot_id = -1;
    tokenizer_index_ids(t, 1024);
    tokenizer_index_pairs(t, 1024);
}

static inline void tokenizer_free(Tokenizer* t) {
    pattern_free(&t->pattern);
    free(t->tokens);
    free(t->merges);
    free(t->bytes.data);
    free(t->id_slots);
    free(t->pair_slots);
    memset(t, 0, sizeof *t);
}

// Gives an id its bytes. Fails if the id or the size is out of range, the id is taken, or an ordinary token
// has these bytes already; `name` is the file, for messages.
static inline bool tokenizer_add(Tokenizer* t, uint64_t id, int kind, const char* bytes, size_t size,
                                 const char* name, Error* err) {
    if (id >= MAX_VOCAB_SIZE)
        return fail(err, EXIT_BAD_DATA, "%s: token id %llu is out of range; ids must be below %u", name,
                    (unsigned long long)id, MAX_VOCAB_SIZE);
    if (size == 0 || size > MAX_TOKEN_SIZE)
        return fail(err, EXIT_BAD_DATA, "%s: token %llu has %zu bytes; it must have 1 to %u", name,
                    (unsigned long long)id, size, MAX_TOKEN_SIZE);
    if (id >= t->tokens_capacity) {
        t->tokens_capacity = ((uint32_t)id + 256) * 2;
        t->tokens = (Token*)realloc_check(t->tokens, t->tokens_capacity * sizeof *t->tokens);
    }
    for (; t->vocab_size <= id; t->vocab_size++) memset(&t->tokens[t->vocab_size], 0, sizeof(Token));
    if (t->tokens[id].kind != TOKEN_HOLE)
        return fail(err, EXIT_BAD_DATA, "%s: two tokens have the id %llu", name, (unsigned long long)id);
    uint32_t same = kind == TOKEN_ORDINARY ? tokenizer_find(t, bytes, size) : NO_TOKEN;
    if (same != NO_TOKEN)
        return fail(err, EXIT_BAD_DATA, "%s: the tokens %u and %llu have the same bytes", name, same,
                    (unsigned long long)id);
    CHECK(t->bytes.size + size <= UINT32_MAX); // the readers' limit on the size of a file
    Token token = {(uint32_t)t->bytes.size, (uint32_t)size, (uint32_t)kind};
    t->tokens[id] = token;
    string_append_bytes(&t->bytes, bytes, size);
    if (kind != TOKEN_ORDINARY) return true;
    if (size == 1) t->byte_id[(uint8_t)bytes[0]] = (uint32_t)id;
    if (++t->num_ordinary * 2 > t->id_slots_size)
        tokenizer_index_ids(t, t->id_slots_size * 2);
    else
        *id_slot(t, bytes, size) = (uint32_t)id;
    return true;
}

// Adds the merge of the next rank; false if the two have one already.
static inline bool tokenizer_add_merge(Tokenizer* t, uint32_t left, uint32_t right, uint32_t id) {
    PairSlot* free_slot = pair_slot(t, left, right);
    if (free_slot->rank != NO_RANK) return false;
    PairSlot slot = {(uint64_t)left << 32 | right, t->num_merges};
    *free_slot = slot;
    if (t->num_merges == t->merges_capacity) {
        t->merges_capacity = (t->merges_capacity + 512) * 2;
        t->merges = (Merge*)realloc_check(t->merges, t->merges_capacity * sizeof *t->merges);
    }
    Merge merge = {left, right, id};
    t->merges[t->num_merges++] = merge;
    if (t->num_merges * 2 > t->pair_slots_size) tokenizer_index_pairs(t, t->pair_slots_size * 2);
    return true;
}

// What separates documents, the first of these that is a special token. `<|begin_of_text|>` goes before
// `<|end_of_text|>` because the separator stands in FRONT of a document, where Llama 3 expects the former
// (and llm.c's Llama-3 shards have it).
static const char* const document_separators[] = {"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
                                                  "</s>"};

// The last step: the pattern, and what must hold for every byte to encode.
static inline bool tokenizer_finish(Tokenizer* t, const char* regex, const char* name, Error* err) {
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        if (tokenizer_find(t, &c, 1) == NO_TOKEN)
            return fail(
                err, EXIT_BAD_DATA,
                "%s: the vocabulary has no token for the byte 0x%02X; a byte-level vocabulary has one for "
                "each of the 256",
                name, byte);
    }
    for (size_t i = 0; i < sizeof document_separators / sizeof document_separators[0] && t->eot_id < 0; i++)
        t->eot_id = tokenizer_special_id(t, document_separators[i]);
    return pattern_compile(&t->pattern, regex, name, err);
}

// ----------------------------------------------------------------------------
// merging: the tokens of one piece

// Scratch of the merge, one per thread: parts of the piece, left to right.
typedef struct {
    uint32_t *id, *rank;   // of a part; of the merge of this part with the next one
    uint32_t *prev, *next; // long pieces: the parts that are left form a list
    uint64_t* heap;        // long pieces: rank << 32 | part, the smallest first
    size_t capacity;
    uint32_t last_rank; // of the last merge applied, NO_RANK if there was none
} MergeScratch;

static inline void merge_scratch_free(MergeScratch* s) {
    free(s->id);
    free(s->rank);
    free(s->prev);
    free(s->next);
    free(s->heap);
    memset(s, 0, sizeof *s);
}

static inline void merge_scratch_reserve(MergeScratch* s, size_t parts) {
    if (parts <= s->capacity) return;
    merge_scratch_free(s);
    s->capacity = parts < 1024 ? 1024 : parts;
    s->id = (uint32_t*)malloc_check(s->capacity * sizeof *s->id);
    s->rank = (uint32_t*)malloc_check(s->capacity * sizeof *s->rank);
    s->prev = (uint32_t*)malloc_check(s->capacity * sizeof *s->prev);
    s->next = (uint32_t*)malloc_check(s->capacity * sizeof *s->next);
    s->heap = (uint64_t*)malloc_check(s->capacity * 3 * sizeof *s->heap); // one a pair, two more a merge
}

// For short pieces: find the lowest rank, merge there, close the gap. O(n^2), but without any bookkeeping.
static inline size_t merge_by_scan(const Tokenizer* t, MergeScratch* s, size_t n) {
    for (size_t i = 0; i + 1 < n; i++) s->rank[i] = pair_rank(t, s->id[i], s->id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (s->rank[i] < s->rank[best]) best = i;
        if (s->rank[best] == NO_RANK) break;
        s->last_rank = s->rank[best];
        s->id[best] = t->merges[s->last_rank].id;
        n--;
        memmove(s->id + best + 1, s->id + best + 2, (n - best - 1) * sizeof *s->id);
        memmove(s->rank + best, s->rank + best + 1, (n - best - 1) * sizeof *s->rank);
        if (best > 0) s->rank[best - 1] = pair_rank(t, s->id[best - 1], s->id[best]);
        if (best + 1 < n) s->rank[best] = pair_rank(t, s->id[best], s->id[best + 1]);
    }
    return n;
}

static inline void heap_sift_down(uint64_t* heap, size_t size, size_t i) {
    uint64_t key = heap[i];
    for (size_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (key <= heap[child]) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

static inline void heap_push(uint64_t* heap, size_t* size, uint64_t key) {
    size_t i = (*size)++;
    for (; i > 0 && key < heap[(i - 1) / 2]; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = key;
}

// The rank of a part with its next one, from now on.
static inline void heap_update(const Tokenizer* t, MergeScratch* s, size_t n, size_t* heap_size,
                               uint32_t part) {
    uint32_t next = s->next[part];
    s->rank[part] = next < n ? pair_rank(t, s->id[part], s->id[next]) : NO_RANK;
    if (s->rank[part] != NO_RANK) heap_push(s->heap, heap_size, (uint64_t)s->rank[part] << 32 | part);
}

// For long pieces: O(n log n). A heap entry whose rank is no longer its part's is stale.
static inline size_t merge_by_heap(const Tokenizer* t, MergeScratch* s, size_t n) {
    size_t heap_size = 0;
    for (size_t i = 0; i < n; i++) {
        s->prev[i] = (uint32_t)i - 1; // of the first one: UINT32_MAX
        s->next[i] = (uint32_t)i + 1; // of the last one: n
    }
    for (size_t i = 0; i < n; i++) heap_update(t, s, n, &heap_size, (uint32_t)i);
    while (heap_size > 0) {
        uint32_t rank = (uint32_t)(s->heap[0] >> 32), part = (uint32_t)s->heap[0];
        s->heap[0] = s->heap[--heap_size];
        if (heap_size > 0) heap_sift_down(s->heap, heap_size, 0);
        if (s->rank[part] != rank) continue;
        s->last_rank = rank;
        uint32_t gone = s->next[part], next = s->next[gone];
        s->id[part] = t->merges[rank].id;
        s->rank[gone] = NO_RANK;
        s->next[part] = next;
        if (next < n) s->prev[next] = part;
        if (s->prev[part] != UINT32_MAX) heap_update(t, s, n, &heap_size, s->prev[part]);
        heap_update(t, s, n, &heap_size, part);
    }
    size_t left = 0;
    for (size_t i = 0; i < n; i = s->next[i]) s->id[left++] = s->id[i];
    return left;
}

static const size_t MAX_PIECE = 1 << 22, LONG_PIECE = 96;

// The tokens of a piece of n <= MAX_PIECE bytes, into s->id; returns how many.
static inline size_t merge_piece(const Tokenizer* t, MergeScratch* s, const char* piece, size_t n) {
    merge_scratch_reserve(s, n);
    for (size_t i = 0; i < n; i++) s->id[i] = t->byte_id[(uint8_t)piece[i]];
    s->last_rank = NO_RANK;
    return n <= LONG_PIECE ? merge_by_scan(t, s, n) : merge_by_heap(t, s, n);
}

// ----------------------------------------------------------------------------
// encoding

// Nearly all pieces of a text have been there before: a cache of the short ones answers them with one
// comparison. Direct-mapped, 2 MiB: a piece has one slot, and the last one there stays.
enum { PIECE_CACHE_BITS = 16, CACHED_PIECE = 15, CACHED_TOKENS = 3 };

typedef struct {
    uint64_t low, high; // the piece, zero behind its end; its length in the last byte (0: the slot is free)
} PieceKey;

typedef struct {
    PieceKey key;
    uint32_t count, ids[CACHED_TOKENS];
} PieceSlot;

// One per thread; the tokenizer is shared, only read, and stays where it is.
typedef struct {
    const Tokenizer* tokenizer;
    Splitter splitter;
    MergeScratch scratch;
    PieceSlot* cache; // (1 << PIECE_CACHE_BITS)
} Encoder;

static inline void encoder_init(Encoder* e, const Tokenizer* t) {
    memset(e, 0, sizeof *e);
    e->tokenizer = t;
    splitter_init(&e->splitter, &t->pattern);
    size_t bytes = sizeof(PieceSlot) << PIECE_CACHE_BITS;
    e->cache = (PieceSlot*)aligned_alloc(64, bytes);
    CHECK(e->cache != NULL);
    memset(e->cache, 0, bytes);
}

static inline void encoder_free(Encoder* e) {
    splitter_free(&e->splitter);
    merge_scratch_free(&e->scratch);
    free(e->cache);
    memset(e, 0, sizeof *e);
}

// The key of n <= CACHED_PIECE bytes, `readable` of which and what follows may be loaded.
static inline PieceKey piece_key(const char* piece, size_t n, size_t readable) {
    PieceKey key = {0, 0};
    memcpy(&key, piece, readable >= sizeof key ? sizeof key : n);
    key.low &= n < 8 ? (1ull << 8 * n) - 1 : ~0ull;
    key.high &= n > 8 ? (1ull << 8 * (n - 8)) - 1 : 0;
    key.high |= (uint64_t)n << 56;
    return key;
}

static inline PieceSlot* piece_slot(const Encoder* e, PieceKey key) {
    uint64_t hash = (key.low ^ (key.high * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
    return &e->cache[hash >> (64 - PIECE_CACHE_BITS)];
}

// Appends the tokens of a piece, without the cache.
static inline void encode_piece(Encoder* e, const char* piece, size_t n, Tokens* out) {
    const Tokenizer* t = e->tokenizer;
    uint32_t whole = t->ignore_merges ? tokenizer_find(t, piece, n) : NO_TOKEN;
    if (whole != NO_TOKEN) {
        tokens_append(out, &whole, 1);
        return;
    }
    while (n > 0) {
        size_t part = n < MAX_PIECE ? n : MAX_PIECE;
        size_t count = merge_piece(t, &e->scratch, piece, part);
        tokens_append(out, e->scratch.id, count);
        piece += part, n -= part;
    }
}

// Appends the ids of one document, which may be any bytes, to out; returns how many.
static inline size_t encode(Encoder* e, const char* text, size_t size, Tokens* out) {
    size_t before = out->size, n;
    const char *piece, *end = text + size;
    splitter_start(&e->splitter, text, size);
    while ((n = splitter_next(&e->splitter, &piece)) != 0) {
        if (n > CACHED_PIECE) {
            encode_piece(e, piece, n, out);
            continue;
        }
        tokens_reserve(out, CACHED_TOKENS);
        PieceKey key = piece_key(piece, n, (size_t)(end - piece));
        PieceSlot* slot = piece_slot(e, key);
        if (slot->key.low == key.low && slot->key.high == key.high) {
            memcpy(out->data + out->size, slot->ids, sizeof slot->ids);
            out->size += slot->count;
            continue;
        }
        size_t first = out->size;
        encode_piece(e, piece, n, out);
        if (out->size - first > CACHED_TOKENS) continue;
        slot->key = key;
        slot->count = (uint32_t)(out->size - first);
        memcpy(slot->ids, out->data + first, slot->count * sizeof *slot->ids);
    }
    return out->size - before;
}

// ----------------------------------------------------------------------------
// identity

// 128 bits of what a tokenizer does, the same from whichever file it came: words 10-11 and 12-13 of a shard.
typedef struct {
    uint64_t low, high;
} TokenizerHash;

// XXH3-128 over the pattern, the tokens in order of id (id, kind, size, bytes), the merges in order of rank
// (left, right; those that no text can ever reach left out: some files list them), and whether ignore_merges
// changes anything, which is where the merges do not build every token. Encodes the whole vocabulary: 11 ms
// for GPT-2's.
static inline TokenizerHash tokenizer_hash(const Tokenizer* t) {
    XXH3_state_t* state = XXH3_createState();
    CHECK(state != NULL);
    XXH3_128bits_reset(state);
    XXH3_128bits_update(state, t->pattern.regex, strlen(t->pattern.regex) + 1);
    uint32_t not_built = 0; // ordinary tokens of several bytes that no merge makes
    for (uint32_t id = 0; id < t->vocab_size; id++) {
        const Token* token = &t->tokens[id];
        if (token->kind == TOKEN_HOLE) continue;
        uint32_t record[3] = {id, token->kind, token->size};
        XXH3_128bits_update(state, record, sizeof record);
        XXH3_128bits_update(state, t->bytes.data + token->offset, token->size);
        not_built += token->kind == TOKEN_ORDINARY && token->size > 1;
    }
    MergeScratch scratch;
    memset(&scratch, 0, sizeof scratch);
    for (uint32_t rank = 0; rank < t->num_merges; rank++) {
        const Merge* m = &t->merges[rank];
        const Token* token = &t->tokens[m->id];
        size_t parts = merge_piece(t, &scratch, t->bytes.data + token->offset, token->size);
        if (parts != 1 || scratch.last_rank != rank) continue;
        uint32_t record[2] = {m->left, m->right};
        XXH3_128bits_update(state, record, sizeof record);
        not_built--;
    }
    merge_scratch_free(&scratch);
    uint8_t whole_pieces = t->ignore_merges && not_built > 0;
    XXH3_128bits_update(state, &whole_pieces, 1);
    XXH128_hash_t digest = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    TokenizerHash hash = {digest.low64, digest.high64};
    return hash;
}

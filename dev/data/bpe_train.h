// Trains a byte-level BPE vocabulary: count the pieces of a text, then merge the most frequent pair of
// adjacent tokens until the vocabulary is full.
//
// Each thread counts into a PieceCounter of its own; piece_counter_merge adds them up. The result depends on
// the counts alone (ties between pairs go to the lower left id, then the lower right id), so that it is the
// same for any number of threads and any order of documents.
//
// Ids: the 256 bytes in their order, the merges in theirs, the special tokens last.
// Limit: a piece longer than 256 bytes (base64, padding, text without spaces) is counted in parts of 256: no
// token worth having spans them, and one piece of a megabyte would be walked again for each of its merges.
//
// Sources: Sennrich et al. 2016, algorithm 1; lazily updated heap as in Hugging Face tokenizers and rustbpe.
#pragma once
#include <xxhash.h>           // defines: XXH3_64bits
#include "llmc/pretokenize.h" // defines: Pattern, pattern_*, named_patterns, Splitter, splitter_*
#include "llmc/tokenizer.h"   // defines: Tokenizer, tokenizer_*, TOKEN_*
#include "llmc/utils.h"       // defines: Error, fail, CHECK, String, malloc_check, realloc_check

// ----------------------------------------------------------------------------
// counting

typedef struct {
    uint64_t count;
    uint64_t offset; // of its bytes in PieceCounter.bytes
    uint32_t size, hash;
} Piece;

typedef struct {
    Pattern pattern;
    Splitter splitter;
    Piece* pieces; // (num_pieces), each once, in order of first appearance
    uint32_t num_pieces, pieces_capacity;
    String bytes;
    uint32_t*
        slots; // (slots_size): index + 1 of a piece, 0 for a free slot; a power of two, at most half full
    uint32_t slots_size;
} PieceCounter;

static const uint32_t MAX_COUNTED_PIECE = 256;

static inline void piece_counter_free(PieceCounter* c) {
    splitter_free(&c->splitter);
    pattern_free(&c->pattern);
    free(c->pieces);
    free(c->bytes.data);
    free(c->slots);
    memset(c, 0, sizeof *c);
}

// pattern: a name of named_patterns. The counter must stay where it is: its splitter points into it.
static inline bool piece_counter_init(PieceCounter* c, const char* pattern, Error* err) {
    memset(c, 0, sizeof *c);
    const NamedPattern* named = pattern_by_name(pattern);
    if (named == NULL) {
        String names = {NULL, 0, 0};
        for (int i = 0; i < NUM_NAMED_PATTERNS; i++) string_append(&names, " %s", named_patterns[i].name);
        fail(err, EXIT_USAGE, "split pattern '%s' is not known; the known ones are:%s", pattern, names.data);
        free(names.data);
        return false;
    }
    if (!pattern_compile(&c->pattern, named->regex, named->name, err)) return false;
    splitter_init(&c->splitter, &c->pattern);
    c->slots_size = 1 << 16;
    c->slots = (uint32_t*)calloc_check(c->slots_size, sizeof *c->slots);
    return true;
}

static inline void piece_counter_grow_slots(PieceCounter* c) {
    free(c->slots);
    c->slots_size *= 2;
    c->slots = (uint32_t*)calloc_check(c->slots_size, sizeof *c->slots);
    for (uint32_t i = 0; i < c->num_pieces; i++) {
        uint32_t slot = c->pieces[i].hash & (c->slots_size - 1);
        while (c->slots[slot] != 0) slot = (slot + 1) & (c->slots_size - 1);
        c->slots[slot] = i + 1;
    }
}

static inline void piece_counter_add(PieceCounter* c, const char* bytes, uint32_t size, uint64_t count) {
    uint32_t hash = (uint32_t)XXH3_64bits(bytes, size), slot = hash;
    for (;; slot++) {
        slot &= c->slots_size - 1;
        if (c->slots[slot] == 0) break;
        Piece* p = &c->pieces[c->slots[slot] - 1];
        if (p->hash != hash || p->size != size || memcmp(c->bytes.data + p->offset, bytes, size) != 0)
            continue;
        p->count += count;
        return;
    }
    if (c->num_pieces == c->pieces_capacity) {
        CHECK(c->num_pieces < 1u << 30);
        c->pieces_capacity = (c->pieces_capacity + 4096) * 2;
        c->pieces = (Piece*)realloc_check(c->pieces, c->pieces_capacity * sizeof *c->pieces);
    }
    Piece piece = {count, c->bytes.size, size, hash};
    string_append_bytes(&c->bytes, bytes, size);
    c->pieces[c->num_pieces++] = piece;
    c->slots[slot] = c->num_pieces;
    if (c->num_pieces * 2 > c->slots_size) piece_counter_grow_slots(c);
}

static inline void piece_counter_add_document(PieceCounter* c, const char* text, size_t size) {
    const char* piece;
    size_t n;
    splitter_start(&c->splitter, text, size);
    while ((n = splitter_next(&c->splitter, &piece)) != 0)
        while (n > 0) {
            uint32_t part = n < MAX_COUNTED_PIECE ? (uint32_t)n : MAX_COUNTED_PIECE;
            piece_counter_add(c, piece, part, 1);
            piece += part, n -= part;
        }
}

static inline void piece_counter_merge(PieceCounter* into, const PieceCounter* from) {
    for (uint32_t i = 0; i < from->num_pieces; i++) {
        const Piece* p = &from->pieces[i];
        piece_counter_add(into, from->bytes.data + p->offset, p->size, p->count);
    }
}

// ----------------------------------------------------------------------------
// training

// A distinct piece, as the tokens it consists of so far.
typedef struct {
    uint64_t count;
    uint64_t offset; // of its tokens in BpeTrainer.tokens
    uint32_t size;
} Word;

// Two adjacent tokens: how often, and the words that have or had them. A pair only gains words while the
// later of its two tokens is being made, word after word, so that the list is in order and has no word
// twice.
typedef struct {
    uint64_t key; // left << 32 | right
    uint64_t count;
    uint32_t* words; // (num_words)
    uint32_t num_words, capacity;
} PairCount;

typedef struct {
    uint64_t count, key;
} Candidate;

typedef struct {
    Word* words;
    uint32_t* tokens;
    PairCount*
        pairs; // (pairs_size): open addressing by key, a power of two, at most half full; capacity 0: free
    uint32_t num_pairs, pairs_size;
    Candidate* heap; // the best first; counts may be out of date, which can only be too high
    size_t heap_size, heap_capacity;
    uint64_t* created; // keys of the pairs that the merge at hand created
    size_t num_created, created_capacity;
} BpeTrainer;

static inline PairCount* find_pair(BpeTrainer* b, uint64_t key) {
    uint32_t i = (uint32_t)((key * 0x9E3779B97F4A7C15u) >> 32);
    for (;; i++) {
        PairCount* p = &b->pairs[i & (b->pairs_size - 1)];
        if (p->capacity == 0 || p->key == key) return p;
    }
}

static inline void grow_pairs(BpeTrainer* b) {
    PairCount* old = b->pairs;
    uint32_t old_size = b->pairs_size;
    b->pairs_size *= 2;
    b->pairs = (PairCount*)calloc_check(b->pairs_size, sizeof *b->pairs);
    for (uint32_t i = 0; i < old_size; i++)
        if (old[i].capacity != 0) *find_pair(b, old[i].key) = old[i];
    free(old);
}

// One more of a pair, in this word.
static inline void pair_gained(BpeTrainer* b, uint32_t left, uint32_t right, uint32_t word) {
    uint64_t key = (uint64_t)left << 32 | right;
    PairCount* p = find_pair(b, key);
    if (p->capacity == 0) {
        if (++b->num_pairs * 2 > b->pairs_size) {
            grow_pairs(b);
            p = find_pair(b, key);
        }
        p->key = key;
        p->capacity = 4;
        p->words = (uint32_t*)malloc_check(p->capacity * sizeof *p->words);
        if (b->num_created == b->created_capacity) {
            b->created_capacity = (b->created_capacity + 512) * 2;
            b->created = (uint64_t*)realloc_check(b->created, b->created_capacity * sizeof *b->created);
        }
        b->created[b->num_created++] = key;
    }
    p->count += b->words[word].count;
    if (p->num_words > 0 && p->words[p->num_words - 1] == word) return;
    if (p->num_words == p->capacity) {
        p->capacity *= 2;
        p->words = (uint32_t*)realloc_check(p->words, p->capacity * sizeof *p->words);
    }
    p->words[p->num_words++] = word;
}

static inline void pair_lost(BpeTrainer* b, uint32_t left, uint32_t right, uint32_t word) {
    find_pair(b, (uint64_t)left << 32 | right)->count -= b->words[word].count;
}

// More frequent, or as frequent and lower in (left, right).
static inline bool is_better(Candidate a, Candidate b) {
    return a.count != b.count ? a.count > b.count : a.key < b.key;
}

static inline void push_candidate(BpeTrainer* b, Candidate c) {
    if (b->heap_size == b->heap_capacity) {
        b->heap_capacity = (b->heap_capacity + 4096) * 2;
        b->heap = (Candidate*)realloc_check(b->heap, b->heap_capacity * sizeof *b->heap);
    }
    size_t i = b->heap_size++;
    for (; i > 0 && is_better(c, b->heap[(i - 1) / 2]); i = (i - 1) / 2) b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = c;
}

static inline Candidate pop_candidate(BpeTrainer* b) {
    Candidate best = b->heap[0], last = b->heap[--b->heap_size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < b->heap_size; i = child) {
        if (child + 1 < b->heap_size && is_better(b->heap[child + 1], b->heap[child])) child++;
        if (!is_better(b->heap[child], last)) break;
        b->heap[i] = b->heap[child];
    }
    b->heap[i] = last;
    return best;
}

static inline void push_created(BpeTrainer* b) {
    for (size_t i = 0; i < b->num_created; i++) {
        Candidate c = {find_pair(b, b->created[i])->count, b->created[i]};
        push_candidate(b, c);
    }
    b->num_created = 0;
}

// Words, their pairs and the heap, from the counts.
static inline void bpe_trainer_init(BpeTrainer* b, const Tokenizer* t, const PieceCounter* counts) {
    memset(b, 0, sizeof *b);
    b->pairs_size = 1 << 16;
    b->pairs = (PairCount*)calloc_check(b->pairs_size, sizeof *b->pairs);
    b->words = (Word*)malloc_check(counts->num_pieces * sizeof *b->words);
    b->tokens = (uint32_t*)malloc_check(counts->bytes.size * sizeof *b->tokens);
    for (size_t i = 0; i < counts->bytes.size; i++) b->tokens[i] = t->byte_id[(uint8_t)counts->bytes.data[i]];
    for (uint32_t w = 0; w < counts->num_pieces; w++) {
        const Piece* p = &counts->pieces[w];
        Word word = {p->count, p->offset, p->size};
        b->words[w] = word;
        const uint32_t* tokens = b->tokens + word.offset;
        for (uint32_t i = 0; i + 1 < word.size; i++) pair_gained(b, tokens[i], tokens[i + 1], w);
    }
    push_created(b);
}

static inline void bpe_trainer_free(BpeTrainer* b) {
    for (uint32_t i = 0; i < b->pairs_size; i++) free(b->pairs[i].words);
    free(b->pairs);
    free(b->words);
    free(b->tokens);
    free(b->heap);
    free(b->created);
    memset(b, 0, sizeof *b);
}

// The most frequent pair; false if none is left that occurs at least twice.
static inline bool best_pair(BpeTrainer* b, uint64_t* key) {
    while (b->heap_size > 0) {
        Candidate best = pop_candidate(b);
        uint64_t count = find_pair(b, best.key)->count;
        *key = best.key;
        if (best.count == count && count >= 2) return true;
        best.count = count; // it has lost some since it was pushed: back to its place
        if (count >= 2) push_candidate(b, best);
    }
    return false;
}

// Replaces left, right by id wherever they stand side by side in a word, from left to right, and keeps the
// counts of the pairs around them.
static inline void merge_in_word(BpeTrainer* b, uint32_t w, uint32_t left, uint32_t right, uint32_t id) {
    Word* word = &b->words[w];
    uint32_t* tokens = b->tokens + word->offset;
    uint32_t out = 0;
    for (uint32_t in = 0; in < word->size; in++) {
        if (tokens[in] != left || in + 1 == word->size || tokens[in + 1] != right) {
            tokens[out++] = tokens[in];
            continue;
        }
        pair_lost(b, left, right, w);
        if (out > 0) {
            pair_lost(b, tokens[out - 1], left, w);
            pair_gained(b, tokens[out - 1], id, w);
        }
        if (in + 2 < word->size) {
            pair_lost(b, right, tokens[in + 2], w);
            pair_gained(b, id, tokens[in + 2], w);
        }
        tokens[out++] = id;
        in++;
    }
    word->size = out;
}

static inline void merge_pair(BpeTrainer* b, uint64_t key, uint32_t id) {
    PairCount* pair = find_pair(b, key);
    uint32_t *words = pair->words, num_words = pair->num_words;
    pair->words = NULL; // the table may move under us; nothing is ever gained by this pair again
    pair->num_words = 0;
    for (uint32_t i = 0; i < num_words; i++)
        merge_in_word(b, words[i], (uint32_t)(key >> 32), (uint32_t)key, id);
    free(words);
    push_created(b);
}

static inline bool bpe_learn(Tokenizer* t, BpeTrainer* b, uint32_t num_ordinary, Error* err) {
    String bytes = {NULL, 0, 0};
    bool ok = true;
    while (ok && t->vocab_size < num_ordinary) {
        uint64_t key;
        uint32_t id = t->vocab_size;
        if (!best_pair(b, &key)) {
            ok = fail(
                err, EXIT_USAGE,
                "the text is too small for this vocabulary: after %u tokens no pair occurs twice; ask for at "
                "most %u plus the special tokens",
                id, id);
            break;
        }
        uint32_t pair[2] = {(uint32_t)(key >> 32), (uint32_t)key};
        bytes.size = 0;
        for (int side = 0; side < 2; side++) {
            size_t n;
            const char* part = token_bytes(t, pair[side], &n);
            string_append_bytes(&bytes, part, n);
        }
        ok = tokenizer_add(t, id, TOKEN_ORDINARY, bytes.data, bytes.size, "the trained vocabulary", err);
        CHECK(ok && tokenizer_add_merge(t, pair[0], pair[1], id));
        merge_pair(b, key, id);
    }
    free(bytes.data);
    return ok;
}

// Trains a vocabulary of vocab_size tokens, the special ones (given as text) included, on what was counted,
// with the counter's split pattern. Fills t (free with tokenizer_free); fails if the size is out of range,
// the text has too few different pairs or a special token is given twice.
static inline bool bpe_train(Tokenizer* t, const PieceCounter* counts, uint32_t vocab_size,
                             const char* const* specials, int num_specials, Error* err) {
    memset(t, 0, sizeof *t);
    uint32_t smallest = 256 + (uint32_t)num_specials;
    if (vocab_size < smallest || vocab_size > MAX_VOCAB_SIZE)
        return fail(err, EXIT_USAGE,
                    "vocabulary size %u is out of range; 256 bytes and %d special tokens need %u, at "
                    "most %u are supported",
                    vocab_size, num_specials, smallest, MAX_VOCAB_SIZE);
    tokenizer_init(t);
    bool ok = true;
    for (uint32_t byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        CHECK(tokenizer_add(t, byte, TOKEN_ORDINARY, &c, 1, "the bytes", err));
    }
    BpeTrainer trainer;
    bpe_trainer_init(&trainer, t, counts);
    ok = bpe_learn(t, &trainer, vocab_size - (uint32_t)num_specials, err);
    bpe_trainer_free(&trainer);
    for (int i = 0; ok && i < num_specials; i++) {
        if (tokenizer_special_id(t, specials[i]) >= 0)
            ok = fail(err, EXIT_USAGE, "special token '%s' is given twice", specials[i]);
        ok = ok && tokenizer_add(t, t->vocab_size, TOKEN_SPECIAL, specials[i], strlen(specials[i]),
                                 "the special tokens", err);
    }
    ok = ok && tokenizer_finish(t, counts->pattern.regex, "the trained tokenizer", err);
    if (!ok) tokenizer_free(t);
    return ok;
}

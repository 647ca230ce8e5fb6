// Tokenizer files by path: tokenizer.json (tokenizer_json.h), tiktoken rank files (Llama 3's tokenizer.model
// is one) and GPT-2's vocab.bpe + encoder.json (Hugging Face's merges.txt + vocab.json).
//
// Sources: tiktoken 0.14 (load.py, openai_public.py), the GPT-2 release (encoder.py), llama3/tokenizer.py.
#pragma once
#include "llmc/tokenizer.h"      // defines: Tokenizer, tokenizer_*, merge_piece
#include "llmc/tokenizer_json.h" // defines: ByteAlphabet, json_parse, add_vocab, add_merge_line
#include "llmc/utils.h"          // defines: Error, fail, String, read_file, path_join

static const size_t MAX_TOKENIZER_FILE = 256u << 20;

// ----------------------------------------------------------------------------
// GPT-2: vocab.bpe, a line "#version: 0.2" and one "left right" for each merge; encoder.json, {"token": id,
// ...}

// A token of several bytes that has no part in any merge is special: `<|endoftext|>`.
static inline void mark_specials(Tokenizer* t) {
    bool* merged = (bool*)calloc_check(t->vocab_size, sizeof *merged);
    for (uint32_t rank = 0; rank < t->num_merges; rank++) {
        const Merge* m = &t->merges[rank];
        merged[m->left] = merged[m->right] = merged[m->id] = true;
    }
    for (uint32_t id = 0; id < t->vocab_size; id++)
        if (t->tokens[id].size > 1 && !merged[id]) t->tokens[id].kind = TOKEN_SPECIAL;
    free(merged);
    tokenizer_index_ids(t, t->id_slots_size);
}

static inline bool gpt2_add_merges(Tokenizer* t, const ByteAlphabet* a, const char* lines, size_t size,
                                   const char* name, Error* err) {
    String both = {NULL, 0, 0};
    bool ok = true;
    const char *line = lines, *end = lines + size;
    while (ok && line < end) {
        const char* newline = (const char*)memchr(line, '\n', (size_t)(end - line));
        size_t n = (size_t)((newline != NULL ? newline : end) - line);
        bool version = line == lines && n >= 8 && memcmp(line, "#version", 8) == 0;
        if (!version && n > 0) ok = add_merge_line(t, a, line, n, &both, name, err);
        line += newline != NULL ? n + 1 : n;
    }
    free(both.data);
    return ok;
}

// GPT-2's two files; `name` is that of the merges.
static inline bool tokenizer_parse_gpt2(Tokenizer* t, const char* merges, size_t merges_size,
                                        const char* vocab, size_t vocab_size, const char* name, Error* err) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    tokenizer_init(t);
    cJSON* root = json_parse(vocab, vocab_size, "the vocabulary beside vocab.bpe", err);
    bool ok = root != NULL && add_vocab(t, &alphabet, root, name, err) &&
              gpt2_add_merges(t, &alphabet, merges, merges_size, name, err);
    cJSON_Delete(root);
    if (ok) mark_specials(t);
    ok = ok && tokenizer_finish(t, pattern_by_name("gpt2")->regex, name, err);
    if (!ok) tokenizer_free(t);
    return ok;
}

// ----------------------------------------------------------------------------
// tiktoken: a line "BASE64 RANK" for each token; the rank is its id and that of the merge that makes it

// A rank file names neither pattern nor specials: they are known by its number of ranks.
typedef struct {
    uint32_t ranks;
    const char* pattern;
} RankFile;

typedef struct {
    uint32_t ranks, id; // of the rank file; of the token
    const char* text;
} RankFileSpecial;

static const RankFile rank_files[] = {
    {50256, "gpt2"}, {100256, "cl100k"}, {128000, "llama3"}, {151643, "qwen2"}};

static const RankFileSpecial rank_file_specials[] = {
    {50256, 50256, "<|endoftext|>"},
    {100256, 100257, "<|endoftext|>"},
    {100256, 100258, "<|fim_prefix|>"},
    {100256, 100259, "<|fim_middle|>"},
    {100256, 100260, "<|fim_suffix|>"},
    {100256, 100276, "<|endofprompt|>"},
    {128000, 128000, "<|begin_of_text|>"},
    {128000, 128001, "<|end_of_text|>"},
    {128000, 128006, "<|start_header_id|>"},
    {128000, 128007, "<|end_header_id|>"},
    {128000, 128009, "<|eot_id|>"},
    {128000, 128255, "<|reserved_special_token_250|>"}, // the last of the reserved ones: 128,256 ids in all
    {151643, 151643, "<|endoftext|>"},
    {151643, 151644, "<|im_start|>"},
    {151643, 151645, "<|im_end|>"},
};

// Appends what n characters of padded base64 stand for; false if they are not that.
static inline bool base64_to_bytes(const char* text, size_t n, String* out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (n % 4 != 0) return false;
    size_t padding = n > 0 && text[n - 1] == '=' ? (text[n - 2] == '=' ? 2 : 1) : 0;
    uint32_t bits = 0;
    for (size_t i = 0; i < n; i++) {
        const char* digit = i < n - padding ? (const char*)memchr(digits, text[i], 64) : digits;
        if (digit == NULL) return false;
        bits = bits << 6 | (uint32_t)(digit - digits);
        if (i % 4 != 3) continue;
        char bytes[3] = {(char)(bits >> 16), (char)(bits >> 8), (char)bits};
        string_append_bytes(out, bytes, i + 1 == n ? 3 - padding : 3);
    }
    return true;
}

static inline bool tiktoken_add_tokens(Tokenizer* t, const char* lines, size_t size, const char* name,
                                       Error* err) {
    String bytes = {NULL, 0, 0};
    bool ok = true;
    const char *p = lines, *end = lines + size;
    for (int line = 1; ok && p < end; line++) {
        const char* newline = (const char*)memchr(p, '\n', (size_t)(end - p));
        const char* stop = newline != NULL ? newline : end;
        const char* space = (const char*)memchr(p, ' ', (size_t)(stop - p));
        const char* digit = space != NULL ? space + 1 : stop;
        uint64_t rank = 0;
        bytes.size = 0;
        ok = digit < stop && stop - digit <= 8 && base64_to_bytes(p, (size_t)(space - p), &bytes);
        for (; ok && digit < stop; digit++) {
            ok = is_digit((uint8_t)*digit);
            rank = rank * 10 + (uint64_t)(*digit - '0');
        }
        if (ok)
            ok = tokenizer_add(t, rank, TOKEN_ORDINARY, bytes.data, bytes.size, name, err);
        else if (stop > p)
            fail(err, EXIT_BAD_DATA,
                 "%s, line %d is no line of a tiktoken rank file (base64, a space, a number); the file does "
                 "not begin like a tokenizer.json or a vocab.bpe (#version) either",
                 name, line);
        else
            ok = true; // an empty line
        p = newline != NULL ? stop + 1 : stop;
    }
    free(bytes.data);
    return ok;
}

// The merge that makes a token is what its bytes come to under all merges of lower rank: two parts. Where
// these are more, no merge makes it and it can only be a whole piece (ignore_merges).
static inline void tiktoken_add_merges(Tokenizer* t) {
    MergeScratch scratch;
    memset(&scratch, 0, sizeof scratch);
    for (uint32_t id = 0; id < t->vocab_size; id++) {
        if (t->tokens[id].kind != TOKEN_ORDINARY || t->tokens[id].size == 1) continue;
        size_t parts = merge_piece(t, &scratch, t->bytes.data + t->tokens[id].offset, t->tokens[id].size);
        if (parts == 2) tokenizer_add_merge(t, scratch.id[0], scratch.id[1], id);
    }
    merge_scratch_free(&scratch);
}

// A rank file. pattern: a name of named_patterns, and the file has no specials; or NULL, and both are those
// of the known file with this number of ranks.
static inline bool tokenizer_parse_tiktoken(Tokenizer* t, const char* bytes, size_t size, const char* pattern,
                                            const char* name, Error* err) {
    tokenizer_init(t);
    t->ignore_merges = true;
    bool ok = tiktoken_add_tokens(t, bytes, size, name, err);
    uint32_t ranks = t->vocab_size, known = pattern == NULL ? ranks : 0;
    for (size_t i = 0; i < sizeof rank_files / sizeof rank_files[0]; i++)
        if (rank_files[i].ranks == known) pattern = rank_files[i].pattern;
    const NamedPattern* named = pattern != NULL ? pattern_by_name(pattern) : NULL;
    if (ok && named == NULL)
        ok = fail(err, EXIT_BAD_DATA,
                  "%s has %u ranks, as no known rank file has (50256 GPT-2, 100256 cl100k, 128000 Llama 3, "
                  "151643 Qwen), so its split pattern is not known; convert it to a tokenizer.json",
                  name, ranks);
    for (size_t i = 0; i < sizeof rank_file_specials / sizeof rank_file_specials[0]; i++) {
        const RankFileSpecial* s = &rank_file_specials[i];
        if (ok && s->ranks == known)
            ok = tokenizer_add(t, s->id, TOKEN_SPECIAL, s->text, strlen(s->text), name, err);
    }
    ok = ok && tokenizer_finish(t, named->regex, name, err);
    if (ok)
        tiktoken_add_merges(t);
    else
        tokenizer_free(t);
    return ok;
}

// ----------------------------------------------------------------------------
// loading

// GPT-2's merges have their vocabulary beside them, under either of its names.
static inline bool load_gpt2(Tokenizer* t, const char* path, const char* merges, size_t size, Error* err) {
    char dir[PATH_MAX], vocab_path[PATH_MAX];
    const char* slash = strrchr(path, '/');
    int dir_length = slash != NULL ? (int)(slash - path) : 1;
    if (snprintf(dir, sizeof dir, "%.*s", dir_length, slash != NULL ? path : ".") >= (int)sizeof dir ||
        !path_join(vocab_path, dir, "encoder.json", err))
        return fail(err, EXIT_USAGE, "path %s is too long", path);
    if (access(vocab_path, F_OK) != 0 && !path_join(vocab_path, dir, "vocab.json", err)) return false;
    size_t vocab_size;
    char* vocab = read_file(vocab_path, MAX_TOKENIZER_FILE, &vocab_size, err);
    bool ok = vocab != NULL && tokenizer_parse_gpt2(t, merges, size, vocab, vocab_size, path, err);
    free(vocab);
    return ok;
}

// Loads a tokenizer file (of which format, its first bytes say) or the one in a directory. Fills t, to be
// freed with tokenizer_free, or fails with a sentence that names the file.
static inline bool tokenizer_load(Tokenizer* t, const char* path, Error* err) {
    static const char* const names[] = {"tokenizer.json", "vocab.bpe", "merges.txt", "tokenizer.model"};
    char inside[PATH_MAX];
    struct stat st;
    memset(t, 0, sizeof *t);
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            if (!path_join(inside, path, names[i], err)) return false;
            if (access(inside, F_OK) == 0) return tokenizer_load(t, inside, err);
        }
        return fail(err, EXIT_NO_INPUT,
                    "%s holds no tokenizer: none of tokenizer.json, vocab.bpe, merges.txt, "
                    "tokenizer.model",
                    path);
    }
    size_t size;
    char* bytes = read_file(path, MAX_TOKENIZER_FILE, &size, err);
    if (bytes == NULL) return false;
    size_t first = 0;
    while (first < size && is_space((uint8_t)bytes[first])) first++;
    bool ok;
    if (bytes[first] == '{')
        ok = tokenizer_parse_json(t, bytes, size, path, err);
    else if (strncmp(bytes, "#version", 8) == 0)
        ok = load_gpt2(t, path, bytes, size, err);
    else
        ok = tokenizer_parse_tiktoken(t, bytes, size, NULL, path, err);
    free(bytes);
    return ok;
}

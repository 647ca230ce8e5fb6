// Hugging Face's tokenizer.json, read and written.
//
// What a file asks for and this program does not do (a normalizer, byte fallback, another model than BPE,
// ...) is an error, never ignored: it would change the ids. Ignored is what only concerns the text of
// special tokens and calls with several texts: post_processor, decoder, truncation, padding, the flags of
// added_tokens.
//
// Source: tokenizers 0.23 (models/bpe, pre_tokenizers/byte_level, added_vocabulary).
#pragma once
#include <cjson/cJSON.h>    // defines: cJSON, cJSON_*
#include "llmc/tokenizer.h" // defines: Tokenizer, tokenizer_*, token_*
#include "llmc/utf8.h"      // defines: utf8_sequence, utf8_skip
#include "llmc/utils.h"     // defines: Error, fail, String, string_append, write_all

// ----------------------------------------------------------------------------
// the byte alphabet: JSON holds text, tokens are bytes, so GPT-2 gave each byte a printable character. Bytes
// that are printable in Latin-1 stand for themselves, the others in order for U+0100, U+0101, ... (a space
// is 'G' with a dot above, U+0120).

typedef struct {
    uint16_t character[256]; // byte -> code point
    int16_t byte[256 + 68];  // code point -> byte, -1 for those outside the alphabet
} ByteAlphabet;

static inline void byte_alphabet_init(ByteAlphabet* a) {
    memset(a->byte, -1, sizeof a->byte);
    int others = 0;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        int c = printable ? b : 256 + others++;
        a->character[b] = (uint16_t)c;
        a->byte[c] = (int16_t)b;
    }
}

// Appends the bytes that n bytes of UTF-8 in the alphabet stand for; false at a character outside of it.
static inline bool alphabet_to_bytes(const ByteAlphabet* a, const char* spelled, size_t n, String* out) {
    const uint8_t *p = (const uint8_t*)spelled, *end = p + n;
    while (p < end) {
        size_t length = utf8_sequence(p, end);
        int c = length == 1 ? p[0] : length == 2 ? (p[0] & 0x1F) << 6 | (p[1] & 0x3F) : 0;
        if (c >= (int)(sizeof a->byte / sizeof a->byte[0]) || a->byte[c] < 0) return false;
        char byte = (char)a->byte[c];
        string_append_bytes(out, &byte, 1);
        p += length;
    }
    return true;
}

// ----------------------------------------------------------------------------
// vocabulary and merges, as JSON and as lines spell them

// A token id in JSON: a whole number below MAX_VOCAB_SIZE.
static inline bool json_id(const cJSON* item, uint32_t* id) {
    if (!cJSON_IsNumber(item)) return false;
    double value = item->valuedouble;
    if (!(value >= 0 && value < MAX_VOCAB_SIZE) || value != (double)(uint32_t)value) return false;
    *id = (uint32_t)value;
    return true;
}

// Parses all of the bytes as one JSON value. Caller deletes.
static inline cJSON* json_parse(const char* bytes, size_t size, const char* name, Error* err) {
    const char* stop = bytes;
    cJSON* root = cJSON_ParseWithLengthOpts(bytes, size, &stop, false);
    const char* end = bytes + size;
    while (root != NULL && stop < end && (is_space((uint8_t)*stop) || *stop == '\0')) stop++;
    if (root != NULL && stop == end) return root;
    cJSON_Delete(root);
    fail(err, EXIT_BAD_DATA, "%s is not valid JSON: it breaks off or goes wrong at byte %zu of %zu", name,
         (size_t)(stop - bytes), size);
    return NULL;
}

// Adds {"spelled token": id, ...}. An entry that is already there as a special token is that token.
static inline bool add_vocab(Tokenizer* t, const ByteAlphabet* a, const cJSON* vocab, const char* name,
                             Error* err) {
    String bytes = {NULL, 0, 0};
    bool ok = true;
    const cJSON* entry;
    cJSON_ArrayForEach(entry, vocab) {
        const char* spelled = entry->string;
        uint32_t id;
        bytes.size = 0;
        if (!json_id(entry, &id))
            ok = fail(err, EXIT_BAD_DATA, "%s: the id of the token '%.100s' is not a whole number below %u",
                      name, spelled, MAX_VOCAB_SIZE);
        else if (id < t->vocab_size && t->tokens[id].kind == TOKEN_SPECIAL &&
                 token_equals(t, id, spelled, strlen(spelled)))
            continue;
        else if (!alphabet_to_bytes(a, spelled, strlen(spelled), &bytes))
            ok = fail(err, EXIT_BAD_DATA,
                      "%s: the token '%.100s' has a character that stands for no byte; only byte-level "
                      "vocabularies (GPT-2, Llama 3, Qwen2) are supported",
                      name, spelled);
        else
            ok = tokenizer_add(t, id, TOKEN_ORDINARY, bytes.data, bytes.size, name, err);
        if (!ok) break;
    }
    free(bytes.data);
    return ok;
}

// Adds the merge of two spelled tokens; `both` is scratch.
static inline bool add_merge(Tokenizer* t, const ByteAlphabet* a, const char* left, size_t left_size,
                             const char* right, size_t right_size, String* both, const char* name,
                             Error* err) {
    both->size = 0;
    uint32_t left_id = NO_TOKEN, right_id = NO_TOKEN, id = NO_TOKEN;
    if (alphabet_to_bytes(a, left, left_size, both) && both->size > 0) {
        size_t n = both->size;
        left_id = tokenizer_find(t, both->data, n);
        if (alphabet_to_bytes(a, right, right_size, both) && both->size > n) {
            right_id = tokenizer_find(t, both->data + n, both->size - n);
            id = tokenizer_find(t, both->data, both->size);
        }
    }
    if (left_id == NO_TOKEN || right_id == NO_TOKEN || id == NO_TOKEN)
        return fail(err, EXIT_BAD_DATA,
                    "%s: merge %u is '%.*s' + '%.*s', but the vocabulary lacks one of the two or their "
                    "concatenation",
                    name, t->num_merges, (int)(left_size < 100 ? left_size : 100), left,
                    (int)(right_size < 100 ? right_size : 100), right);
    if (!tokenizer_add_merge(t, left_id, right_id, id))
        return fail(err, EXIT_BAD_DATA, "%s: merge %u is there twice", name, t->num_merges);
    return true;
}

// Adds the merge that a line "left right" spells.
static inline bool add_merge_line(Tokenizer* t, const ByteAlphabet* a, const char* line, size_t n,
                                  String* both, const char* name, Error* err) {
    const char* space = (const char*)memchr(line, ' ', n);
    if (space == NULL)
        return fail(err, EXIT_BAD_DATA,
                    "%s: merge %u is '%.*s'; it must be two tokens and a space between them", name,
                    t->num_merges, (int)(n < 100 ? n : 100), line);
    size_t left = (size_t)(space - line);
    return add_merge(t, a, line, left, space + 1, n - left - 1, both, name, err);
}

// ----------------------------------------------------------------------------
// tokenizer.json
//
//   { "added_tokens": [{"id": 50256, "content": "<|endoftext|>", ...}, ...],
//     "normalizer": null,
//     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}  (GPT-2's)
//                   or {"type": "Sequence", "pretokenizers": [
//                     {"type": "Split", "pattern": {"Regex": "..."}, "behavior": "Isolated", ...},
//                     {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
//     "model": {"type": "BPE", "vocab": {"!": 0, ...}, "merges": ["a b", ...] or [["a", "b"], ...],
//               "ignore_merges": false, ...} }

static inline const char* json_text(const cJSON* object, const char* key) {
    const char* text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, key));
    return text != NULL ? text : "";
}

// absent, null, false, 0 or ""
static inline bool json_is_off(const cJSON* item) {
    return item == NULL || cJSON_IsNull(item) || cJSON_IsFalse(item) ||
           (cJSON_IsNumber(item) && item->valuedouble == 0) ||
           (cJSON_IsString(item) && item->valuestring[0] == '\0');
}

// What this tokenizer does not do must be off.
static inline bool json_check_supported(const cJSON* root, const cJSON* model, const char* name, Error* err) {
    static const char* const must_be_off[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                              "byte_fallback"};
    if (!cJSON_IsObject(model))
        return fail(err, EXIT_BAD_DATA,
                    "%s has no \"model\": it is not a tokenizer.json (of GPT-2's files, name vocab.bpe)",
                    name);
    const char* type = json_text(model, "type");
    if (type[0] != '\0' && strcmp(type, "BPE") != 0)
        return fail(err, EXIT_BAD_DATA, "%s: the model is of type '%.100s'; only BPE is supported", name,
                    type);
    const cJSON* normalizer = cJSON_GetObjectItemCaseSensitive(root, "normalizer");
    if (!json_is_off(normalizer))
        return fail(err, EXIT_BAD_DATA,
                    "%s: the normalizer '%.100s' is not supported; normalize the text beforehand and set "
                    "\"normalizer\": null",
                    name, json_text(normalizer, "type"));
    for (size_t i = 0; i < sizeof must_be_off / sizeof must_be_off[0]; i++)
        if (!json_is_off(cJSON_GetObjectItemCaseSensitive(model, must_be_off[i])))
            return fail(err, EXIT_BAD_DATA, "%s: \"model\".\"%s\" is set, which is not supported", name,
                        must_be_off[i]);
    return true;
}

static inline bool json_is_byte_level(const cJSON* item, bool use_regex) {
    const cJSON* regex = cJSON_GetObjectItemCaseSensitive(item, "use_regex");
    return strcmp(json_text(item, "type"), "ByteLevel") == 0 &&
           (regex == NULL || cJSON_IsTrue(regex)) == use_regex &&
           json_is_off(cJSON_GetObjectItemCaseSensitive(item, "add_prefix_space"));
}

// The split pattern of a tokenizer.json, NULL if its pre_tokenizer is none of the two forms above.
static inline const char* json_pattern(const cJSON* root) {
    const cJSON* pre = cJSON_GetObjectItemCaseSensitive(root, "pre_tokenizer");
    if (json_is_byte_level(pre, true)) return pattern_by_name("gpt2")->regex;
    const cJSON* list = cJSON_GetObjectItemCaseSensitive(pre, "pretokenizers");
    if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != 2) return NULL;
    const cJSON *split = list->child, *byte_level = split->next;
    const cJSON* pattern = cJSON_GetObjectItemCaseSensitive(split, "pattern");
    const cJSON* regex = cJSON_GetObjectItemCaseSensitive(pattern, "Regex");
    bool ok = strcmp(json_text(split, "type"), "Split") == 0 && cJSON_IsString(regex) &&
              strcmp(json_text(split, "behavior"), "Isolated") == 0 &&
              json_is_off(cJSON_GetObjectItemCaseSensitive(split, "invert")) &&
              json_is_byte_level(byte_level, false);
    return ok ? regex->valuestring : NULL;
}

static inline bool json_add_specials(Tokenizer* t, const cJSON* root, const char* name, Error* err) {
    const cJSON* token;
    cJSON_ArrayForEach(token, cJSON_GetObjectItemCaseSensitive(root, "added_tokens")) {
        uint32_t id;
        const char* content = json_text(token, "content");
        if (!json_id(cJSON_GetObjectItemCaseSensitive(token, "id"), &id))
            return fail(err, EXIT_BAD_DATA,
                        "%s: the added token '%.100s' has no id that is a whole number below %u", name,
                        content, MAX_VOCAB_SIZE);
        if (!tokenizer_add(t, id, TOKEN_SPECIAL, content, strlen(content), name, err)) return false;
    }
    return true;
}

static inline bool json_add_merges(Tokenizer* t, const ByteAlphabet* a, const cJSON* merges, const char* name,
                                   Error* err) {
    String both = {NULL, 0, 0};
    bool ok = true;
    const cJSON* merge;
    cJSON_ArrayForEach(merge, merges) {
        const char* left = cJSON_GetStringValue(merge->child);
        const char* right = left != NULL ? cJSON_GetStringValue(merge->child->next) : NULL;
        if (cJSON_IsString(merge))
            ok = add_merge_line(t, a, merge->valuestring, strlen(merge->valuestring), &both, name, err);
        else if (cJSON_IsArray(merge) && right != NULL && merge->child->next->next == NULL)
            ok = add_merge(t, a, left, strlen(left), right, strlen(right), &both, name, err);
        else
            ok = fail(err, EXIT_BAD_DATA, "%s: merge %u is neither \"left right\" nor [\"left\", \"right\"]",
                      name, t->num_merges);
        if (!ok) break;
    }
    free(both.data);
    return ok;
}

static inline bool json_build(Tokenizer* t, const cJSON* root, const char* name, Error* err) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    const cJSON* model = cJSON_GetObjectItemCaseSensitive(root, "model");
    if (!json_check_supported(root, model, name, err)) return false;
    const char* regex = json_pattern(root);
    if (regex == NULL)
        return fail(
            err, EXIT_BAD_DATA,
            "%s: the pre_tokenizer must be ByteLevel without a prefix space, or a Sequence of a Split by "
            "Regex (Isolated, not inverted) and ByteLevel with \"use_regex\": false",
            name);
    const cJSON* merges = cJSON_GetObjectItemCaseSensitive(model, "merges");
    const cJSON* vocab = cJSON_GetObjectItemCaseSensitive(model, "vocab");
    if (!cJSON_IsObject(vocab) || !cJSON_IsArray(merges))
        return fail(err, EXIT_BAD_DATA, "%s: \"model\" must have a \"vocab\" object and a \"merges\" array",
                    name);
    t->ignore_merges = !json_is_off(cJSON_GetObjectItemCaseSensitive(model, "ignore_merges"));
    return json_add_specials(t, root, name, err) && add_vocab(t, &alphabet, vocab, name, err) &&
           json_add_merges(t, &alphabet, merges, name, err) && tokenizer_finish(t, regex, name, err);
}

// Hugging Face's tokenizer.json. Fills t (free with tokenizer_free) or fails, naming `name`.
static inline bool tokenizer_parse_json(Tokenizer* t, const char* bytes, size_t size, const char* name,
                                        Error* err) {
    tokenizer_init(t);
    cJSON* root = json_parse(bytes, size, name, err);
    bool ok = root != NULL && json_build(t, root, name, err);
    cJSON_Delete(root);
    if (!ok) tokenizer_free(t);
    return ok;
}

// ----------------------------------------------------------------------------
// writing tokenizer.json

// Appends a JSON string of UTF-8 text.
static inline void append_json_string(String* out, const char* text, size_t n) {
    string_append_bytes(out, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        if ((uint8_t)text[i] < 0x20)
            string_append(out, "\\u%04x", text[i]);
        else {
            if (text[i] == '"' || text[i] == '\\') string_append_bytes(out, "\\", 1);
            string_append_bytes(out, text + i, 1);
        }
    }
    string_append_bytes(out, "\"", 1);
}

// Appends bytes in the byte alphabet, as UTF-8.
static inline void bytes_to_alphabet(const ByteAlphabet* a, const char* bytes, size_t n, String* out) {
    for (size_t i = 0; i < n; i++) {
        uint16_t c = a->character[(uint8_t)bytes[i]];
        char utf8[2] = {(char)(0xC0 | c >> 6), (char)(0x80 | (c & 0x3F))};
        if (c < 0x80) utf8[0] = (char)c;
        string_append_bytes(out, utf8, c < 0x80 ? 1 : 2);
    }
}

// The text of a token in a tokenizer.json, into out: a special's own, any other's bytes in the alphabet.
static inline void token_spelling(const Tokenizer* t, const ByteAlphabet* a, uint32_t id, String* out) {
    size_t n;
    const char* bytes = token_bytes(t, id, &n);
    out->size = 0;
    if (t->tokens[id].kind == TOKEN_SPECIAL)
        string_append_bytes(out, bytes, n);
    else
        bytes_to_alphabet(a, bytes, n, out);
}

static inline void append_added_tokens(const Tokenizer* t, String* out) {
    const char* comma = "";
    for (uint32_t id = 0; id < t->vocab_size; id++) {
        if (t->tokens[id].kind != TOKEN_SPECIAL) continue;
        size_t n;
        const char* text = token_bytes(t, id, &n);
        string_append(out, "%s\n    {\"id\": %u, \"content\": ", comma, id);
        append_json_string(out, text, n);
        string_append(out, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                           "\"normalized\": false, \"special\": true}");
        comma = ",";
    }
}

static inline void append_pre_tokenizer(const Tokenizer* t, String* out) {
    static const char byte_level[] =
        "\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true";
    if (strcmp(t->pattern.regex, pattern_by_name("gpt2")->regex) == 0) {
        string_append(out, "{%s, \"use_regex\": true}", byte_level);
        return;
    }
    string_append(out, "{\"type\": \"Sequence\", \"pretokenizers\": [\n"
                       "    {\"type\": \"Split\", \"pattern\": {\"Regex\": ");
    append_json_string(out, t->pattern.regex, strlen(t->pattern.regex));
    string_append(out, "}, \"behavior\": \"Isolated\", \"invert\": false},\n    {%s, \"use_regex\": false}]}",
                  byte_level);
}

// Appends the vocabulary by id, specials included (Hugging Face takes their ids from there), then the merges.
static inline void append_vocab_and_merges(const Tokenizer* t, const ByteAlphabet* a, String* out) {
    String text = {NULL, 0, 0}, pair = {NULL, 0, 0};
    const char* comma = "";
    for (uint32_t id = 0; id < t->vocab_size; id++) {
        if (t->tokens[id].kind == TOKEN_HOLE) continue;
        token_spelling(t, a, id, &text);
        string_append(out, "%s\n      ", comma);
        append_json_string(out, text.data, text.size);
        string_append(out, ": %u", id);
        comma = ",";
    }
    string_append(out, "\n    },\n    \"merges\": [");
    for (uint32_t rank = 0; rank < t->num_merges; rank++) {
        token_spelling(t, a, t->merges[rank].left, &pair);
        token_spelling(t, a, t->merges[rank].right, &text);
        string_append(&pair, " %s", text.data);
        string_append(out, "%s\n      ", rank == 0 ? "" : ",");
        append_json_string(out, pair.data, pair.size);
    }
    free(pair.data);
    free(text.data);
}

// Appends the text of a tokenizer.json. Merges are spelled "left right", which old and new readers take.
static inline void tokenizer_to_json(const Tokenizer* t, String* out) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    string_append(out, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n"
                       "  \"added_tokens\": [");
    append_added_tokens(t, out);
    string_append(out, "],\n  \"normalizer\": null,\n  \"pre_tokenizer\": ");
    append_pre_tokenizer(t, out);
    string_append(
        out,
        ",\n  \"post_processor\": null,\n"
        "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, "
        "\"use_regex\": true},\n"
        "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
        "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
        "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": %s,\n"
        "    \"vocab\": {",
        t->ignore_merges ? "true" : "false");
    append_vocab_and_merges(t, &alphabet, out);
    string_append(out, "\n    ]\n  }\n}\n");
}

// A special token that the vocabulary would spell like an ordinary one, or that no JSON can hold, has no
// place in a tokenizer.json.
static inline bool check_specials(const Tokenizer* t, Error* err) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    String bytes = {NULL, 0, 0};
    bool ok = true;
    for (uint32_t id = 0; ok && id < t->vocab_size; id++) {
        size_t n;
        const char* text = token_bytes(t, id, &n);
        bytes.size = 0;
        if (t->tokens[id].kind != TOKEN_SPECIAL) continue;
        if (utf8_skip((const uint8_t*)text, (const uint8_t*)text + n) != (const uint8_t*)text + n ||
            memchr(text, '\0', n) != NULL)
            ok = fail(err, EXIT_USAGE, "special token %u is not UTF-8 text", id);
        else if (alphabet_to_bytes(&alphabet, text, n, &bytes) &&
                 tokenizer_find(t, bytes.data, bytes.size) != NO_TOKEN)
            ok = fail(err, EXIT_USAGE,
                      "special token %u, '%.*s', is spelled like token %u; choose another text", id,
                      (int)(n < 100 ? n : 100), text, tokenizer_find(t, bytes.data, bytes.size));
    }
    free(bytes.data);
    return ok;
}

// Writes a tokenizer.json that Hugging Face tokenizers opens with the same ids. `path` appears when complete.
static inline bool tokenizer_save_json(const Tokenizer* t, const char* path, Error* err) {
    char partial[PATH_MAX];
    if (!check_specials(t, err)) return false;
    if (snprintf(partial, sizeof partial, "%s.tmp", path) >= (int)sizeof partial)
        return fail(err, EXIT_USAGE, "path %s is too long", path);
    int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", partial, strerror(errno));
    String json = {NULL, 0, 0};
    tokenizer_to_json(t, &json);
    bool ok = write_all(fd, json.data, json.size) && fsync(fd) == 0;
    free(json.data);
    ok = (close(fd) == 0) && ok && rename(partial, path) == 0;
    if (ok) return true;
    fail(err, EXIT_IO, "cannot write %s: %s", path, strerror(errno));
    unlink(partial);
    return false;
}

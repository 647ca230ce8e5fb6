// Cuts a document into pieces: the step before byte-pair encoding, which never merges across a piece.
//
// What a piece is, a regular expression says; PCRE2 runs it, and any expression that a tokenizer.json holds.
// The four patterns that nearly every model uses also have a hand-written matcher of their ASCII case,
// several times faster than the expression: it hands a piece to PCRE2 as soon as the decision would need to
// look at a byte >= 0x80. dev/test/test_pretokenize.c holds the two against each other.
//
// A document is any sequence of bytes. Each well-formed UTF-8 stretch is split as a text of its own; the
// bytes between two stretches, which no UTF-8 sequence begins at, are one piece: nothing is lost or
// replaced.
//
// Sources: tiktoken_ext/openai_public.py (gpt2, cl100k), the tokenizer.json of Llama 3 and Qwen2. The
// spelling here is one that PCRE2, Oniguruma (Hugging Face tokenizers) and fancy-regex (tiktoken) read alike:
// `\z` for tiktoken's `$`, in Oniguruma the end of a line; `{1,3}` for `{1,3}+`, there a repetition of it.
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>      // defines: pcre2_compile, pcre2_match, ...
#include "llmc/utf8.h"  // defines: utf8_sequence, utf8_skip
#include "llmc/utils.h" // defines: Error, fail, exit_with, String, string_append, malloc_check, CHECK

// ----------------------------------------------------------------------------
// ASCII

static inline bool is_ascii(uint8_t c) { return c < 0x80; }
static inline bool is_letter(uint8_t c) { return (uint8_t)((c | 0x20) - 'a') < 26; }
static inline bool is_digit(uint8_t c) { return (uint8_t)(c - '0') < 10; }
static inline bool is_newline(uint8_t c) { return c == '\n' || c == '\r'; }
static inline bool is_space(uint8_t c) { return c == ' ' || (uint8_t)(c - '\t') < 5; } // \t \n \v \f \r
static inline bool is_other(uint8_t c) {
    return is_ascii(c) && !is_letter(c) && !is_digit(c) && !is_space(c);
}

// The first byte from p on that is no ASCII letter. Eight at a time: a loop over bytes would mispredict once
// for each word. In each byte of `letter`, the top bit says: 'a' <= (c | 0x20) <= 'z' and c < 0x80.
static inline const uint8_t* skip_letters(const uint8_t* p, const uint8_t* end) {
    const uint64_t ones = 0x0101010101010101u, top = 0x80 * ones;
    while (end - p >= 8) {
        uint64_t x;
        memcpy(&x, p, 8);
        uint64_t folded = (x | 0x20 * ones) & ~top;
        uint64_t letter = (folded + (0x80 - 'a') * ones) & ~(folded + (0x80 - 'z' - 1) * ones) & ~x & top;
        if (letter != top) return p + __builtin_ctzll(letter ^ top) / 8;
        p += 8;
    }
    while (p < end && is_letter(*p)) p++;
    return p;
}

// A matcher of the ASCII case: the length of the piece that starts at p < end, 0 to leave it to PCRE2.
typedef size_t AsciiMatcher(const uint8_t* p, const uint8_t* end);

// The piece [p, q), unless a byte that is not ASCII stands behind it and might belong to it.
static inline size_t ascii_piece(const uint8_t* p, const uint8_t* q, const uint8_t* end) {
    return q < end && !is_ascii(*q) ? 0 : (size_t)(q - p);
}

// 's 't 'm 'd 'll 've 're: its length, 0 if there is none at p.
static inline size_t ascii_contraction(const uint8_t* p, const uint8_t* end, bool any_case) {
    if (end - p < 2) return 0;
    const uint8_t fold = any_case ? 0x20 : 0;
    uint8_t a = p[1] | fold, b = end - p > 2 ? p[2] | fold : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e') ? 3 : 0;
}

// A run of white space. In front of a text it leaves its last character to that text: `\s+(?!\S)|\s+`.
// to_newline: it ends behind its last newline instead, if it has one: `\s*[\r\n]+|` in front of the above.
// whole_tail: at the end of the text it is one piece whatever it holds: `\s++\z|` in front of all.
static inline size_t ascii_space_piece(const uint8_t* p, const uint8_t* end, bool to_newline,
                                       bool whole_tail) {
    const uint8_t *q = p, *behind_newline = NULL;
    for (; q < end && is_space(*q); q++)
        if (is_newline(*q)) behind_newline = q + 1;
    if (q < end && !is_ascii(*q)) return 0;
    bool tail = q == end;
    if (to_newline && behind_newline != NULL && !(tail && whole_tail)) return (size_t)(behind_newline - p);
    return (size_t)(q - p) - (!tail && q - p > 1);
}

static inline size_t ascii_piece_gpt2(const uint8_t* p, const uint8_t* end) {
    size_t contraction = *p == '\'' ? ascii_contraction(p, end, false) : 0;
    if (contraction != 0) return contraction;
    const uint8_t* q = p + (*p == ' ' && end - p > 1); // the space that may precede each kind of run
    if (is_letter(*q)) return ascii_piece(p, skip_letters(q, end), end);
    if (is_space(*q)) return ascii_space_piece(p, end, false, true);
    if (!is_ascii(*q)) return 0;
    bool digits = is_digit(*q);
    while (q < end && (digits ? is_digit(*q) : is_other(*q))) q++;
    return ascii_piece(p, q, end);
}

static inline size_t ascii_piece_gpt4(const uint8_t* p, const uint8_t* end, int max_digits, bool whole_tail) {
    uint8_t c = *p, next = end - p > 1 ? p[1] : ' ';
    if (is_letter(c)) return ascii_piece(p, skip_letters(p, end), end);
    if (!is_ascii(c)) return 0;
    size_t contraction = c == '\'' ? ascii_contraction(p, end, true) : 0;
    if (contraction != 0) return contraction;
    const uint8_t* q = p;
    if (is_digit(c)) {
        while (q < end && q - p < max_digits && is_digit(*q)) q++;
        return q - p == max_digits ? (size_t)max_digits : ascii_piece(p, q, end);
    }
    if (is_letter(next) && !is_newline(c)) return ascii_piece(p, skip_letters(p + 1, end), end);
    if (c == ' ' && is_other(next)) q++;
    if (!is_other(*q)) return ascii_space_piece(p, end, true, whole_tail);
    while (q < end && is_other(*q)) q++;
    if (ascii_piece(p, q, end) == 0) return 0;
    while (q < end && is_newline(*q)) q++;
    return (size_t)(q - p);
}

static inline size_t ascii_piece_cl100k(const uint8_t* p, const uint8_t* end) {
    return ascii_piece_gpt4(p, end, 3, true);
}
static inline size_t ascii_piece_llama3(const uint8_t* p, const uint8_t* end) {
    return ascii_piece_gpt4(p, end, 3, false);
}
static inline size_t ascii_piece_qwen2(const uint8_t* p, const uint8_t* end) {
    return ascii_piece_gpt4(p, end, 1, false);
}

// ----------------------------------------------------------------------------
// patterns

typedef struct {
    const char* name;  // as `corpus bpe --pattern` takes it
    const char* regex; // as tokenizer.json spells it
    AsciiMatcher* ascii;
} NamedPattern;

static const NamedPattern named_patterns[] = {
    {"gpt2", "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
     ascii_piece_gpt2},
    {"cl100k",
     "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*+|"
     "\\s++\\z|\\s*[\\r\\n]|\\s+(?!\\S)|\\s",
     ascii_piece_cl100k},
    {"llama3",
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
     "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
     ascii_piece_llama3},
    {"qwen2",
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
     "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
     ascii_piece_qwen2},
};
enum { NUM_NAMED_PATTERNS = sizeof named_patterns / sizeof named_patterns[0] };

// A compiled pattern, shared by all threads.
typedef struct {
    char* regex;         // as tokenizer.json spells it
    AsciiMatcher* ascii; // NULL if the pattern is none of the named ones
    pcre2_code* code;
} Pattern;

static inline const NamedPattern* pattern_by_name(const char* name) {
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++)
        if (strcmp(named_patterns[i].name, name) == 0) return &named_patterns[i];
    return NULL;
}

// The regex as PCRE2 must read it to mean what Oniguruma means by it, into out (caller frees): `\s` is
// Unicode's White_Space, PCRE2's own counts U+180E among it. Returns NULL, or the construct that the two
// read differently and that no tokenizer needs.
static inline const char* pattern_for_pcre2(const char* regex, String* out) {
    bool in_class = false, in_braces = false; // inside [...]; inside the {...} of \p{L}, \x{85}
    for (const char* p = regex; *p != '\0'; p++) {
        if (in_class && *p == '[') return "a '[' inside [...]";
        if (in_class && p[0] == '&' && p[1] == '&') return "'&&' inside [...]";
        if (!in_class && !in_braces && p[0] == '}' && p[1] == '+') return "'{...}+'";
        if (*p == '[' || *p == ']') in_class = *p == '[';
        if (*p == '}') in_braces = false;
        if (*p != '\\' || p[1] == '\0') {
            string_append_bytes(out, p, 1);
            continue;
        }
        p++;
        if (*p == 'h' || *p == 'H') return "'\\h'";
        if (*p == 's' || *p == 'S')
            string_append(out, "\\%c{White_Space}", *p == 's' ? 'p' : 'P');
        else
            string_append(out, "\\%c", *p);
        in_braces = p[1] == '{' && (*p == 'p' || *p == 'P' || *p == 'x');
    }
    return NULL;
}

static inline void pattern_free(Pattern* pattern) {
    free(pattern->regex);
    pcre2_code_free(pattern->code);
    memset(pattern, 0, sizeof *pattern);
}

// Compiles a regex that comes from `name` (for messages). It must not match the empty string.
static inline bool pattern_compile(Pattern* pattern, const char* regex, const char* name, Error* err) {
    memset(pattern, 0, sizeof *pattern);
    String translated = {NULL, 0, 0};
    const char* ambiguous = pattern_for_pcre2(regex, &translated);
    if (ambiguous != NULL) {
        free(translated.data);
        return fail(err, EXIT_BAD_DATA,
                    "%s: the split pattern '%.200s' has %s, which Hugging Face tokenizers and PCRE2 read "
                    "differently; write it another way",
                    name, regex, ambiguous);
    }
    int error;
    PCRE2_SIZE offset;
    // MULTILINE: `^` and `$` are those of lines, as in Oniguruma
    pattern->code = pcre2_compile(
        (PCRE2_SPTR)(translated.data != NULL ? translated.data : ""), translated.size,
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, NULL);
    free(translated.data);
    if (pattern->code == NULL) {
        PCRE2_UCHAR reason[128] = {0};
        pcre2_get_error_message(error, reason, sizeof reason);
        return fail(err, EXIT_BAD_DATA, "%s: the split pattern '%.200s' does not compile: %s", name, regex,
                    (const char*)reason);
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(pattern->code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty != 0) {
        pattern_free(pattern);
        return fail(err, EXIT_BAD_DATA, "%s: the split pattern '%.200s' matches the empty string", name,
                    regex);
    }
    pcre2_jit_compile(pattern->code, PCRE2_JIT_COMPLETE); // where there is no JIT, the interpreter runs
    pattern->regex = strdup_check(regex);
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++)
        if (strcmp(named_patterns[i].regex, regex) == 0) pattern->ascii = named_patterns[i].ascii;
    return true;
}

// ----------------------------------------------------------------------------
// the splitter: one per thread

typedef struct {
    const Pattern* pattern;
    pcre2_match_data* match;
    pcre2_match_context* context;
    pcre2_jit_stack* stack;
    const uint8_t *at, *end;              // the next piece; the document's end
    const uint8_t *stretch, *stretch_end; // the UTF-8 stretch that `at` lies in
} Splitter;

static inline void splitter_init(Splitter* s, const Pattern* pattern) {
    memset(s, 0, sizeof *s);
    s->pattern = pattern;
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    CHECK(s->match != NULL && s->context != NULL);
    s->stack = pcre2_jit_stack_create(1 << 15, 1 << 24, NULL); // NULL without JIT, which needs none
    if (s->stack != NULL) pcre2_jit_stack_assign(s->context, NULL, s->stack);
}

static inline void splitter_free(Splitter* s) {
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    pcre2_jit_stack_free(s->stack);
    memset(s, 0, sizeof *s);
}

static inline void splitter_start(Splitter* s, const char* text, size_t size) {
    s->at = s->stretch = (const uint8_t*)text;
    s->end = s->at + size;
    s->stretch_end = utf8_skip(s->at, s->end);
}

// The piece at s->at by PCRE2: what it matches there, or what lies in front of the next match. A foreign
// regex may need more backtracking than the engine grants, which ends the program; the named ones never do.
static inline size_t splitter_match(Splitter* s) {
    size_t at = (size_t)(s->at - s->stretch), size = (size_t)(s->stretch_end - s->stretch);
    int rc = pcre2_match(s->pattern->code, s->stretch, size, at, PCRE2_NO_UTF_CHECK, s->match, s->context);
    if (rc == PCRE2_ERROR_NOMATCH) return size - at;
    if (rc < 0) {
        Error err = {0, {0}};
        fail(&err, EXIT_BAD_DATA,
             "the split pattern '%.200s' backtracks too much on this text: PCRE2 gave up with error %d",
             s->pattern->regex, rc);
        exit_with(&err);
    }
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(s->match);
    return found[0] > at ? found[0] - at : found[1] - at;
}

// The bytes at s->at that are not UTF-8; what follows them is a stretch of its own.
static inline size_t splitter_not_utf8(Splitter* s) {
    const uint8_t* q = s->at;
    while (q < s->end && utf8_sequence(q, s->end) == 0) q++;
    s->stretch = q;
    s->stretch_end = utf8_skip(q, s->end);
    return (size_t)(q - s->at);
}

// The next piece of the document: its length, 0 behind the last. The pieces' concatenation is the document.
static inline size_t splitter_next(Splitter* s, const char** piece) {
    *piece = (const char*)s->at;
    if (s->at == s->end) return 0;
    size_t n;
    if (s->at == s->stretch_end)
        n = splitter_not_utf8(s);
    else {
        n = s->pattern->ascii != NULL ? s->pattern->ascii(s->at, s->stretch_end) : 0;
        if (n == 0) n = splitter_match(s);
    }
    s->at += n;
    return n;
}

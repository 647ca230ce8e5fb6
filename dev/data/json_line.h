// One string field out of one line of JSONL, without building a tree: the rest of the line is only checked.
// Not cJSON: a NUL in a text ("\u0000") ends its strings early, and this must keep up with the encoder.
// Limits: the line is an object; 64 levels of nesting; control characters in strings pass as they are.
#pragma once
#include "llmc/utils.h" // defines: String, string_append_bytes

typedef struct {
    const char *at, *end;
    const char* problem; // NULL while all is well
} JsonLine;

static inline bool json_problem(JsonLine* json, const char* problem) {
    if (json->problem == NULL) json->problem = problem;
    return false;
}

// The next byte that is not white space; 0 at the end.
static inline char json_peek(JsonLine* json) {
    while (json->at < json->end &&
           (*json->at == ' ' || *json->at == '\t' || *json->at == '\r' || *json->at == '\n'))
        json->at++;
    return json->at < json->end ? *json->at : '\0';
}

static inline bool json_expect(JsonLine* json, char c, const char* problem) {
    if (json_peek(json) != c) return json_problem(json, problem);
    json->at++;
    return true;
}

// Four hexadecimal digits after \u.
static inline bool json_hex4(JsonLine* json, uint32_t* code) {
    *code = 0;
    if (json->end - json->at < 4) return json_problem(json, "a \\u escape without four hexadecimal digits");
    for (int i = 0; i < 4; i++) {
        char c = *json->at++;
        if (c >= '0' && c <= '9')
            *code = *code * 16 + (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            *code = *code * 16 + (uint32_t)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F')
            *code = *code * 16 + (uint32_t)(c - 'A' + 10);
        else
            return json_problem(json, "a \\u escape without four hexadecimal digits");
    }
    return true;
}

static inline void append_utf8(String* out, uint32_t code) {
    char bytes[4];
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const uint8_t lead[5] = {0, 0x00, 0xC0, 0xE0, 0xF0};
    for (size_t i = n; i-- > 1; code >>= 6) bytes[i] = (char)(0x80 | (code & 0x3F));
    bytes[0] = (char)(lead[n] | code);
    string_append_bytes(out, bytes, n);
}

// What follows \u: a code point, or two surrogates that make one; a surrogate alone becomes U+FFFD.
static inline bool json_unicode_escape(JsonLine* json, String* out) {
    uint32_t code, low;
    if (!json_hex4(json, &code)) return false;
    if (code >= 0xD800 && code < 0xDC00 && json->end - json->at >= 6 && json->at[0] == '\\' &&
        json->at[1] == 'u') {
        const char* before = json->at;
        json->at += 2;
        if (!json_hex4(json, &low)) return false;
        if (low >= 0xDC00 && low < 0xE000)
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        else
            json->at = before;
    }
    append_utf8(out, code >= 0xD800 && code < 0xE000 ? 0xFFFD : code);
    return true;
}

// Replaces *out by the string at the opening quote.
static inline bool json_string(JsonLine* json, String* out) {
    static const char escapes[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    out->size = 0;
    if (!json_expect(json, '"', "a string was expected")) return false;
    while (json->at < json->end) {
        const char* span = json->at;
        while (json->at < json->end && *json->at != '"' && *json->at != '\\') json->at++;
        string_append_bytes(out, span, (size_t)(json->at - span));
        if (json->at < json->end && *json->at++ == '"') return true;
        if (json->at == json->end) break;
        char c = *json->at++;
        const char* escape = c != '\0' ? strchr(escapes, c) : NULL;
        if (escape != NULL)
            string_append_bytes(out, &values[escape - escapes], 1);
        else if (c != 'u')
            return json_problem(json, "an unknown escape in a string");
        else if (!json_unicode_escape(json, out))
            return false;
    }
    return json_problem(json, "a string that does not end");
}

// A number, true, false or null: checked by their characters only.
static inline bool json_word(JsonLine* json) {
    const char* start = json->at;
    while (json->at < json->end && *json->at != '\0' && strchr("+-.0123456789Eaeflnrstu", *json->at) != NULL)
        json->at++;
    return json->at > start || json_problem(json, "a value was expected");
}

// Steps over a value of any kind; scratch is for its strings. Brackets are counted, not matched by kind: the
// only thing asked of a skipped value is where it ends.
static inline bool json_skip(JsonLine* json, String* scratch) {
    int depth = 0;
    do {
        char c = json_peek(json);
        if (c == '\0') return json_problem(json, "a value that does not end");
        if (c == '"') {
            if (!json_string(json, scratch)) return false;
        } else if (c == '{' || c == '[') {
            json->at++;
            if (++depth > 64) return json_problem(json, "more than 64 levels of nesting");
        } else if (depth > 0 && strchr("}],:", c) != NULL) {
            json->at++;
            depth -= c == '}' || c == ']';
        } else if (!json_word(json)) {
            return false;
        }
    } while (depth > 0);
    return true;
}

// The string under `field` in the object on a line, into out (the last one if the field is there twice; what
// Python's json does). scratch is overwritten. False: *problem says why.
static inline bool json_line_field(const char* line, size_t size, const char* field, String* out,
                                   String* scratch, const char** problem) {
    JsonLine json = {line, line + size, NULL};
    bool found = false;
    *problem = "not a JSON object";
    if (!json_expect(&json, '{', *problem)) return false;
    size_t field_size = strlen(field);
    for (bool more = json_peek(&json) != '}'; more; more = json_peek(&json) == ',') {
        if (json_peek(&json) == ',') json.at++;
        if (!json_string(&json, scratch) || !json_expect(&json, ':', "no ':' behind a name")) break;
        bool wanted = scratch->size == field_size && memcmp(scratch->data, field, field_size) == 0;
        if (wanted && json_peek(&json) != '"') json_problem(&json, "the field is not a string");
        found = found || wanted;
        if (json.problem != NULL || !(wanted ? json_string(&json, out) : json_skip(&json, scratch))) break;
    }
    if (json.problem == NULL) json_expect(&json, '}', "no ',' or '}' behind a value");
    if (json.problem == NULL && json_peek(&json) != '\0') json_problem(&json, "something behind the object");
    if (json.problem == NULL && !found) json_problem(&json, "no such field");
    *problem = json.problem;
    return json.problem == NULL;
}

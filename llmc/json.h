// JSON for run configs and small files, on top of cJSON: comments, lines for messages, typed values, and text
// escaped for what we write. cJSON itself knows no positions and cuts a string at \u0000: the text is looked
// at before it is parsed, and walked again for a line only when there is something to complain about.
//
// Limits: 1 MiB, 32 levels of nesting, 1,000 keys an object. cJSON is given text that ends in a NUL, never a
// length: parsing by length has read past the end (its issues 775 and 804; Debian 12 has version 1.7.15).
#pragma once
#include <cjson/cJSON.h>
#include <math.h>

#include "llmc/utf8.h"  // defines: utf8_sequence, utf8_skip
#include "llmc/utils.h" // defines: Error, fail, String

enum { JSON_MAX_BYTES = 1 << 20, JSON_MAX_DEPTH = 32, JSON_MAX_KEYS = 1000 };

// ----------------------------------------------------------------------------
// writing

// A text in quotes. JSON is UTF-8: each byte that is not becomes U+FFFD.
static inline void json_append_string(String* out, const char* text) {
    const uint8_t *c = (const uint8_t*)text, *end = c + strlen(text);
    string_append_bytes(out, "\"", 1);
    while (c < end) {
        size_t n = utf8_sequence(c, end);
        if (*c == '"' || *c == '\\')
            string_append(out, "\\%c", *c);
        else if (*c == '\n')
            string_append_bytes(out, "\\n", 2);
        else if (*c < 32 || *c == 127)
            string_append(out, "\\u%04x", *c);
        else
            string_append_bytes(out, n != 0 ? c : (const uint8_t*)"\xEF\xBF\xBD", n != 0 ? n : 3);
        c += n != 0 ? n : 1;
    }
    string_append_bytes(out, "\"", 1);
}

// The shortest of %.15g, %.16g and %.17g that reads back as the same finite double.
static inline const char* json_number_text(char out[40], double value) {
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, 40, "%.*g", digits, value);
        if (strtod(out, NULL) == value) break;
    }
    return out;
}

// Always with a point or an exponent: some readers tell 8 from 8.0.
static inline void json_append_number(String* out, double value) {
    char text[40];
    json_number_text(text, value);
    string_append(out, "%s%s", text, strpbrk(text, ".e") == NULL ? ".0" : "");
}

// ----------------------------------------------------------------------------
// walking the text

// The end of the string literal that begins at text[i] == '"': the index behind its closing quote, or size.
static inline size_t json_skip_string(const char* text, size_t size, size_t i) {
    for (i++; i < size && text[i] != '"'; i++)
        if (text[i] == '\\') i++;
    return i < size ? i + 1 : size;
}

static inline bool json_is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

static inline int json_line_at(const char* text, size_t position) {
    int line = 1;
    for (size_t i = 0; i < position; i++) line += text[i] == '\n';
    return line;
}

// Turns // and /* */ comments outside strings into spaces; newlines stay, and so do line numbers.
static inline bool json_blank_comments(char* text, size_t size, const char* name, Error* err) {
    for (size_t i = 0; i < size;) {
        if (text[i] == '"') {
            i = json_skip_string(text, size, i);
        } else if (text[i] == '/' && i + 1 < size && text[i + 1] == '/') {
            while (i < size && text[i] != '\n') text[i++] = ' ';
        } else if (text[i] == '/' && i + 1 < size && text[i + 1] == '*') {
            size_t begin = i, end = i + 2;
            while (end + 1 < size && !(text[end] == '*' && text[end + 1] == '/')) end++;
            if (end + 1 >= size)
                return fail(err, EXIT_CONFIG, "%s:%d: the comment that begins here has no end (*/)", name,
                            json_line_at(text, begin));
            for (; i < end + 2; i++)
                if (text[i] != '\n') text[i] = ' ';
        } else {
            i++;
        }
    }
    return true;
}

// How deep objects and arrays are nested.
static inline int json_depth(const char* text, size_t size) {
    int depth = 0, deepest = 0;
    for (size_t i = 0; i < size; i++) {
        if (text[i] == '"')
            i = json_skip_string(text, size, i) - 1;
        else if (text[i] == '{' || text[i] == '[')
            depth++;
        else if (text[i] == '}' || text[i] == ']')
            depth--;
        deepest = depth > deepest ? depth : deepest;
    }
    return deepest;
}

// Where a text begins that has no closing quote before its line ends; size if all have.
static inline size_t json_find_unclosed(const char* text, size_t size) {
    for (size_t i = 0; i < size; i++) {
        size_t begin = i;
        if (text[i] != '"') continue;
        for (i++; i < size && text[i] != '"' && text[i] != '\n'; i++)
            if (text[i] == '\\') i++;
        if (i >= size || text[i] == '\n') return begin;
    }
    return size;
}

// Where a string holds the character NUL as \u0000, at which cJSON's strings would end; size if none does.
static inline size_t json_find_nul(const char* text, size_t size) {
    for (size_t i = 0; i + 5 < size; i++) {
        if (text[i] != '\\') continue;
        if (memcmp(text + i + 1, "u0000", 5) == 0) return i;
        i++;
    }
    return size;
}

// Is the newest key at each level, keys[1] ... keys[depth], the dotted path?
static inline bool json_path_is(const char* const* keys, const size_t* sizes, int depth, const char* path) {
    for (int level = 1; level <= depth; level++) {
        if (keys[level] == NULL || strncmp(keys[level], path, sizes[level]) != 0) return false;
        path += sizes[level];
        if (*path != (level < depth ? '.' : '\0')) return false;
        path++;
    }
    return true;
}

// The line of the key at a dotted path, "batch.micro_batch_size"; occurrence 2 finds the second of two equal
// keys. 0 when it is not there, or spelled with escapes.
static inline int json_line_of(const char* text, size_t size, const char* path, int occurrence) {
    const char* keys[JSON_MAX_DEPTH + 1] = {NULL};
    size_t sizes[JSON_MAX_DEPTH + 1] = {0};
    int depth = 0, wanted = 1;
    for (const char* c = path; *c != '\0'; c++) wanted += *c == '.';
    for (size_t i = 0; i < size;) {
        if ((text[i] == '{' || text[i] == '[') && ++depth >= 1 && depth <= JSON_MAX_DEPTH) keys[depth] = NULL;
        if (text[i] == '}' || text[i] == ']') depth--;
        if (text[i] != '"') {
            i++;
            continue;
        }
        size_t begin = i + 1, end = json_skip_string(text, size, i);
        for (i = end; i < size && json_is_space(text[i]);) i++;
        if (i >= size || text[i] != ':' || depth < 1 || depth > JSON_MAX_DEPTH)
            continue; // a value, not a key
        keys[depth] = text + begin, sizes[depth] = end - begin - 1;
        if (depth == wanted && json_path_is(keys, sizes, depth, path) && --occurrence == 0)
            return json_line_at(text, begin);
    }
    return 0;
}

// ----------------------------------------------------------------------------
// messages: "FILE:LINE: section.key is VALUE; RULE"

// Where keys come from: a file, and on top of it the overrides of the command line, "section.key=value".
typedef struct {
    const char* name; // of the file
    const char* text; // its text, comments blanked
    size_t size;
    const char* section; // what the file's top level is: "", or "model" for a config.json that a run names
    int num_overrides;
    char** overrides;
} JsonSource;

// One value, and what a message says about it.
typedef struct {
    const JsonSource* source;
    char path[128];    // "section.key"
    const cJSON* item; // NULL: not there
} JsonValue;

// object[key], where the object stands at path ("": the top level)
static inline JsonValue json_member(const JsonSource* source, const char* path, const cJSON* object,
                                    const char* key) {
    JsonValue v = {source, {0}, cJSON_GetObjectItemCaseSensitive(object, key)};
    size_t n = strlen(path);
    n = n < sizeof v.path - 1 ? n : sizeof v.path - 2;
    memcpy(v.path, path, n);
    if (n > 0) v.path[n++] = '.';
    strncpy(v.path + n, key, sizeof v.path - 1 - n);
    replace_controls(v.path);
    return v;
}

// Does an override of the command line set this, something inside it, or something that it is inside of? (One
// that names a file as the source's whole section sets nothing inside of that.)
static inline bool json_is_overridden(const JsonSource* source, const char* path) {
    for (int i = 0; i < source->num_overrides; i++) {
        const char* o = source->overrides[i];
        size_t n = strcspn(o, "="), m = strlen(path), common = n < m ? n : m;
        if (n <= strlen(source->section) || strncmp(o, path, common) != 0) continue;
        if (n == m || (n < m ? path : o)[common] == '.') return true;
    }
    return false;
}

// A path as it stands in the source's text: without the name of the section that the whole text is.
static inline const char* json_path_in_text(const JsonValue* v) {
    size_t n = strlen(v->source->section);
    bool inside = n != 0 && strncmp(v->path, v->source->section, n) == 0 && v->path[n] == '.';
    return inside ? v->path + n + 1 : v->path;
}

// "FILE:LINE: section.key" or "command line: section.key". The line is that of the innermost key around the
// value which the text has.
static inline void json_append_where(String* out, const JsonValue* v) {
    if (json_is_overridden(v->source, v->path)) {
        string_append(out, "command line: %s", v->path);
        return;
    }
    char around[sizeof v->path];
    const char* path = json_path_in_text(v);
    snprintf(around, sizeof around, "%s", path);
    int line = json_line_of(v->source->text, v->source->size, around, 1);
    for (char* dot; line == 0 && (dot = strrchr(around, '.')) != NULL;) {
        *dot = '\0';
        line = json_line_of(v->source->text, v->source->size, around, 1);
    }
    string_append(out, "%s:", v->source->name);
    if (line > 0) string_append(out, "%d:", line);
    string_append(out, " %s", path);
}

// The size of a text cut to at most n bytes, of which the last does not begin a character.
static inline size_t json_cut(const char* text, size_t n) {
    size_t size = strnlen(text, n + 1);
    if (size <= n) return size;
    while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80) n--;
    return n;
}

// What a value looks like: at most 60 bytes of its JSON.
static inline void json_append_shown(String* out, const cJSON* item) {
    char number[40];
    if (cJSON_IsNumber(item)) {
        bool finite = isfinite(item->valuedouble);
        string_append(out, "%s", finite ? json_number_text(number, item->valuedouble) : "too large a number");
        return;
    }
    char* text = cJSON_PrintUnformatted(item);
    CHECK(text != NULL);
    string_append(out, "%.*s%s", (int)json_cut(text, 60), text, strlen(text) > 60 ? "..." : "");
    cJSON_free(text);
}

// WHERE, then the formatted rest of the sentence.
__attribute__((format(printf, 3, 4))) static inline bool fail_at(Error* err, const JsonValue* v,
                                                                 const char* format, ...) {
    char rest[640];
    String where = {NULL, 0, 0};
    va_list args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    json_append_where(&where, v);
    fail(err, EXIT_CONFIG, "%s%s", where.data, rest);
    free(where.data);
    return false;
}

// "WHERE is VALUE; " or "WHERE is missing; ", then the formatted rule.
__attribute__((format(printf, 3, 4))) static inline bool fail_value(Error* err, const JsonValue* v,
                                                                    const char* format, ...) {
    char rule[512];
    String shown = {NULL, 0, 0};
    va_list args;
    va_start(args, format);
    vsnprintf(rule, sizeof rule, format, args);
    va_end(args);
    if (v->item != NULL) json_append_shown(&shown, v->item);
    fail_at(err, v, " is %s; %s", v->item != NULL ? shown.data : "missing", rule);
    free(shown.data);
    return false;
}

// Edits that turn a into b (Levenshtein's distance), for "did you mean"; one if a is where b begins, far if a
// name has 64 bytes or more.
static inline int name_distance(const char* a, const char* b) {
    size_t n = strlen(a), m = strlen(b);
    int row[64];
    if (n > 63 || m > 63) return INT_MAX / 2;
    if (n >= 3 && n < m && memcmp(a, b, n) == 0) return 1;
    for (size_t j = 0; j <= m; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int best = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            row[j] = change < best ? change : best;
        }
    }
    return row[m];
}

// Keeps the candidate that is nearest to key so far; ties go to the first.
static inline void nearest_name(const char* key, const char* candidate, const char** best) {
    if (*best == NULL || name_distance(key, candidate) < name_distance(key, *best)) *best = candidate;
}

// ----------------------------------------------------------------------------
// reading

// Values of a wanted type; anything else, a missing one too, is the user's error.
static inline bool json_read_number(double* out, const JsonValue* v, bool whole, double min, double max,
                                    Error* err) {
    double value = cJSON_IsNumber(v->item) ? v->item->valuedouble : NAN;
    if (!(value >= min && value <= max) || (whole && value != floor(value)))
        return fail_value(err, v, "%s from %.16g to %.16g is wanted", whole ? "a whole number" : "a number",
                          min, max);
    *out = value;
    return true;
}

static inline bool json_read_bool(bool* out, const JsonValue* v, Error* err) {
    if (!cJSON_IsBool(v->item)) return fail_value(err, v, "true or false is wanted");
    *out = cJSON_IsTrue(v->item) != 0;
    return true;
}

static inline bool json_read_text(char* out, size_t capacity, const JsonValue* v, Error* err) {
    const char* text = cJSON_GetStringValue(v->item);
    if (text == NULL) return fail_value(err, v, "text in quotes is wanted");
    if (strlen(text) >= capacity)
        return fail_at(err, v, " is %zu bytes long; at most %zu are possible", strlen(text), capacity - 1);
    memcpy(out, text, strlen(text) + 1);
    return true;
}

// No object holds a key twice, nor more keys than anybody would write.
static inline bool json_check_keys(const cJSON* node, const char* path, const JsonSource* source,
                                   Error* err) {
    int count = 0;
    for (const cJSON* a = node->child; a != NULL; a = a->next) {
        bool named = cJSON_IsObject(node); // an array's children have no names, and stand at its own path
        JsonValue v = json_member(source, path, node, named ? a->string : "");
        if (named && ++count > JSON_MAX_KEYS)
            return fail(err, EXIT_CONFIG, "%s: an object has more than %d keys", source->name, JSON_MAX_KEYS);
        for (const cJSON* b = a->next; named && b != NULL; b = b->next) {
            if (strcmp(a->string, b->string) != 0) continue;
            int again = json_line_of(source->text, source->size, json_path_in_text(&v), 2);
            if (again == 0) return fail_at(err, &v, " is given twice");
            return fail_at(err, &v, " is given twice, again in line %d", again);
        }
        if (!json_check_keys(a, named ? v.path : path, source, err)) return false;
    }
    return true;
}

// How much of text from position at on to show in a message: at most 24 bytes, up to the line's end.
static inline size_t json_shown(const char* text, size_t size, size_t at) {
    size_t n = 0;
    while (at + n < size && n <= 24 && (unsigned char)text[at + n] >= 32) n++;
    return n <= 24 ? n : json_cut(text + at, 24);
}

// Blanks comments, and finds what cJSON would not notice or would choke on.
static inline bool json_prepare(char* text, size_t size, const char* name, Error* err) {
    if (size > JSON_MAX_BYTES)
        return fail(err, EXIT_CONFIG, "%s: %zu bytes; a config has at most %d", name, size, JSON_MAX_BYTES);
    if (size >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
        return fail(err, EXIT_CONFIG, "%s:1: begins with a byte order mark; save it as UTF-8 without one",
                    name);
    if (!json_blank_comments(text, size, name, err)) return false;
    const char* nul = (const char*)memchr(text, '\0', size);
    size_t at = nul != NULL ? (size_t)(nul - text) : json_find_nul(text, size);
    if (at < size)
        return fail(err, EXIT_CONFIG, "%s:%d: a NUL character; a config is text", name,
                    json_line_at(text, at));
    at = (size_t)(utf8_skip((const uint8_t*)text, (const uint8_t*)text + size) - (const uint8_t*)text);
    if (at < size)
        return fail(err, EXIT_CONFIG, "%s:%d: byte 0x%02x is not UTF-8", name, json_line_at(text, at),
                    (unsigned char)text[at]);
    at = json_find_unclosed(text, size);
    if (at < size)
        return fail(err, EXIT_CONFIG,
                    "%s:%d: the text that begins with %.*s has no closing quote in its line", name,
                    json_line_at(text, at), (int)json_shown(text, size, at), text + at);
    if (json_depth(text, size) > JSON_MAX_DEPTH)
        return fail(err, EXIT_CONFIG, "%s: objects and arrays are nested more than %d deep", name,
                    JSON_MAX_DEPTH);
    return true;
}

// at: where cJSON stopped, which is one byte too far for a string that is wrong and for "}" instead of a key
static inline void fail_syntax(const char* text, size_t size, size_t at, const char* name, Error* err) {
    size_t before = at > 0 ? at - 1 : 0;
    while (before > 0 && json_is_space(text[before - 1])) before--;
    bool comma = at > 0 && text[at - 1] == '}' && before > 0 && text[before - 1] == ',';
    if (comma || (at > 0 && text[at - 1] == '"')) at--;
    while (at < size && json_is_space(text[at])) at++;
    if (at < size)
        fail(err, EXIT_CONFIG, "%s:%d: not JSON from here on: %.*s%s", name, json_line_at(text, at),
             (int)json_shown(text, size, at), text + at, comma ? " (a comma too many before it)" : "");
    else
        fail(err, EXIT_CONFIG, "%s:%d: the file ends inside an object, an array or a string", name,
             json_line_at(text, size));
}

// The object that source->text holds; text is the same memory, with a NUL behind its last byte: comments are
// blanked in it. NULL on failure; the caller deletes.
static inline cJSON* json_parse_object(char* text, const JsonSource* source, Error* err) {
    const char* name = source->name;
    size_t size = source->size, begin = 0;
    if (!json_prepare(text, size, name, err)) return NULL;
    while (begin < size && json_is_space(text[begin])) begin++;
    if (begin == size) {
        fail(err, EXIT_CONFIG, "%s is empty; an object, { ... }, is wanted", name);
        return NULL;
    }
    const char* stopped = NULL;
    cJSON* json = cJSON_ParseWithOpts(text, &stopped, 1);
    if (json == NULL)
        fail_syntax(text, size, stopped != NULL ? (size_t)(stopped - text) : size, name, err);
    else if (!cJSON_IsObject(json))
        fail(err, EXIT_CONFIG, "%s:%d: the top level must be an object, { ... }", name,
             json_line_at(text, begin));
    else if (json_check_keys(json, source->section, source, err))
        return json;
    cJSON_Delete(json);
    return NULL;
}

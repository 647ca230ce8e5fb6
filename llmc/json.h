// JSON for run configs and small files, on top of cJSON: comments, line numbers for messages, duplicate keys,
// and text escaped for what we write. cJSON itself knows no positions, so a line is found by walking the text
// a second time: only when there is something to complain about.
#pragma once
#include <cjson/cJSON.h>

#include "llmc/utils.h" // defines: Error, fail, String

enum { JSON_MAX_BYTES = 1 << 20, JSON_MAX_DEPTH = 32 };

// ----------------------------------------------------------------------------
// writing

static inline void json_append_string(String* out, const char* text) {
    string_append_bytes(out, "\"", 1);
    for (const unsigned char* c = (const unsigned char*)text; *c != '\0'; c++) {
        if (*c == '"' || *c == '\\') string_append(out, "\\%c", *c);
        else if (*c == '\n') string_append_bytes(out, "\\n", 2);
        else if (*c == '\t') string_append_bytes(out, "\\t", 2);
        else if (*c < 32 || *c == 127) string_append(out, "\\u%04x", *c);
        else string_append_bytes(out, c, 1);
    }
    string_append_bytes(out, "\"", 1);
}

// The shortest of %.15g, %.16g and %.17g that reads back as the same double.
static inline void json_append_number(String* out, double value) {
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    string_append(out, "%s", text);
}

// ----------------------------------------------------------------------------
// walking the text

// The end of the string literal that begins at text[i] == '"': the index behind its closing quote, or size.
static inline size_t json_skip_string(const char* text, size_t size, size_t i) {
    for (i++; i < size && text[i] != '"'; i++)
        if (text[i] == '\\') i++;
    return i < size ? i + 1 : size;
}

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
        } else i++;
    }
    return true;
}

// The line of the key `inner` of the object that is the value of `outer` (outer "" : of the top-level object);
// occurrence 2 finds the second of two equal keys. 0 when it is not there. Keys with escapes are not found.
static inline int json_line_of(const char* text, size_t size, const char* outer, const char* inner,
                               int occurrence) {
    const char* keys[JSON_MAX_DEPTH + 1] = {NULL};
    size_t lengths[JSON_MAX_DEPTH + 1] = {0};
    int depth = 0, wanted = outer[0] == '\0' ? 1 : 2;
    for (size_t i = 0; i < size;) {
        if (text[i] == '{' || text[i] == '[') depth++;
        if (text[i] == '}' || text[i] == ']') depth--;
        if (text[i] != '"' || depth < 0 || depth > JSON_MAX_DEPTH) {
            i++;
            continue;
        }
        size_t begin = i + 1, end = json_skip_string(text, size, i);
        i = end;
        while (i < size && strchr(" \t\r\n", text[i]) != NULL && text[i] != '\0') i++;
        if (i >= size || text[i] != ':') continue; // a value, not a key
        keys[depth] = text + begin, lengths[depth] = end - begin - 1;
        bool inside = depth == wanted && (wanted == 1 || (lengths[1] == strlen(outer) && keys[1] != NULL &&
                                                          memcmp(keys[1], outer, lengths[1]) == 0));
        if (inside && lengths[depth] == strlen(inner) && memcmp(keys[depth], inner, lengths[depth]) == 0 &&
            --occurrence == 0)
            return json_line_at(text, begin);
    }
    return 0;
}

static inline int json_depth(const char* text, size_t size) {
    int depth = 0, deepest = 0;
    for (size_t i = 0; i < size;) {
        if (text[i] == '"') {
            i = json_skip_string(text, size, i);
            continue;
        }
        if (text[i] == '{' || text[i] == '[') depth++;
        if (text[i] == '}' || text[i] == ']') depth--;
        deepest = depth > deepest ? depth : deepest;
        i++;
    }
    return deepest;
}

// ----------------------------------------------------------------------------
// reading

// An object from text, which is changed (comments are blanked). NULL on failure; the caller deletes.
static inline cJSON* json_parse_object(char* text, size_t size, const char* name, Error* err) {
    if (size > JSON_MAX_BYTES) {
        fail(err, EXIT_CONFIG, "%s: %zu bytes; a config has at most %d", name, size, JSON_MAX_BYTES);
        return NULL;
    }
    const char* nul = (const char*)memchr(text, '\0', size);
    if (nul != NULL) {
        fail(err, EXIT_CONFIG, "%s:%d: a NUL byte; a config is text", name, json_line_at(text, (size_t)(nul - text)));
        return NULL;
    }
    if (!json_blank_comments(text, size, name, err)) return NULL;
    if (json_depth(text, size) > JSON_MAX_DEPTH) {
        fail(err, EXIT_CONFIG, "%s: objects and arrays are nested more than %d deep", name, JSON_MAX_DEPTH);
        return NULL;
    }
    const char* stopped = NULL;
    cJSON* json = cJSON_ParseWithOpts(text, &stopped, 1);
    if (json == NULL) {
        size_t at = stopped != NULL && stopped >= text && stopped <= text + size ? (size_t)(stopped - text) : size;
        while (at < size && strchr(" \t\r\n", text[at]) != NULL) at++;
        char near[24] = {0};
        for (size_t i = 0; i < sizeof near - 1 && at + i < size && (unsigned char)text[at + i] >= 32; i++)
            near[i] = text[at + i];
        fail(err, EXIT_CONFIG, "%s:%d: not JSON from here on: %s%s", name, json_line_at(text, at),
             near[0] != '\0' ? near : "the end of the line or file", at >= size ? " (something is not closed)" : "");
        return NULL;
    }
    if (!cJSON_IsObject(json)) {
        cJSON_Delete(json);
        fail(err, EXIT_CONFIG, "%s: the top level must be an object: { ... }", name);
        return NULL;
    }
    return json;
}

// The first key that an object holds twice; NULL when all are different.
static inline const char* json_duplicate(const cJSON* object) {
    for (const cJSON* a = object->child; a != NULL; a = a->next)
        for (const cJSON* b = a->next; b != NULL; b = b->next)
            if (strcmp(a->string, b->string) == 0) return a->string;
    return NULL;
}

// Where keys come from: a file's text, and behind it the overrides of the command line ("section.key=value").
typedef struct {
    const char* name; // of the file
    const char* text;
    size_t size;
    int num_overrides;
    char** overrides;
} JsonSource;

// "FILE:LINE: section.key" or "command line: section.key", for messages. section "" is the top level; a key
// that is not there is named without a line. The result lives until the next call.
static inline const char* json_where_nth(const JsonSource* source, const char* section, const char* key,
                                         int occurrence) {
    static char where[512];
    const char* dot = section[0] != '\0' ? "." : "";
    char full[128];
    snprintf(full, sizeof full, "%s%s%s", section, dot, key);
    for (int i = 0; i < source->num_overrides; i++) {
        size_t n = strlen(full);
        if (strncmp(source->overrides[i], full, n) == 0 && source->overrides[i][n] == '=') {
            snprintf(where, sizeof where, "command line: %s", full);
            return where;
        }
    }
    int line = json_line_of(source->text, source->size, section, key, occurrence);
    if (line > 0) snprintf(where, sizeof where, "%.300s:%d: %s", source->name, line, full);
    else snprintf(where, sizeof where, "%.300s: %s", source->name, full);
    return where;
}
static inline const char* json_where(const JsonSource* source, const char* section, const char* key) {
    return json_where_nth(source, section, key, 1);
}

// What a value looks like in a message: at most 40 characters. The result lives until the next call.
static inline const char* json_show(const cJSON* value) {
    static char shown[48];
    char* text = cJSON_PrintUnformatted(value);
    snprintf(shown, sizeof shown, "%.40s%s", text != NULL ? text : "?",
             text != NULL && strlen(text) > 40 ? "..." : "");
    cJSON_free(text);
    return shown;
}

// Edits that turn a into b (Levenshtein's distance), for "did you mean"; names up to 63 characters.
static inline int edit_distance(const char* a, const char* b) {
    size_t n = strlen(a), m = strlen(b);
    int row[64];
    if (n > 63 || m > 63) return INT_MAX;
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

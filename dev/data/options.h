// Command-line options as a table: what a command understands, where each value goes, and the text of --help.
//
//   corpus COMMAND [--name VALUE | --name=VALUE | --flag]... OPERAND...     "--" ends the options
#pragma once
#include "llmc/utils.h" // defines: Error, fail, EXIT_*, realloc_check, strdup_check

// A list of strings that grows; owns them. Start from {0}.
typedef struct {
    char** items;
    size_t count, capacity;
} StringList;

static inline void string_list_add(StringList* list, const char* s) {
    if (list->count == list->capacity) {
        list->capacity = list->capacity * 2 + 16;
        list->items = (char**)realloc_check(list->items, list->capacity * sizeof *list->items);
    }
    list->items[list->count++] = strdup_check(s);
}

static inline void string_list_free(StringList* list) {
    for (size_t i = 0; i < list->count; i++) free(list->items[i]);
    free(list->items);
    memset(list, 0, sizeof *list);
}

enum OptionKind {
    OPTION_FLAG,     // bool*
    OPTION_STRING,   // const char**
    OPTION_STRINGS,  // StringList*, may be given again
    OPTION_NUMBER,   // uint64_t*, in [min, max]
    OPTION_FRACTION, // double*, in [0, 1)
};

typedef struct {
    const char* name; // "--out"
    int kind;         // an OptionKind
    void* value;
    const char* argument; // what to call the value in --help
    const char* help;
    uint64_t min, max; // of a number
    unsigned commands; // which take it: a bit for each
} Option;

// The number of single-character insertions, deletions and replacements between two names of at most 63.
static inline size_t edit_distance(const char* a, const char* b) {
    size_t row[64], n = strnlen(b, 63);
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 1; i <= strnlen(a, 63); i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            size_t shifted = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = replaced < shifted ? replaced : shifted;
        }
    }
    return row[n];
}

static inline bool parse_number(const char* text, uint64_t* number) {
    char* end;
    errno = 0;
    unsigned long long parsed = strtoull(text, &end, 10);
    *number = parsed;
    return text[0] >= '0' && text[0] <= '9' && *end == '\0' && errno == 0;
}

static inline bool option_store(const Option* option, const char* text, Error* err) {
    if (option->kind == OPTION_STRING) *(const char**)option->value = text;
    if (option->kind == OPTION_STRINGS) string_list_add((StringList*)option->value, text);
    if (option->kind == OPTION_NUMBER) {
        uint64_t number;
        if (!parse_number(text, &number) || number < option->min || number > option->max)
            return fail(err, EXIT_USAGE, "%s %s: must be a whole number from %llu to %llu", option->name,
                        text, (unsigned long long)option->min, (unsigned long long)option->max);
        *(uint64_t*)option->value = number;
    }
    if (option->kind == OPTION_FRACTION) {
        char* end;
        double fraction = strtod(text, &end);
        if (end == text || *end != '\0' || !(fraction >= 0 && fraction < 1))
            return fail(err, EXIT_USAGE, "%s %s: must be a number in [0, 1)", option->name, text);
        *(double*)option->value = fraction;
    }
    return true;
}

static inline bool unknown_option(const Option* options, int count, unsigned command, const char* name,
                                  Error* err) {
    const char* nearest = NULL;
    for (int i = 0; i < count; i++)
        if ((options[i].commands & command) != 0 &&
            (nearest == NULL || edit_distance(name, options[i].name) < edit_distance(name, nearest)))
            nearest = options[i].name;
    if (nearest == NULL) return fail(err, EXIT_USAGE, "unknown option %s; this command takes none", name);
    return fail(err, EXIT_USAGE, "unknown option %s; the nearest valid one is %s (see --help)", name,
                nearest);
}

// Stores the options of `command` (one bit) found in arguments and collects the rest as operands.
static inline bool parse_options(const Option* options, int count, unsigned command, int num_arguments,
                                 char** arguments, StringList* operands, Error* err) {
    bool only_operands = false;
    for (int i = 0; i < num_arguments; i++) {
        char* name = arguments[i];
        if (only_operands || name[0] != '-' || name[1] == '\0') {
            string_list_add(operands, name);
            continue;
        }
        only_operands = strcmp(name, "--") == 0;
        if (only_operands) continue;
        char* value = strchr(name, '=');
        if (value != NULL) *value++ = '\0';
        const Option* option = NULL;
        for (int k = 0; k < count; k++)
            if ((options[k].commands & command) != 0 && strcmp(name, options[k].name) == 0)
                option = &options[k];
        if (option == NULL) return unknown_option(options, count, command, name, err);
        if (option->kind == OPTION_FLAG) {
            if (value != NULL) return fail(err, EXIT_USAGE, "%s takes no value", name);
            *(bool*)option->value = true;
            continue;
        }
        if (value == NULL && ++i < num_arguments) value = arguments[i];
        if (value == NULL)
            return fail(err, EXIT_USAGE, "%s needs a value: %s %s", name, name, option->argument);
        if (!option_store(option, value, err)) return false;
    }
    return true;
}

static inline void print_options(const Option* options, int count, unsigned command, FILE* out) {
    for (int i = 0; i < count; i++) {
        char left[64];
        if ((options[i].commands & command) == 0) continue;
        snprintf(left, sizeof left, "%s %s", options[i].name, options[i].argument);
        fprintf(out, "  %-28s %s\n", left, options[i].help);
    }
}

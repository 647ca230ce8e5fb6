// For tests of what a program reads from its environment.
#pragma once
#include "llmc/utils.h" // defines: strdup_check

// Nothing stays but what tells cmocka how to report.
static inline void clear_environment(void) {
    const char* output = getenv("CMOCKA_MESSAGE_OUTPUT");
    char* copy = output != NULL ? strdup_check(output) : NULL;
    clearenv();
    if (copy != NULL) setenv("CMOCKA_MESSAGE_OUTPUT", copy, 1);
    free(copy);
}

// Every layer in double: the same source as the fp32 program, so that a wrong formula cannot hide in
// rounding.
#define REAL double
#include "dev/test/layers_cases.h" // defines: LAYER_CASES

int main(void) {
    const struct CMUnitTest tests[] = {LAYER_CASES};
    return cmocka_run_group_tests_name("layers_gradients", tests, NULL, NULL);
}

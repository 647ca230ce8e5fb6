// Positions of the ranks that share sequences.
#include "llmc/positions.h" // defines: Positions, positions_of, position_at, first_row_at
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

static void each_position_is_of_one_rank(void** state) {
    (void)state;
    for (int cp_size = 1; cp_size <= 5; cp_size++)
        for (int chunk = 1; chunk <= 7; chunk += 3) {
            int T = 2 * cp_size * chunk, *owners = calloc((size_t)T, sizeof *owners);
            for (int cp = 0; cp < cp_size; cp++) {
                Positions at = positions_of(T, cp, cp_size);
                for (int row = 0, before = -1; row < T / cp_size; row++) {
                    int position = position_at(at, row);
                    assert_in_range(position, before + 1, T - 1); // later rows have later positions
                    owners[position]++, before = position;
                }
            }
            for (int p = 0; p < T; p++) assert_int_equal(owners[p], 1);
            free(owners);
        }
}

static void two_chunks_of_three_ranks(void** state) {
    const int expected[3][4] = {{0, 1, 10, 11}, {2, 3, 8, 9}, {4, 5, 6, 7}};
    (void)state;
    for (int cp = 0; cp < 3; cp++)
        for (int row = 0; row < 4; row++)
            assert_int_equal(position_at(positions_of(12, cp, 3), row), expected[cp][row]);
}

static void every_rank_has_the_same_work(void** state) {
    (void)state;
    for (int cp_size = 2; cp_size <= 5; cp_size++) {
        int T = 2 * cp_size * 9, all = T * (T + 1) / 2; // pairs of a query and a key that it sees
        for (int cp = 0; cp < cp_size; cp++) {
            Positions at = positions_of(T, cp, cp_size);
            int pairs = 0;
            for (int row = 0; row < T / cp_size; row++) pairs += position_at(at, row) + 1;
            assert_int_equal(pairs * cp_size, all);
        }
    }
}

// As a search would find it.
static void the_first_row_at_a_position(void** state) {
    (void)state;
    for (int cp_size = 1; cp_size <= 4; cp_size++)
        for (int cp = 0, T = 2 * cp_size * 5, rows = T / cp_size; cp < cp_size; cp++) {
            Positions at = positions_of(T, cp, cp_size);
            for (int position = 0; position <= T; position++) {
                int row = 0;
                while (row < rows && position_at(at, row) < position) row++;
                assert_int_equal(first_row_at(at, position), row);
            }
        }
}

static void one_rank_has_a_row_for_each_position(void** state) {
    Positions at = positions_of(7, 0, 1); // odd, too
    (void)state;
    for (int i = 0; i <= 7; i++) {
        assert_int_equal(position_at(at, i), i);
        assert_int_equal(first_row_at(at, i), i);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_position_is_of_one_rank),         cmocka_unit_test(two_chunks_of_three_ranks),
        cmocka_unit_test(every_rank_has_the_same_work),         cmocka_unit_test(the_first_row_at_a_position),
        cmocka_unit_test(one_rank_has_a_row_for_each_position),
    };
    return cmocka_run_group_tests_name("positions", tests, NULL, NULL);
}

# Sourced by the tests of the matrix of layouts, e2e_verify*.sh: each layout computes what one process does, and what the
# contract calls bitwise is equal to the bit (dev/doc/numerics.md). They are two, so that they run beside each other.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
. dev/test/small_corpus.sh

# verify NAME CONFIG LAYOUTS [KEY=VALUE ...]
verify() {
    local name=$1 config=$2 layouts=$3 line
    shift 3
    "$program" verify "configs/$config.json" "$layouts" "${data[@]}" "log.run_dir=$work/$name" \
        parallel.start_timeout=100 "$@" >"$work/$name.out" 2>"$work/$name.err" || cat "$work/$name.err" >&2
    for layout in ${layouts//,/ }; do
        line=$(grep -E "^$layout +" "$work/$name.out")
        check "$name, $layout: $(echo "$line" | tr -s ' ' | cut -d' ' -f4-)" grep -qE "^$layout +.* pass" "$work/$name.out"
    done
}
bitwise() { # NAME LAYOUT ...: they were equal to one process to the bit
    local name=$1
    shift
    for layout in "$@"; do
        check "$name, $layout is one process to the bit" grep -qE "^$layout .*equal to the bit" "$work/$name.out"
    done
}

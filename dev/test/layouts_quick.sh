#!/usr/bin/env bash
# A few layouts that between them use every collective, every wait and every scale, in drawn orders, too: what a
# mutation of them must not survive. Stops at the first failure.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
. dev/test/small_corpus.sh
quick() { # SEED CONFIG LAYOUTS [KEY=VALUE ...]
    local seed=$1 config=$2 layouts=$3
    shift 3
    EMU_SEED=$seed "$program" verify "configs/$config.json" "$layouts" "${data[@]}" \
        log.run_dir="$work/run" parallel.start_timeout=30 schedule.max_steps=4 "$@"
    rm -rf "$work/run"
}
quick 1 tiny_llama dp2z0,dp2,dp2z2,dp2z3,tp4,pp3,pp2vp2,dp2tp2pp2 model.num_hidden_layers=4 batch.recompute=block
quick 6 tiny_llama dp2tp2pp2zb,pp4zb,cp2,dp2cp2,cp2pp3 model.num_hidden_layers=4 data.document_mask=true
quick 2 tiny_gpt2 dp2z3,tp2,tp2pp2,pp3afab,dp2tp2z2 model.n_layer=4
for seed in 3 4 5; do quick $seed tiny_gpt2 dp2,dp2tp2,dp2pp2z3,tp4,pp4 model.n_layer=5; done

#!/usr/bin/env bash
# Layouts of a Llama, and what verify refuses: dev/test/verify_layouts.sh.
. "$(dirname "$0")/verify_layouts.sh"

verify llama tiny_llama dp2,tp2,tp4,pp2,pp4,afab,pp2afab,pp2vp2,dp2z3,tp2dp2z2,tp4pp2,dp2tp2pp2,dp2tp2pp2det,tp2pp2vp2 \
    model.num_hidden_layers=6 batch.recompute=block data.document_mask=true
bitwise llama pp2 pp4 pp2afab pp2vp2
verify context_llama tiny_llama cp2,cp3,cp4pp2,cp2pp2vp2,cp2pp2zb,tp2cp2pp2 model.num_hidden_layers=4 data.document_mask=true
verify recomputed tiny_llama cp2,tp4cp2,cp2pp2 model.num_hidden_layers=4 batch.recompute=block data.document_mask=true
verify zero_bubble tiny_llama pp2zb,pp4zb,tp2pp2zb,dp2pp2zb model.num_hidden_layers=6
bitwise zero_bubble pp2zb pp4zb
verify bf16 tiny_llama dp2,tp2,pp2,pp2zb,dp2z2 model.num_hidden_layers=4 precision.gradients=bf16 precision.moments=bf16 \
    precision.master_weights=bf16
bitwise bf16 pp2 pp2zb

# What is not to be: the runs of an earlier verify count for nothing, the layout of the config neither, and what cannot
# run is said before anything trains.
small=(schedule.max_steps=1 schedule.warmup_steps=0 model.num_hidden_layers=2)
verify used tiny_llama dp2 "${small[@]}"
verify used tiny_llama dp4,tp3 "${small[@]}" parallel.automatic=true parallel.pipeline_parallel_size=2
refused() { # CODE 'regular expression' LAYOUTS
    timeout 60 "$program" verify configs/tiny_llama.json "$3" "${data[@]}" "${small[@]}" "log.run_dir=$work/refused" >"$work/refused.out" 2>&1
    [ $? -eq "$1" ] && grep -qE -- "$2" "$work/refused.out" && [ ! -d "$work/refused/verify" ] || { cat "$work/refused.out"; return 1; }
}
check "no ranks" refused 64 'layout cp0: cp0 is not possible: 1 or more' cp0
check "no such ZeRO" refused 64 'z0 to z3' z4
check "too many ranks" refused 64 'dp99tp99 has 9801 processes' dp99tp99
check "too few layers for it" refused 78 'layout pp4: a pipeline of 4 stages' dp2,pp4
finish

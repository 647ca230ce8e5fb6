#!/usr/bin/env bash
# Layouts of a GPT-2: dev/test/verify_layouts.sh.
. "$(dirname "$0")/verify_layouts.sh"

verify gpt2 tiny_gpt2 dp2,dp4,tp2,tp4,pp2,pp3,dp2z0,dp2z2,dp2z3,dp2det,dp2tp2,dp2pp2,tp2pp2,tp2pp2afab,pp2vp2,pp3zb,dp2pp2z2,dp2pp2z3,dp2tp2z3,dp2tp2pp2,dp2tp2pp2zb \
    model.n_layer=6
verify context_gpt2 tiny_gpt2 cp2,cp4,dp2cp2,tp2cp2,cp2pp2,cp2z0,cp2z2,cp2z3,cp2det,dp2tp2cp2 model.n_layer=4
finish

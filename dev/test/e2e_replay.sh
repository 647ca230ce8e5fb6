#!/usr/bin/env bash
# Steps that are computed twice (guard.replay_every), on the emulated trainer in all kinds of layouts: a sound run finds
# nothing and has the bits of one without it; of one flipped bit on one rank (dev/test/faulty.h), in either run of the step,
# the rank is named, and no rank applies the step.
#
#   dev/test/e2e_replay.sh [LAYOUT ...]     all by default; what is done about a fault is tested with dp_pp
set -u
. "$(dirname "$0")/tap.sh"
steps=6 chosen=" ${*:-one graph zero3 tp cp pp dp_pp bubble deterministic tp_cp interleaved tied} "
. dev/test/faulty.sh
check "the faulty trainer is built" test -x "$work/faulty_gpu"
# Attention is called so often in a stage's step of 8 sequences: layers, times sequences of a rank.
p=parallel tp=$p.tensor_parallel_size=2 pp=$p.pipeline_parallel_size=2 cp=$p.context_parallel_size=2

# layout NAME RANKS "FAULTY-RANK ..." CALLS-IN-A-RUN [KEY=VALUE ...]
# Every step twice: the same bits as without, state.json included, and nothing is found. Then a fault in step 5, behind the
# CALL-th call of a function, in its first run or its second.
layout() {
    local layout=$1 ranks=$2 calls=$4 run=("${@:5}") rank bad fault name
    place=$layout
    [ "${chosen/ $layout /}" != "$chosen" ] || return
    FAULT_TRACE=$work/rows.$place check "$layout: as it is" train "$layout" "$ranks" "${run[@]}"
    name=$layout.twice
    check "$layout: every step twice, weights compared, layers measured" train "$name" "$ranks" "${run[@]}" guard.{replay_every,check_every}=1 log.layers_every=1
    check "$layout: the same bits" same "$layout" "$name"
    check "$layout: there is no alarm" [ "$(events)" -eq 0 ]
    for rank in $3; do
        bad=$(rows "$rank" 5) # the last function of stage 0 of two is a sum, which it hands on
        for fault in "forward 1" "attention $((calls + 2))" "matrix 3" "stream $((2 * calls + 1))"; do
            name=$layout.$rank.${fault/ /.}
            FAULT="$bad $fault" FAULT_RANK=$rank check "$layout, rank $rank: $fault" train "$name" "$ranks" "${run[@]}" guard.replay_every=5
            check "$layout, rank $rank: $fault: named in step 5, which is left out" [ "$(events) $(state "$name" skipped_steps) $(events \
                ".*\"step\":5,\"what\":\"replay\",\"policy\":\"skip\",\"action\":\"skipped\",\"ranks\":\"$rank\"}")" = "1 1 1" ]
            rm -rf "${work:?}/$name"
        done
    done
}

four=(model.num_hidden_layers=4)
layout one 1 0 16
layout graph 1 "" 0 $p.cuda_graph=true
layout zero3 2 1 8 $p.zero_stage=3
layout tp 2 1 16 $tp
layout cp 2 1 16 $cp
layout pp 2 "0 1" 8 $pp
layout dp_pp 4 "1 2" 4 $pp $p.zero_stage=2 batch.recompute=norm
layout bubble 4 1 8 $tp $pp $p.pipeline_schedule=zero_bubble
layout deterministic 4 "" 0 $p.deterministic=true
layout tp_cp 4 "" 0 $tp $cp $p.zero_stage=0 batch.recompute=block
layout interleaved 4 "" 0 $tp $pp $p.pipeline_schedule=interleaved $p.virtual_pipeline_size=2 "${four[@]}"
layout tied 4 "" 0 $tp $pp model.tie_word_embeddings=true

# What is done about it: rank 2 is the second stage of the first replica.
twice=(guard.replay_every=5)
planned=$("$work/faulty_gpu" plan configs/tiny_llama.json "${data[@]}" "${small[@]}" log.run_dir=run "${twice[@]}" | awk '/^  total/ { gsub(",", "", $2); print $2 }')
EMU_MEMORY=$planned check "the memory that is planned ($planned bytes) does" train exact 1 "${twice[@]}"
EMU_MEMORY=$((planned - 1)) check "a byte less does not: exit 71" ends 71 "this run needs" train less 1 "${twice[@]}"
[ "${chosen/ dp_pp /}" != "$chosen" ] || finish
place=dp_pp run=(4 $pp $p.zero_stage=3 checkpoint.every=2)
bad=$(rows 2 5)
FAULT="$bad loss nan" check "another run leaves out step 5" train left_out "${run[@]}"
check "another has no fault" train clean "${run[@]}"
export FAULT="$bad forward 6" FAULT_RANK=2
check "skip" train skip "${run[@]}" "${twice[@]}"
check "has the weights without that step" same_tensors left_out skip
check "warn" train warn "${run[@]}" "${twice[@]}" guard.policy=warn
check "applies nothing either" same_tensors left_out warn
check "rewind" train rewind "${run[@]}" "${twice[@]}" guard.policy=rewind
check "goes back to the checkpoint and on with the same data" \
    grep -q '"event":"rewind",.*"step":4,"from_step":5,"row":32,"rewinds":1' "$work/rewind/log.jsonl"
check "and has the weights of the run without a fault" same_tensors clean rewind
check "stop: exit 70" ends 70 "is not the same: rank 2 in step 5: guard.policy" train stop "${run[@]}" "${twice[@]}" guard.policy=stop
check "and the step is not saved" [ "$(ls "$work/stop/checkpoints" | tail -n 1)" = step_00000004 ]
check "one skipped step in a row may be one too many: exit 70" ends 70 "in which the step was computed twice and is not the same: rank 2;" \
    train skipped "${run[@]}" "${twice[@]}" guard.max_skipped_steps=1
name=blind
check "a step that is computed once" train blind "${run[@]}" guard.replay_every=4
check "says nothing" [ "$(events)" -eq 0 ]
finish

#!/usr/bin/env bash
# What a run says of itself: every field of log.jsonl documented, goodput over launches, TensorBoard's files, the
# GPU's figures from an NVML that works, fails, hangs or is half there, terminals, and sinks that are full or closed.
set -u
. "$(dirname "$0")/tap.sh"
export OMP_NUM_THREADS=1
program=./train_gpt_emu
TRAIN_GPT=$program
. dev/test/small_corpus.sh
if ! command -v python3 >/dev/null; then
    skip_test "telemetry" "there is no python3"
    finish
fi
small=("${data[@]}" schedule.max_steps=12 schedule.warmup_steps=2 sample.max_new_tokens=4)

cpu() { # RUN_DIR [key=value ...]
    local run=$1
    shift
    ./train_gpt_cpu configs/tiny_llama.json "${small[@]}" "log.run_dir=$work/$run" "$@"
}
gpu() { # FAKE_NVML RUN_DIR [key=value ...]: on the emulator, with the driver's library in that state
    local mode=$1 run=$2
    shift 2
    FAKE_NVML=$mode LD_LIBRARY_PATH=$work/${LIBRARY:-nvml} timeout -k 10 100 dev/emu/launch -n "${RANKS:-1}" $program \
        configs/tiny_llama.json "${small[@]}" batch.micro_batch_size=1 batch.global_batch_size=2 batch.sequence_length=32 \
        eval.batches=1 "log.run_dir=$work/$run" "$@"
}

# ----------------------------------------------------------------------------
# NVML: a library that says what it is told to

cat >"$work/nvml.c" <<'END'
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef unsigned long long u64;
static int mode(const char* name) { return strcmp(getenv("FAKE_NVML"), name) == 0; }
static int answer(void) { return mode("fail") ? 3 : 0; }
int nvmlInit_v2(void) {
    while (mode("hang at init")) pause();
    return mode("no init") ? 9 : 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) {
    *device = (void*)7;
    return strcmp(bus, "00000000:00:00.0") == 0 ? 0 : 6;
}
int nvmlDeviceGetTemperature(void* device, int sensor, unsigned* out) {
    while (mode("hang") || (mode("hang beside") && device == (void*)9)) pause();
    *out = 41;
    return device == (void*)7 && sensor == 0 ? 0 : 2; // the one figure that does not fail
}
#ifndef LACKS
// Four GPUs: this process's, one that fell off the bus, and two that tell their power and nothing else.
int nvmlDeviceGetCount_v2(unsigned* count) { return *count = 4, answer(); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { return *device = (char*)7 + index, index == 1 ? 15 : 0; }
int nvmlDeviceGetPowerUsage(void* device, unsigned* out) {
    int beside = (char*)device - (char*)7;
    return *out = 350250 + 1000 * beside, beside == 0 || beside == 2 || beside == 3 ? answer() : 2;
}
int nvmlDeviceGetClockInfo(void* device, int clock, unsigned* out) {
    return *out = 1000 * clock, device == (void*)7 && (clock == 1 || clock == 2) ? answer() : 2;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void* device, u64* out) {
    return *out = 4 | 64, device == (void*)7 ? answer() : 2;
}
int nvmlDeviceGetTotalEccErrors(void* device, int type, int counter, u64* out) {
    return *out = 10 + type, device == (void*)7 && counter == 0 ? answer() : 2;
}
int nvmlDeviceGetMemoryInfo(void* device, u64* total_free_used) {
    total_free_used[0] = 80, total_free_used[1] = 50, total_free_used[2] = 30;
    return device == (void*)7 ? answer() : 2;
}
#endif
END
mkdir "$work/nvml" "$work/lacking" "$work/none" "$work/rubbish"
${CC:-cc} -shared -fPIC -o "$work/nvml/libnvidia-ml.so.1" "$work/nvml.c" || exit 70
${CC:-cc} -shared -fPIC -DLACKS -o "$work/lacking/libnvidia-ml.so.1" "$work/nvml.c" || exit 70
echo "no library" >"$work/rubbish/libnvidia-ml.so.1"

# figures RUN_DIR 'key:value ...': what the run's last step line says of the GPU, in the order of the line
figures() {
    local got
    got=$(grep '"event":"step"' "$work/$1/log.jsonl" | tail -n 1 | grep -oE '"gpu_[a-z_]+":[0-9.]+' | tr -d '"' | tr '\n' ' ')
    [ "$got" = "${2:+$2 }" ] || ! echo "got: $got"
}
all="gpu_power_watts:350.25 gpu_temperature_celsius:41 gpu_sm_clock_mhz:1000 gpu_memory_clock_mhz:2000"
all="$all gpu_throttle_reasons:68 gpu_ecc_corrected:10 gpu_ecc_uncorrected:11 gpu_memory_used_bytes:30"
for steps in 5 10; do # the second goes on
    EMU_NAME="NVIDIA H100 80GB HBM3" RANKS=2 check "two ranks train beside NVML to step $steps" gpu ok gpu \
        batch.recompute=block schedule.max_steps=$steps
done
check "every figure is in the log" figures gpu "$all"
check "and in metrics.prom" grep -qx 'pretrain_gpu_power_watts 350.25' "$work/gpu/metrics.prom"
node=$(uname -n)
for figure in ${all//:/ }; do
    case $figure in
    gpu_*) key=node_$figure && echo "# TYPE pretrain_$key gauge" ;;
    350.25) printf "pretrain_$key{node=\"$node\",gpu=\"%d\"} %s\n" 0 350.25 2 352.25 3 353.25 ;;
    *) echo "pretrain_$key{node=\"$node\",gpu=\"0\"} $figure" ;;
    esac
done >"$work/node.prom"
check "those of all GPUs of the node are in a file of the node's" diff "$work/gpu/metrics_$node.0.prom" "$work/node.prom"
only() { [ "$(cd "$work/$1" && echo metrics[._]*)" = "$2" ] || (ls "$work/$1" && false); } # RUN_DIR FILES
check "by one rank" only gpu "metrics.prom metrics_$node.0.prom"
printf '#!/bin/bash\nLOCAL_RANK=0 LOCAL_WORLD_SIZE=1 exec %s "$@"\n' "$program" >"$work/node_of_its_own"
chmod +x "$work/node_of_its_own"
RANKS=2 program=$work/node_of_its_own check "two nodes of one name train" gpu ok nodes schedule.max_steps=3
check "and have a file each" only nodes "metrics.prom metrics_$node.0.prom metrics_$node.1.prom"
mkdir -p "$work/taken/metrics_$node.0.prom"
gpu ok taken schedule.max_steps=3 >"$work/taken.out" 2>&1
check "a file that cannot be written: the run is done" [ $? -eq 0 ]
check "and it is said once" [ "$(grep -c "cannot write $work/taken/metrics_" "$work/taken.out")" -eq 1 ]
check "and metrics.prom is there" [ -s "$work/taken/metrics.prom" ]
check "the CPU program asks for none" env FAKE_NVML=ok LD_LIBRARY_PATH="$work/nvml" ./train_gpt_cpu configs/tiny_llama.json \
    "${small[@]}" "log.run_dir=$work/cpu_nvml" schedule.max_steps=3
check "and logs none" figures cpu_nvml ""
for mode in "fail:gpu_temperature_celsius:41" "no init:" "hang at init:" "hang:" "hang beside:$all"; do
    name=${mode%%:*}
    check "NVML in state '$name': the run is done" gpu "$name" "gpu.$name" schedule.max_steps=3
    check "and logs what it got" figures "gpu.$name" "${mode#*:}"
done
for LIBRARY in lacking none rubbish; do
    check "a library that is $LIBRARY: the run is done" gpu ok "gpu.$LIBRARY" schedule.max_steps=3
done
check "of one that lacks functions the others count" figures gpu.lacking gpu_temperature_celsius:41
check "there is nothing of none" figures gpu.none ""
check "nor is there a file of its node's" only gpu.none "metrics.prom"
check "a hanging NVML leaves the weights as they are" ./train_gpt_cpu checkpoint diff \
    "$work/gpu.hang/checkpoints/step_00000003" "$work/gpu.none/checkpoints/step_00000003"

# ----------------------------------------------------------------------------
# the log and its document

check "a run with all there is" cpu all log.tensorboard=true eval.every=4 checkpoint.every=5 checkpoint.keep_last=9 sample.every=6 \
    log.layers_every=3
rm -r "$work"/all/checkpoints/step_0000001[02] # as if it had been killed behind step 5
check "goes on from an earlier step" cpu all log.tensorboard=true eval.every=4 checkpoint.every=5 log.every=3
(exec ./train_gpt_cpu configs/tiny_llama.json "${small[@]}" schedule.max_steps=1000000 "log.run_dir=$work/all") >/dev/null 2>&1 &
pid=$!
until grep -q '"step":15,' "$work/all/log.jsonl" || ! kill -0 $pid; do sleep 0.02; done
kill -TERM $pid
wait $pid
check "and is stopped by a signal" [ $? -eq 75 ]
cat >"$work/schema.py" <<'END'
"""Every field that the runs have written is in the document, and every one in the document was written. `rare`: what
only a fault or a longer run brings about, in other tests."""
import json, re, sys
written, documented = set(), set()
rare = {"guard", "rewind", "lost", "rank_seconds_min", "rank_seconds_median", "rank_seconds_max", "slowest_rank"}
for path in sys.argv[2:]:
    for line in open(path):
        event = json.loads(line)
        written |= {(event["event"], key) for key in event if key not in ("event", "time", "step")}
for line in open(sys.argv[1]):
    row = re.fullmatch(r"\| (`[^|]*`) \| (`[^|]*`) \|.*\|\n", line)
    if row:
        events, fields = (re.findall(r"`([a-z_]+)`", cell) for cell in row.groups())
        documented |= {(e, f) for e in events for f in fields}
written, documented = ({(e, f) for e, f in seen if not {e, f} & rare} for seen in (written, documented))
assert len(documented) > 40
for title, difference in (("not documented", written - documented), ("never written", documented - written)):
    if difference:
        sys.exit(f"{title}: {sorted(difference)}")
END
check "log.jsonl is what dev/doc/formats.md says" python3 "$work/schema.py" dev/doc/formats.md "$work/all/log.jsonl" "$work/gpu/log.jsonl"

check "layers are measured more often than steps are logged" cpu layers log.every=9 log.layers_every=5
said() { sed -n "s/^{\"event\":\"$1\",[^}]*\"step\":\([0-9]*\),.*/\1/p" "$work/layers/log.jsonl" | tr '\n' ' '; }
check "where they are, there is a line for each" [ "$(said layers)" = "5 10 " ]
check "and the step's" [ "$(said step)" = "5 9 10 12 " ]

cat >"$work/goodput.py" <<'END'
"""What counts is the time of the steps that were kept; the last line at a resume's step or before it says how much. In all
runs the parts of an interval are most of it, and not more."""
import json, sys
def check_parts(e):
    parts = [e[k] for k in ("compute_seconds", "exposed_comm_seconds", "data_seconds", "checkpoint_stall_seconds", "eval_seconds",
                            "sample_seconds")]
    assert min(parts) >= 0 and sum(parts) <= e["interval_seconds"] + 1e-5, e
    return sum(parts), e["interval_seconds"]
for path in sys.argv[2:]:
    steps = [check_parts(e) for e in map(json.loads, open(path)) if e["event"] == "step"]
    parts, seconds = map(sum, zip(*steps))
    assert parts > 0.7 * seconds, (path, parts, seconds)
events = [json.loads(line) for line in open(sys.argv[1])]
resumes = [i for i, e in enumerate(events) if e["event"] == "resume"]
assert [events[i]["step"] for i in resumes] == [5, 12], resumes
for i in resumes:
    before = [e for e in events[:i] if "productive_seconds" in e and e["step"] <= events[i]["step"]]
    assert events[i]["productive_seconds"] == before[-1]["productive_seconds"], events[i]
last = {}  # of the first two launches every step line of the first up to 5, then all steps of the second
first = sum(e["step_seconds"] for e in events[: resumes[0]] if e["event"] == "step" and e["step"] <= 5)
assert abs(events[resumes[0]]["productive_seconds"] - first) < 1e-6 * first
assert events[resumes[1]]["productive_seconds"] > first
stop = events[-1]
assert stop["event"] == "stop" and stop["reason"] == "signal"
for e in events:
    if "goodput" in e:
        wall = e["time"] - events[0]["time"]
        assert abs(e["goodput"] * wall - e["productive_seconds"]) < 0.02 + 0.05 * wall and 0 < e["goodput"] <= 1, e
    if e["event"] == "step":
        check_parts(e)
assert all(events[resumes[0] - 1]["time"] <= e["time"] for e in events[resumes[0]:])
after = {e["step"]: e for e in events[: resumes[0]] if e["event"] == "step"}
assert after[5]["eval_seconds"] > 0.0001 and after[4]["eval_seconds"] == 0  # said on the line behind it
assert after[6]["checkpoint_stall_seconds"] > 0.0001 and after[5]["checkpoint_stall_seconds"] == 0
assert after[7]["sample_seconds"] > 0.0001
END
check "productive time and goodput add up over launches" python3 "$work/goodput.py" "$work/all/log.jsonl" "$work/gpu/log.jsonl"

cat >"$work/rates.py" <<'END'
import json, sys
events = [json.loads(line) for line in open(sys.argv[1])]
start, step = events[0], [e for e in events if e["event"] == "step"][-1]
assert start["processes"] == start["data_parallel_size"] == 2 and start["device"].startswith("NVIDIA H100")
assert start["precision"] == "bf16" and start["peak_flops_per_gpu"] == 989.4e12
def close(a, b):
    assert abs(a - b) < 1e-6 * abs(b), (a, b)
close(step["gflops"] * 1e9, step["tokens_per_second"] * start["flops_per_token"])
close(step["mfu"], step["gflops"] * 1e9 / start["peak_flops_per_gpu"] / 2)
close(step["hfu"] / step["mfu"], 1 + start["recomputed_flops_per_token"] / start["flops_per_token"])
assert step["hfu"] > 1.05 * step["mfu"]
assert step["exposed_comm_seconds"] > 0 and step["update_bytes_per_second"] > 0
close(step["tokens_per_second_per_gpu"] * 2, step["tokens_per_second"])
END
check "utilisation is that of both GPUs together" python3 "$work/rates.py" "$work/gpu/log.jsonl"

# ----------------------------------------------------------------------------
# TensorBoard

cat >"$work/tensorboard.py" <<'END'
"""Reads event files with nothing but the standard library: frames, checksums, and each number as the log has it."""
import glob, json, struct, sys
table = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    table.append(n)
def masked(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
def records(data):
    while data:
        size, check = struct.unpack("<QI", data[:12])
        assert check == masked(data[:8])
        assert struct.unpack("<I", data[12 + size:16 + size])[0] == masked(data[12:12 + size])
        yield data[12:12 + size]
        data = data[16 + size:]
def varint(data):
    value = shift = 0
    while True:
        value, shift, data, byte = value | (data[0] & 127) << shift, shift + 7, data[1:], data[0]
        if byte < 128:
            return value, data
def fields(data):
    while data:
        key, data = varint(data)
        if key & 7 == 0:
            value, data = varint(data)
        else:
            size, data = varint(data) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], data)
            value, data = data[:size], data[size:]
        yield key >> 3, value
found = []
files = sorted(glob.glob(sys.argv[1] + "/tensorboard/events.out.tfevents.*"))
for path in files:
    events = [dict(fields(record)) for record in records(open(path, "rb").read())]
    assert events[0][3] == b"brain.Event:2" and events[1][7] == b"\x08\x01"
    for event in events[2:]:
        assert event[2] >= events[1][2]
        time, = struct.unpack("<d", event[1])
        for number, value in fields(event[5]):
            assert number == 1
            scalar = dict(fields(value))
            found.append((time, event[2], scalar[1].decode(), struct.unpack("<f", scalar[2])[0]))
expected = []
for line in open(sys.argv[1] + "/log.jsonl"):
    e = json.loads(line)
    if e["event"] in ("step", "eval") and e["step"] <= 12:
        expected += [(e["time"], e["step"], e["event"] + "/" + k, v) for k, v in e.items() if k not in ("event", "time", "step")]
    if e["event"] == "layers" and e["step"] <= 12:
        expected += [(e["time"], e["step"], f"layers/{k}/{i}", v) for k, a in e.items() if isinstance(a, list) for i, v in enumerate(a)]
assert len(files) == 2 and len(found) == len(expected) > 100, (len(files), len(found), len(expected))
for f, e in zip(sorted(found), sorted(expected)):
    assert f[:3] == e[:3] and abs(f[3] - e[3]) <= 1e-6 * abs(e[3]), (f, e)
END
check "the event files have the log's numbers, and right checksums" python3 "$work/tensorboard.py" "$work/all"
check "without log.tensorboard there are none" [ ! -e "$work/cpu_nvml/tensorboard" ]

# ----------------------------------------------------------------------------
# people

cat >"$work/terminal.py" <<'END'
"""Runs a command on a terminal of its own and prints what it shows."""
import os, pty, sys
pid, fd = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
shown = b""
try:
    while data := os.read(fd, 4096):
        shown += data
except OSError:
    pass
sys.stdout.buffer.write(shown.replace(b"\r\n", b"\n"))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
END
shown() { # FILE RUN_DIR ENVIRONMENT...
    local file=$1 run=$2
    shift 2
    env -u NO_COLOR "$@" python3 "$work/terminal.py" ./train_gpt_cpu configs/tiny_llama.json "${small[@]}" schedule.max_steps=4 \
        eval.every=2 "log.run_dir=$work/$run" >"$work/$file"
}
escape=$'\033'
check "a run on a terminal" shown colours tty TERM=xterm
check "has a bar that the next line takes the place of" grep -qE '^\[#+\.+\]  25.0 %  [0-9ms]+ left.\[K'$'\r' "$work/colours"
check "three bars for four steps" [ "$(grep -o '\] *[0-9.]* %  ' "$work/colours" | wc -l)" -eq 3 ]
check "has colours" grep -q "loss $escape\[1m" "$work/colours"
for quiet in "TERM=dumb" "TERM=xterm NO_COLOR=1"; do
    # shellcheck disable=SC2086 # words
    check "$quiet: a run on a terminal" shown plain "tty.$quiet" $quiet
    check "$quiet: has neither" sh -c "! grep -q '$escape\|%  ' '$work/plain'"
done
cpu file schedule.max_steps=4 eval.every=2 >"$work/file.out" 2>&1
lines() { sed -E "s/$escape\[[0-9;]*[mK]//g; s/^.*"$'\r'"//; s/[0-9.]+ (tok|GFLOP)/N \1/g; s/left.*//; s/in [0-9.]+ s//; s/ +/ /g" "$1" | grep -E '^(step|eval) '; }
check "a file has the lines that the terminal shows" diff <(lines "$work/file.out") <(lines "$work/colours")
check "all of them" [ "$(lines "$work/file.out" | wc -l)" -eq 6 ]
check "and nothing for terminals" sh -c "! grep -q '$escape\|%  ' '$work/file.out'"

# ----------------------------------------------------------------------------
# sinks that fail

cpu sound schedule.max_steps=6 >/dev/null 2>&1
same() { ./train_gpt_cpu checkpoint diff "$work/sound/checkpoints/step_00000006" "$work/$1/checkpoints/step_00000006"; }
mkdir -p "$work/full/metrics.prom"
ln -s /dev/full "$work/full/log.jsonl"
touch "$work/full/tensorboard"
cpu full schedule.max_steps=6 log.tensorboard=true >/dev/full 2>"$work/err"
check "every sink full: the run is done" [ $? -eq 0 ]
check "with the same weights" same full
for sink in log.jsonl metrics.prom tensorboard; do
    check "and $sink is said once" [ "$(grep -c "warning: .*/$sink" "$work/err")" -eq 1 ]
done
mkdir -p "$work/hung" # a log that takes nothing, and does not fail either: a pipe that is full and that nobody reads
mkfifo "$work/hung/log.jsonl"
exec 9<>"$work/hung/log.jsonl"
dd if=/dev/zero of="$work/hung/log.jsonl" bs=1M count=1 oflag=nonblock 2>/dev/null
timeout 300 ./train_gpt_cpu configs/tiny_llama.json "${small[@]}" "log.run_dir=$work/hung" schedule.max_steps=6 \
    >"$work/out" 2>"$work/err"
check "a log that hangs: the run is done" [ $? -eq 0 ]
check "with the same weights" same hung
check "and it is said" grep -q '^warning: .*/log.jsonl takes nothing any more: the last lines are not in it$' "$work/err"
exec 9>&-
cpu closed schedule.max_steps=6 >&- 2>&- <&-
check "closed streams: the run is done" [ $? -eq 0 ]
check "with the same weights" same closed
check "and nothing else in its log" python3 -c "import json; [json.loads(x) for x in open('$work/closed/log.jsonl')]"
check "whose checkpoint verifies" ./train_gpt_cpu checkpoint verify "$work/closed/checkpoints/step_00000006"
cpu gone schedule.max_steps=6 | head -n 1 >/dev/null
check "a reader that goes away: the run is done" same gone
finish

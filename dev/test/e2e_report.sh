#!/usr/bin/env bash
# scripts/report and wandb_import on logs that a run can leave behind, and scripts/austen.py on a data file made here.
set -u
. "$(dirname "$0")/tap.sh"
if ! command -v python3 >/dev/null; then
    skip_test "scripts/report" "there is no python3"
    finish
fi

# Two launches: steps 1 to 60, killed in the middle of a line; then on from the checkpoint at step 40 to 80.
python3 - "$work" <<'END'
import json, sys, os
run = os.path.join(sys.argv[1], "run")
os.makedirs(run)
with open(os.path.join(run, "log.jsonl"), "w") as log:
    def event(kind, step, **fields):
        log.write(json.dumps({"event": kind, "time": 1.8e9 + step, "step": step, **fields}) + "\n")
    def steps(first, last, loss):
        for s in range(first, last + 1):
            event("step", s, loss=loss, grad_norm=None if s == 50 else 0.5, learning_rate=2.5e-4 * s / 80,
                  tokens=s * 1000, tokens_per_second=12345.0, step_seconds=0.1, gflops=400)
            if s % 20 == 0:
                event("eval", s, loss=loss + 1, perplexity=2.5, bits_per_byte=1.25)
                event("checkpoint", s, seconds=0.1)
    event("start", 0, version="v1.2-3-gabcdef", config={"seed": 7})
    steps(1, 60, 7.0)
    log.write('{"event":"step","step":61,"lo\n')
    event("resume", 40, version="v1.2-3-gabcdef")
    steps(41, 80, 3.0)
    event("sample", 80, text="<script>alert('no')</script> & so on")
    event("stop", 80, reason="done")
    log.write('{"event":"step","step":81')  # still being written
with open(os.path.join(run, "run_config.json"), "w") as config:
    json.dump({"seed": 7, "model": {"hidden_size": 48}, "data": {"train": "<shards>"}}, config)
END

# report_has TEXT / report_lacks TEXT, in the report of that run
report_has() { grep -qF -- "$1" "$work/run/report.html"; }
report_lacks() { ! report_has "$1"; }
is_well_formed() { python3 -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' "$1"; }
says() { # CODE TEXT COMMAND...: exits so, and says so in one line
    local code=$1 text=$2 output
    shift 2
    output=$("$@" 2>&1)
    [ $? -eq "$code" ] && [ "$(wc -l <<<"$output")" -eq 1 ] && [[ $output == *"$text"* ]] || ! echo "$output"
}

check "a run's report" scripts/report "$work/run"
check "is well-formed" is_well_formed "$work/run/report.html"
check "is one file that loads nothing" report_lacks "http"
for title in Loss Validation "Learning rate" "Gradient norm" Throughput Compute; do
    check "has the plot $title" report_has "<figcaption>$title<span>"
done
check "the steps done again count once, as they came out last" report_has "step 80: 3<"
cat >"$work/curve.py" <<'END'
import sys
from importlib.machinery import SourceFileLoader
run = SourceFileLoader("report", "scripts/report").load_module().Run(sys.argv[1])
last = int(sys.argv[2])
expected = [(s, 7.0) for s in range(1, 41)] + [(s, 3.0) for s in range(41, last + 1)]
sys.exit(run.curve("step", "loss") != expected or len(run.curve("step", "grad_norm")) != last - (last >= 50))
END
check "the curve is that of the launch that counts" python3 -B "$work/curve.py" "$work/run" 80
mkdir "$work/young"
grep -vE '"step": (4[5-9]|[5-8].), "loss": 3' "$work/run/log.jsonl" >"$work/young/log.jsonl"
check "also while less far than the launch before" python3 -B "$work/curve.py" "$work/young" 44
check "the last figures head the report" report_has "<td>3.0000</td>"
check "the last evaluation too" report_has "<td>4.0000</td>"
check "the resume is marked" report_has "resumed at step 40"
check "the checkpoints are marked" report_has "saved at step 20"
check "torn lines are counted" report_has "could not be read: 2."
check "the version is told" report_has "at step 40, version v1.2-3-gabcdef"
check "the config is a table" report_has "<th>model.hidden_size</th><td>48</td>"
check "text of the model is escaped" report_has "&lt;script&gt;alert(&#x27;no&#x27;)&lt;/script&gt; &amp; so"
check "text of the config is escaped" report_has "&lt;shards&gt;"

# A run of several GPUs that had its troubles: a skipped step, a rewind from 30 to 20, a rank that was lost.
mkdir "$work/other"
python3 - "$work/other/log.jsonl" <<'END'
import json, sys
with open(sys.argv[1], "w") as log:
    def event(kind, step, **fields):
        log.write(json.dumps({"event": kind, "time": 1.8e9 + step, "step": step, **fields}) + "\n")
    def steps(first, last, loss):
        for s in range(first, last + 1):
            event("step", s, loss=loss, skipped_steps=int(s > 9), mfu=0.5, hfu=0.625, goodput=0.75, data_seconds=0.001,
                  checkpoint_stall_seconds=0, eval_seconds=0.5, sample_seconds=0, tokens_per_second_per_gpu=1000,
                  rank_seconds_min=0.1, rank_seconds_median=0.11, rank_seconds_max=0.25, slowest_rank=3,
                  gpu_power_watts=700, gpu_temperature_celsius=66, gpu_sm_clock_mhz=1980)
            if s % 5 == 0:
                event("layers", s, grad_norm=[1e-3, None if s == 15 else loss, 0.5], weight_norm=[7, 8, 9],
                      update_norm=[0 if s == 5 else 0.01] * 3, activation_rms=[1, 20, 300])
    event("start", 0, version="v2", processes=4, device="NVIDIA <H100>")
    steps(1, 30, 9.0)
    event("guard", 30, what="spike <of> loss", action="rewind")
    event("rewind", 20, from_step=30)
    steps(21, 40, 4.0)
    event("lost", 40, error="rank 3 is silent")
    event("stop", 40, reason="error", error="it <ended>")
END
check "a run with troubles" scripts/report "$work/other"
other_has() { grep -qF -- "$1" "$work/other/report.html"; }
check "its report is well-formed" is_well_formed "$work/other/report.html"
for title in Utilisation "Not training" Goodput Ranks Power Temperature Clock "Gradient norm by layer" "Weight norm by layer" \
    "Update norm by layer" "Activations by layer"; do
    check "it has the plot $title" other_has "<figcaption>$title<span>"
    [[ $title != *layer ]] || check "without layers there is no $title" report_lacks "$title"
done
check "a curve for each layer" [ "$(grep -oE '<path class="line"[^>]*><title>(embedding|layer 0|head)</title>' \
    "$work/other/report.html" | sed 's/.*<title>//' | sort | uniq -c | awk '{ print $1 }' | tr '\n' ' ')" = "4 4 4 " ]
check "in three colours" [ "$(grep -oE 'color-mix[^"]*" d=' "$work/other/report.html" | sort -u | wc -l)" -eq 3 ]
check "the values of each, as they came out last" other_has "<title>layer 0, step 40: 4<"
check "the scale is logarithmic" other_has '"end">0.1</text>'
for mark in "skipped at step 10" "guard at step 30" "rewound at step 20" "lost a rank at step 40"; do
    check "the mark '$mark'" other_has "<title>$mark<"
done
check "skipped steps are marked once" [ "$(grep -o '<figcaption>Loss<.*<figcaption>Throughput\|<figcaption>Loss<.*<figcaption>Utilisation' \
    "$work/other/report.html" | grep -o 'skipped at' | wc -l)" -eq 1 ]
check "what a rewind took back does not count" sh -c "python3 -B -c '
from importlib.machinery import SourceFileLoader
run = SourceFileLoader(\"report\", \"scripts/report\").load_module().Run(\"$work/other\")
assert run.curve(\"step\", \"loss\") == [(s, 9.0 if s <= 20 else 4.0) for s in range(1, 41)]
assert run.curves(\"layers\", \"grad_norm\")[1] == [(s, 9.0 if s <= 20 else 4.0) for s in range(5, 41, 5) if s != 15]'"
check "the table of events has each of them" other_has "what spike &lt;of&gt; loss, action rewind"
check "and the message of the end" other_has "it &lt;ended&gt;"
check "and who computed" other_has "version v2, processes: 4, on NVIDIA &lt;H100&gt;"
check "the figures are shares" other_has "<td>75.0%</td>"
check "the labels have different colours" [ "$(grep -o 'key" style="--colour:var(--c[0-9])">\(slowest\|median\|fastest\)' \
    "$work/other/report.html" | cut -d'>' -f1 | sort -u | wc -l)" -eq 3 ]

check "two runs in one report" scripts/report "$work/run" "$work/other" -o "$work/both.html"
check "which is well-formed" is_well_formed "$work/both.html"
check "and names both" grep -qF '/other</span>' "$work/both.html"
check "with the troubles of each in its colour" grep -qE 'loud" style="stroke:var\(--c1\)" d="[^"]*"><title>[^<]*/other rewound at step 20<' \
    "$work/both.html"
check "and of the other" grep -qE 'loud" style="stroke:var\(--c0\)" d="[^"]*"><title>[^<]*/run resumed at step 40<' "$work/both.html"
check "and without their checkpoints" sh -c "! grep -q 'saved at' '$work/both.html'"

mkdir "$work/empty" && : >"$work/empty/log.jsonl"
check "a run that has not logged anything yet" scripts/report "$work/empty"
printf '{"event":"step","step":1,"loss":5}\n' >"$work/empty/log.jsonl"
check "a run of one step" scripts/report "$work/empty"
check "well-formed too" is_well_formed "$work/empty/report.html"
printf '[]\n7\n"x"\n{"event":"step","step":"x"}\n{}\n{"event":"step","step":2,"loss":NaN}\n\0\xff\n' \
    >"$work/empty/log.jsonl"
check "a log of nothing but rubbish" scripts/report "$work/empty"
check "no log" says 66 "$work/none/log.jsonl" scripts/report "$work/none"
check "no place for the report" says 66 "$work/none/r.html" scripts/report "$work/run" -o "$work/none/r.html"

# Weights & Biases: a module of that name that notes what it is told
mkdir "$work/wandb"
cat >"$work/wandb/wandb.py" <<'END'
import json, os
class Run:
    def log(self, numbers, step):
        self.told.append([step, numbers])
    def finish(self):
        json.dump(self.told, open(os.environ["TOLD"], "w"))
def init(**arguments):
    run = Run()
    run.told = [arguments]
    return run
END
check "an import into Weights & Biases" env TOLD="$work/told" PYTHONPATH="$work/wandb" scripts/wandb_import "$work/run" --project p
cat >"$work/told.py" <<'END'
import json, sys
first, *steps = json.load(open(sys.argv[1]))
assert first == {"project": "p", "name": "run", "config": {"seed": 7}}, first
assert [step for step, _ in steps] == list(range(1, 81))
for step, numbers in steps:
    assert numbers["step/loss"] == (7.0 if step <= 40 else 3.0), step
    assert ("eval/loss" in numbers) == (step % 20 == 0) and "step/step" not in numbers and "step/time" not in numbers
    assert ("step/grad_norm" in numbers) == (step != 50)
END
check "has every step once, as it came out last" python3 "$work/told.py" "$work/told"
check "an import with norms of layers" env TOLD="$work/told" PYTHONPATH="$work/wandb" scripts/wandb_import "$work/other"
check "has each of them, but what is not finite" python3 -c "import json
first, *steps = json.load(open('$work/told'))
assert [(s, n['layers/grad_norm/1'], n['layers/weight_norm/2']) for s, n in steps if 'layers/grad_norm/1' in n] == \\
    [(s, 9 if s <= 20 else 4, 9) for s in range(5, 41, 5) if s != 15]"
mkdir "$work/wandb_missing" # a module that is not there, even where the real one is
echo 'raise ImportError("not here")' >"$work/wandb_missing/wandb.py"
check "without the package" says 69 "pip install wandb" env PYTHONPATH="$work/wandb_missing" scripts/wandb_import "$work/run"
check "without a log" says 66 "none/log.jsonl" scripts/wandb_import "$work/none"

# Two small "novels" as R stores them; the hash of the real ones is checked by the program itself.
cat >"$work/novels.py" <<'END'
import struct, sys, zlib
from importlib.machinery import SourceFileLoader
austen = SourceFileLoader("austen", "scripts/austen.py").load_module()

def vector(strings, version):
    data = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    data += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    data += struct.pack(">ii", 16, len(strings))
    for string in map(str.encode, strings):
        data += struct.pack(">ii", 0x40009, len(string)) + string
    return struct.pack(">I", len(data)) + zlib.compress(data)

first = ["TITLE", "", "by Nobody", "", "VOLUME I", "", "", "CHAPTER I", "", "", "One line,",
         "the next.  End.", "", "  a verse", "    of two", "", "Costs \u00a35.", "", "VOLUME II", "",
         "CHAPTER II", "", "More.", "", "FINIS"]
second = ["Chapter 1", "", "Short."]
novels = list(austen.read_novels(vector(first, 3) + vector(second, 2)))
assert novels == [first, second], novels
found = [chapter for novel in novels for chapter in austen.chapters(novel)]
assert found == ["CHAPTER I\n\nOne line, the next. End.\n\n  a verse\n    of two\n\nCosts \u00a35.",
                 "CHAPTER II\n\nMore.", "Chapter 1\n\nShort."], found
open(sys.argv[1], "wb").write(vector(first, 3))
END
check "R's vectors of strings; chapters, paragraphs, verse" python3 -B "$work/novels.py" "$work/foreign.rdb"
check "other novels are not taken for these" says 1 "other text" scripts/austen.py "$work/foreign.rdb"
head -c 50 "$work/foreign.rdb" >"$work/torn.rdb"
check "a torn data file" says 1 "$work/torn.rdb" scripts/austen.py "$work/torn.rdb"
check "no data file" says 1 "$work/none" scripts/austen.py "$work/none"
finish

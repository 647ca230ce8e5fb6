"""What hides behind what in the timelines of dev/emu's virtual clock (EMU_CLOCK_FILE), in the last whole step: from one
update_control_kernel to the next, in every rank. An operation's hidden share is that of its time in which a matmul of
the same rank runs.

    timeline.py show PATH RANKS                           kind, range, hidden shares in per cent
    timeline.py hidden PATH RANKS KIND RANGE COUNT SLICE LOW HIGH
                                                          COUNT such operations a rank; those in SLICE each hide LOW to HIGH
    timeline.py together PATH RANKS RANGE LOW HIGH        of the time of a range's gathers and scatters so much is hidden
    timeline.py seconds PATH RANKS SECONDS TOLERANCE      of the step
    timeline.py step PATH RANKS                           its seconds, of the first rank
    timeline.py exposed PATH RANKS LOG                    the share of it without a matmul is what the log says of it
"""
import collections
import json
import sys

Operation = collections.namedtuple("Operation", "start end stream kind range")


def read(path, ranks):
    """Operations of the last whole step, in the order of their beginning, for each rank; with its two ends."""
    for rank in range(ranks):
        lines = [line.rstrip("\n").split("\t") for line in open(f"{path}.{rank}")]
        all = sorted((Operation(float(l[0]), float(l[1]), *l[2:]) for l in lines), key=lambda o: (o.start, o.end))
        updates = [o.end for o in all if o.kind == "update_control_kernel"]
        first, last = updates[-2:]
        yield rank, first, last, [o for o in all if first <= o.start < last]


def hidden(operation, operations):
    """Matmuls follow each other in one stream."""
    return sum(max(0, min(o.end, operation.end) - max(o.start, operation.start))
               for o in operations if o.kind == "matmul") / (operation.end - operation.start)


def communication(operations):
    return [o for o in operations if o.kind.startswith("nccl") and o.end > o.start]


def show(path, ranks):
    for rank, first, last, operations in read(path, ranks):
        groups = collections.defaultdict(list)
        for o in communication(operations):
            groups[o.kind, o.range].append(o)
        busy = sum(o.end - o.start for o in operations if o.kind == "matmul")
        print(f"rank {rank}: {1e6 * (last - first):.2f} us, matmuls {1e6 * busy:.2f}")
        for (kind, where), group in groups.items():
            print(f"  {kind:18} {where:16} {1e6 * sum(o.end - o.start for o in group):9.2f} us:",
                  *(f"{100 * hidden(o, operations):.0f}" for o in group))


def expect(what, got, low, high):
    print(f"{what}: {got:.6g}")
    if not float(low) <= got <= float(high):
        sys.exit(f"{low} to {high} is wanted")


def check_hidden(path, ranks, kind, where, count, which, low, high):
    part = slice(*(int(x) if x else None for x in which.split(":")))
    for rank, _, _, operations in read(path, ranks):
        group = [o for o in communication(operations) if (o.kind, o.range) == (kind, where)]
        if len(group) != int(count):
            sys.exit(f"rank {rank}: {len(group)} {kind} in {where}, not {count}")
        for o in group[part]:
            expect(f"rank {rank}, {kind} at {o.start:.9f}", hidden(o, operations), low, high)


def check_together(path, ranks, where, low, high):
    for rank, _, _, operations in read(path, ranks):
        group = [o for o in communication(operations) if o.range == where and o.kind != "ncclAllReduce"]
        covered = sum(hidden(o, operations) * (o.end - o.start) for o in group)
        expect(f"rank {rank}, {where}", covered / sum(o.end - o.start for o in group), low, high)


def check_seconds(path, ranks, seconds, tolerance):
    for rank, first, last, _ in read(path, ranks):
        expect(f"rank {rank}, seconds over {seconds} - 1", (last - first) / float(seconds) - 1, "-" + tolerance, tolerance)


def step(path, ranks):
    _, first, last, _ = next(read(path, ranks))
    print(f"{last - first:.9f}")


# Where nothing but matmuls takes time, the first rank's compute stream has nothing to do but wait when there is none.
def check_exposed(path, ranks, log):
    _, first, last, operations = next(read(path, ranks))
    busy = sum(o.end - o.start for o in operations if o.kind == "matmul")
    steps = [e for e in map(json.loads, open(log)) if e["event"] == "step"]
    exposed, computing = steps[-1]["exposed_comm_seconds"], steps[-1]["compute_seconds"]
    wanted = 1 - busy / (last - first)
    expect("exposed share", exposed / (exposed + computing), wanted - 0.002, wanted + 0.002)


commands = {"show": show, "step": step, "hidden": check_hidden, "together": check_together, "seconds": check_seconds,
            "exposed": check_exposed}
commands[sys.argv[1]](sys.argv[2], int(sys.argv[3]), *sys.argv[4:])

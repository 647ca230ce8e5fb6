# Sourced by tests: a Slurm cluster of nodes n1, n2, ... on this machine's loopback, from Debian's slurm-wlm and munge.
# Needs root. Nothing of the machine's own Slurm is touched: key, sockets, ports and state are in $cluster.
#
#   cluster_missing                 prints why there can be none; false if there can
#   cluster_start DIR NODES CONF    true once all are idle; DIR: empty, everybody can enter; CONF: lines of slurm.conf
#   node_start NODE, node_kill NODE a power cut: the daemon, its steps and their processes
#   job_pids KEY=VALUE ...          of all processes of jobs here that have these in their environment
#   cluster_stop                    ends the daemons and all that they started
#
# Each node has more CPUs than the machine, so that jobs run side by side, and files that are called GPUs.
cluster_missing() {
    local tool
    for tool in slurmctld slurmd munged sbatch; do
        command -v $tool >/dev/null || { echo "there is no $tool: scripts/setup.sh test installs it" && return; }
    done
    [ "$(id -u)" -ne 0 ] && echo "only root can start munged and several slurmd"
}

cluster_start() {
    local munge=$1/munge port=$((29000 + $$ % 300 * 10)) n
    cluster=$1 nodes=$2
    export SLURM_CONF=$cluster/slurm.conf
    mkdir -p "$cluster"/{munge,state,log,spool} && chmod 755 "$cluster"
    for n in {0..15}; do mknod "$cluster/gpu$n" c 1 3 || touch "$cluster/gpu$n"; done # as /dev/null
    head -c 1024 /dev/urandom >"$munge/munge.key"
    chown -R munge:munge "$munge" && chmod 0711 "$munge" && chmod 0400 "$munge/munge.key"
    # cred_expire: so long does a requeued job wait. config_overrides: CPUs that the machine does not have.
    cat >"$SLURM_CONF" <<CONF
ClusterName=t
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/munge.sock,cred_expire=5
CredType=cred/munge
FirstJobId=$((1 + RANDOM))
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool/%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd-%n.pid
SlurmctldLogFile=$cluster/log/slurmctld.log
SlurmdLogFile=$cluster/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
JobRequeue=1
$3
CONF
    for n in $(seq "$nodes"); do
        mkdir "$cluster/spool/n$n"
        echo "NodeName=n$n NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + n)) CPUs=32 RealMemory=1024 Gres=gpu:16"
    done >>"$SLURM_CONF"
    echo "NodeName=n[1-$nodes] Name=gpu File=$cluster/gpu[0-15]" >"$cluster/gres.conf"
    runuser -u munge -- munged --key-file="$munge/munge.key" --socket="$munge/munge.sock" --pid-file="$munge/munged.pid" \
        --log-file="$munge/munged.log" --seed-file="$munge/munged.seed" >/dev/null 2>&1
    (setsid slurmctld -D -f "$SLURM_CONF" >"$cluster/log/slurmctld.out" 2>&1 &)
    for n in $(seq "$nodes"); do node_start "n$n"; done
    for _ in $(seq 60); do
        [ "$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ] && return
        sleep 0.5
    done
    tail -n 20 "$cluster"/log/*
    return 1
}

node_start() { (setsid slurmd -D -N "$1" -f "$SLURM_CONF" >>"$cluster/log/slurmd-$1.out" 2>&1 &) }

job_pids() {
    local files=(/proc/[0-9]*/environ) pair
    for pair in "SLURM_CONF=$SLURM_CONF" "$@"; do
        mapfile -t files < <(grep -lzxF -- "$pair" "${files[@]}" 2>/dev/null)
        [ ${#files[@]} -gt 0 ] || return 0
    done
    printf '%s\n' "${files[@]}" | grep -o '[0-9]*'
}

# Processes of jobs and the slurmstepd above them.
kill_steps() { # KEY=VALUE
    local pids parents
    pids=$(job_pids "$1")
    [ -n "$pids" ] || return 0
    parents=$(ps -o ppid= -p "$(echo $pids | tr ' ' ,)" | sort -u)
    kill -KILL $(ps -o pid=,comm= -p "$(echo $parents | tr ' ' ,)" | sed -n 's/ slurmstepd$//p') $pids 2>/dev/null
}

node_kill() {
    kill -KILL "$(cat "$cluster/slurmd-$1.pid")"
    kill_steps "SLURMD_NODENAME=$1"
}

cluster_stop() {
    local daemons
    daemons=$(cat "$cluster"/slurmd-*.pid "$cluster/slurmctld.pid" "$cluster/munge/munged.pid" 2>/dev/null)
    kill_steps SLURM_CLUSTER_NAME=t
    [ -z "$daemons" ] || kill $daemons 2>/dev/null
    for _ in $(seq 100); do
        kill -0 $daemons 2>/dev/null || break
        sleep 0.1
    done
    kill_steps SLURM_CLUSTER_NAME=t # what was started meanwhile
}

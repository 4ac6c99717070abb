#!/usr/bin/env bash
# A real SLURM on this one machine, for tests: munged, slurmctld, and one slurmd for each "node". Needs root.
#
#   bash tests/launch/slurm/cluster.sh up FOLDER [NODES] [CPUS]    # then: export SLURM_CONF=FOLDER/slurm.conf
#   bash tests/launch/slurm/cluster.sh down FOLDER
#   bash tests/launch/slurm/cluster.sh down FOLDER PID             # once that process has ended; then FOLDER goes, too
#
# All state is in FOLDER, with keys, sockets and ports of its own: a SLURM that the machine may have is left alone.
# The names of the nodes (n1, n2) do not resolve; partition "urgent" pre-empts jobs of "main", which SLURM requeues,
# and those of "graceful", which have some seconds before that.
set -euo pipefail

daemons() { (cd "$FOLDER/pid" && ls -d slurmd-*.pid slurmctld.pid munged.pid 2>/dev/null) || true; }

runs() { # NAME PID: whether the process is a daemon of that name, and ours
  local line
  line=$(tr '\0' ' ' <"/proc/$2/cmdline" 2>/dev/null) || return 1
  [[ $line == *"$1"* && $line == *"$FOLDER"* ]]
}

up() {
  local nodes=${1:-2} cpus=${2:-4} host memory ports i
  host=$(hostname -s)
  memory=$(($(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) * 9 / 10 / nodes))
  mapfile -t ports < <(python3 -c '
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]) + 1)]
for s in held:
    s.bind(("", 0))
    print(s.getsockname()[1])' "$nodes")
  mkdir -p "$FOLDER"/{log,pid,state,spool}
  (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge.key")
  # --force: the parents of FOLDER may be writable for others, as /tmp is
  munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" --pid-file="$FOLDER/pid/munged.pid" \
    --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge.seed"
  cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=dhf
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdParameters=config_overrides
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldPidFile=$FOLDER/pid/slurmctld.pid
SlurmdPidFile=$FOLDER/pid/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
SwitchType=switch/none
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
CONF
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=$cpus RealMemory=$memory State=UNKNOWN"
  done >>"$FOLDER/slurm.conf"
  cat >>"$FOLDER/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=graceful Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  export SLURM_CONF=$FOLDER/slurm.conf
  slurmctld -f "$SLURM_CONF"
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$FOLDER/spool/n$i"
    slurmd -N "n$i" -f "$SLURM_CONF"
  done
  for _ in {1..200}; do
    [ "$(sinfo -h -N -o %t -p main 2>/dev/null | grep -c '^idle$')" = "$nodes" ] && return
    sleep 0.2
  done
  echo "error: the nodes did not come up; see $FOLDER/log" >&2
  return 1
}

down() {
  local name pid owner=${1:-}
  while [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; do sleep 1; done
  [ -e "$FOLDER/slurm.conf" ] || return 0
  export SLURM_CONF=$FOLDER/slurm.conf
  # the jobs first, since they would outlive their daemons
  if squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null; then
    for _ in {1..75}; do
      [ -z "$(squeue -h 2>/dev/null)" ] && break
      sleep 0.2
    done
  fi
  for name in $(daemons); do
    pid=$(cat "$FOLDER/pid/$name")
    runs "${name%%[-.]*}" "$pid" || continue
    kill "$pid"
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
  [ -z "$owner" ] || rm -rf "$FOLDER"
}

[ $# -ge 2 ] || { sed -n 2,9p "$0" && exit 2; }
command=$1
FOLDER=$(realpath "$2")
"$command" "${@:3}"

#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with names of their own, and a link between them that can be slow, cut and healed.
#
#   two_hosts.sh up A B [DELAY_US [RATE_MBIT]]   make hosts A (10.77.0.1) and B (10.77.0.2); the delay is one way, 0 is none
#   two_hosts.sh on A COMMAND...                 run a command on host A
#   two_hosts.sh cut A B | heal A B              unplug the cable, and plug it in again
#   two_hosts.sh measure A B                     round trip in milliseconds and rate in Mbit/s of TCP over the link
#   two_hosts.sh kill A                          end everything that runs on A, as a crash would
#   two_hosts.sh down A B                        end everything on both, and remove them
#
# As on Debian, a host's own name resolves to 127.0.1.1 there, and the other's to its address on the link.
# Needs root and iproute2. A delay needs netem in the kernel, or else a C compiler and /dev/net/tun for two_hosts_relay.c.
# Exit code 69: this machine cannot do it, for the reason on stderr.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LINK=link0

unavailable() {
  echo "two_hosts.sh: $1" >&2
  exit 69
}

up() {
  local a=$1 b=$2 delay=${3:-0} rate=${4:-0} host
  [ "$(id -u)" -eq 0 ] || unavailable "network namespaces need root"
  command -v ip >/dev/null || unavailable "needs ip; on Debian and Ubuntu: apt install iproute2"
  [ "$rate" -eq 0 ] || command -v tc >/dev/null || unavailable "a rate needs tc; on Debian and Ubuntu: apt install iproute2"
  for host in "$a" "$b"; do
    [ ! -e "/run/netns/$host" ] || { echo "two_hosts.sh: there is a host $host already" >&2; exit 1; }
  done
  A=$a B=$b
  trap undo EXIT
  for host in "$a" "$b"; do
    ip netns add "$host" || unavailable "may not make network namespaces here"
    ip -n "$host" link set lo up
  done
  name "$a" "$b" 10.77.0.2
  name "$b" "$a" 10.77.0.1
  connect "$a" "$b" "$delay" "$rate"
  ip -n "$a" address add 10.77.0.1/24 dev $LINK
  ip -n "$b" address add 10.77.0.2/24 dev $LINK
  for host in "$a" "$b"; do ip -n "$host" link set $LINK mtu 9000 up; done
}

undo() { # what was made before a failure goes again
  local code=$?
  [ $code -eq 0 ] || down "$A" "$B"
  exit $code
}

name() {
  mkdir -p "/etc/netns/$1"
  printf '%s\n' "127.0.0.1 localhost" "127.0.1.1 $1" "$3 $2" >"/etc/netns/$1/hosts"
}

connect() {
  local a=$1 b=$2 delay=$3 rate=$4 host program
  ip link add $LINK netns "$a" type veth peer name $LINK netns "$b" || unavailable "may not make a veth pair here"
  if [ "$delay" -eq 0 ]; then
    [ "$rate" -eq 0 ] && return
    for host in "$a" "$b"; do # 2 ms of traffic may go at once
      tc -n "$host" qdisc add dev $LINK root tbf rate "${rate}mbit" burst $((rate * 250 + 9100)) latency 200ms ||
        unavailable "a rate needs the kernel's tbf"
    done
  elif netem "$a" "$delay" "$rate" 2>/dev/null; then
    netem "$b" "$delay" "$rate"
  else
    command -v cc >/dev/null || unavailable "a delay needs the kernel's netem, or a C compiler"
    [ -e /dev/net/tun ] || unavailable "a delay needs the kernel's netem, or /dev/net/tun"
    ip -n "$a" link delete $LINK
    program=$(mktemp)
    cc -O2 "$HERE/two_hosts_relay.c" -o "$program"
    ip netns exec "$a" "$program" $LINK "/run/netns/$b" "$delay" "$rate" </dev/null >/dev/null 2>&1 &
    for _ in {1..200}; do
      if ip -n "$b" link show $LINK >/dev/null 2>&1; then break; fi
      sleep 0.02
    done
    rm "$program"
    ip -n "$b" link show $LINK >/dev/null 2>&1 || unavailable "may not open /dev/net/tun"
  fi
}

netem() {
  local how=(delay "$2us" limit 100000)
  if [ "$3" -ne 0 ]; then how+=(rate "${3}mbit"); fi
  tc -n "$1" qdisc add dev $LINK root netem "${how[@]}"
}

on() {
  # shellcheck disable=SC2016  # sh expands them
  exec ip netns exec "$1" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$@"
}

measure() {
  local server
  on "$2" "${PYTHON:-python3}" "$HERE/two_hosts.py" serve &
  server=$!
  (on "$1" "${PYTHON:-python3}" "$HERE/two_hosts.py" measure)
  wait "$server"
}

end_all_on() {
  local running signal
  for _ in {1..100}; do
    running=$(ip netns pids "$1" 2>/dev/null) || return 0
    [ -n "$running" ] || return 0
    # stopped first, so that none sees another die before its own turn
    for signal in STOP KILL; do
      # shellcheck disable=SC2086  # numbers, one a word
      kill -$signal $running 2>/dev/null || true
    done
    sleep 0.02
  done
}

down() {
  local host
  for host in "$1" "$2"; do
    end_all_on "$host"
    ip netns delete "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
  rmdir /etc/netns 2>/dev/null || true
}

case "${1:-} $#" in
  "up "[3-5]) up "${@:2}" ;;
  "on "[1-9]*) on "${@:2}" ;;
  "cut 3") ip -n "$2" link set $LINK down ;;
  "heal 3") ip -n "$2" link set $LINK up ;;
  "measure 3") measure "$2" "$3" ;;
  "kill 2") end_all_on "$2" ;;
  "down 3") down "$2" "$3" ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac

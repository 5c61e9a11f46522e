#!/usr/bin/env bash
# A Ray cluster on this machine, with token authentication, that listens on 127.0.0.1 alone.
#
#   cluster/local.sh python jobs/distill.py [RUN.yaml] [--section.key value …]   start it, run one job on it, stop it
#   cluster/local.sh start     leave it running, and say what to export for `ray job submit -- python jobs/distill.py`
#   cluster/local.sh stop      stop what `start` started, and nothing else
#
# Other Ray clusters on the machine are left as they are.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
export EMBEDLIB_CWD="$PWD"
cd "$(dirname "$0")/.."

export EMBEDLIB_ARTIFACTS="${EMBEDLIB_ARTIFACTS:-$PWD/artifacts}"
unset PYTHONDONTWRITEBYTECODE # every worker would compile its libraries anew, which doubles its start
export PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_COLOR_PREFIX=0
# On a machine of few cores a worker of low priority waits for every small task of Ray's own: a fifth of its speed.
export RAY_worker_niceness=0
# As on Windows and macOS, where this variable has its name from: all of Ray listens on 127.0.0.1. Without it an address of
# 127.0.0.1 becomes the machine's own, and GCS, raylet and agents listen on all.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# Explicitly: `ray start` and `ray job submit` must agree, whatever token files there are.
export RAY_AUTH_MODE=token
# For Ray Serve: one event loop a replica, gRPC between them, and its own errors in the shape of all others. HAProxy
# before the gateways, which gives a request whose gateway dies to another, if it fits its buffer - but only where a
# configuration file says on which address: without one, Ray Serve with HAProxy listens on all.
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_ENABLE_DIRECT_INGRESS=0 RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE=1
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares
# A busy machine imports what the gateway needs in more than the 15 s after which Ray would kill it.
export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60
if [[ "$*" == serve\ run\ *.yaml ]]; then
  export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_ENABLE_DIRECT_INGRESS=1
  export RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" RAY_SERVE_HAPROXY_TUNE_BUFSIZE=131072
fi

# What a running cluster is known by: its head's process id, address and log, and HAProxy's files.
if [[ "$*" == start || "$*" == stop ]]; then
  home="$HOME/.ray/embedlib-local"
else
  home=$(mktemp -d -t embedlib-ray.XXXXXX)
fi

# The head's process id as long as it lives and is ours: the kernel gives ids again.
head_pid() {
  local pid
  pid=$(cat "$home/pid" 2>/dev/null) && commands "$pid" | grep -q "ray start --head" && echo "$pid"
}

# Process ids and command lines: of all processes, or of one. Slim images have no `ps`, macOS has no /proc.
commands() {
  if [ -d /proc/self ]; then
    local file
    for file in /proc/${1:-[0-9]*}/cmdline; do
      printf '%s ' "$(basename "$(dirname "$file")")"
      tr '\0' ' ' <"$file" 2>/dev/null || true
      echo
    done
  elif [ $# -gt 0 ]; then
    ps -o pid=,args= -p "$1" 2>/dev/null
  else
    ps -A -o pid=,args= 2>/dev/null
  fi
}

# Kill all processes whose command line has these words.
kill_with() {
  local all pid
  all=$(commands) # before there is a grep that has the words, too
  { grep -F -- "$1" <<<"$all" || true; } | while read -r pid _; do
    kill -KILL "$pid" 2>/dev/null || true
  done
}

stop() {
  local head
  if head=$(head_pid); then
    kill -TERM "$head" 2>/dev/null || true
    for _ in $(seq 20); do # Ray may wait for replicas longer than anyone who stops it
      kill -0 "$head" 2>/dev/null || break
      sleep 0.5
    done
    kill -KILL -- "-$head" 2>/dev/null || true
  fi
  local proxy
  if proxy=$(cat "$home/proxy" 2>/dev/null) && [ -n "$proxy" ]; then
    kill_with "$proxy" # it outlives Ray
    rm -rf "$proxy"
  fi
  rm -rf "$home"
}

# Six free ports between Ray's own (up to 19999) and those that the kernel gives to connections (from 32768): one of
# theirs could be taken before Ray, which needs seconds to start, binds it. The first, the dashboard's, is 8265 where a
# cluster stays, so that one knows where to send jobs, unless that is taken.
free_ports() {
  python - "$@" <<'EOF'
import random
import socket
import sys

found = []
for port in [*map(int, sys.argv[1:]), *random.sample(range(20000, 32768), 100)]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            found.append(port)
print(*found[:6])
EOF
}

# Cores that this process may use, within the limits of its container. Ray Data cannot resume where Ray counts two CPUs
# or fewer (Ray 2.60), so it is told of at least four.
detected_cpus() {
  python - <<'EOF'
import os
from pathlib import Path

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
limit = Path("/sys/fs/cgroup/cpu.max")
quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
print(max(4, cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))))
EOF
}

# Leaves $dashboard and $agent; takes the ports to prefer.
start() {
  [ -n "${RAY_AUTH_TOKEN:-}" ] || (umask 077; ray get-auth-token --generate >/dev/null 2>&1)
  read -r dashboard port agent client stats metrics < <(free_ports "$@")
  mkdir -p "$home"
  # The path of a socket may have 97 characters, and Ray adds a directory of 56.
  local proxy
  proxy=$(mktemp -d /tmp/embedlib.XXXXXX)
  echo "$proxy" >"$home/proxy"
  export RAY_SERVE_HAPROXY_STATS_PORT=$stats RAY_SERVE_HAPROXY_METRICS_PORT=$metrics
  export RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=$proxy/haproxy.cfg
  export RAY_SERVE_HAPROXY_SOCKET_PATH=$proxy/admin.sock RAY_SERVE_HAPROXY_SERVER_STATE_BASE=$proxy
  export RAY_SERVE_HAPROXY_SERVER_STATE_FILE=$proxy/server-state
  # A session of its own, as `setsid` gives where there is one.
  python -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' \
    ray start --head --block --num-cpus "$(detected_cpus)" --node-ip-address 127.0.0.1 --port "$port" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "$agent" \
    --ray-client-server-port "$client" >"$home/log" 2>&1 </dev/null &
  echo $! >"$home/pid"
  # The second wins over all else that says where jobs go, so that no cluster exported before is meant.
  export RAY_ADDRESS="http://127.0.0.1:$dashboard" RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard"
  for _ in $(seq 240); do
    is_up && return
    kill -0 "$(cat "$home/pid")" 2>/dev/null || { cat "$home/log" >&2; return 1; }
    sleep 0.5
  done
  echo "Ray did not come up; its logs are below /tmp/ray/session_latest/logs" >&2
  cat "$home/log" >&2
  return 1
}

# Jobs are run by the agent, which comes up last.
is_up() { (exec 3<>"/dev/tcp/127.0.0.1/$agent") 2>/dev/null && ray job list >/dev/null 2>&1; }

case "$*" in
  start)
    head_pid >/dev/null && { echo "A cluster runs at $(cat "$home/address") already; cluster/local.sh stop" >&2; exit 1; }
    start 8265 || { stop; exit 1; }
    echo "$RAY_ADDRESS" >"$home/address"
    echo "Ray runs with $(detected_cpus) CPUs at $RAY_ADDRESS, for whoever has the token. To send it jobs:"
    echo "  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=$RAY_ADDRESS"
    ;;
  stop)
    head_pid >/dev/null || { echo "No cluster that cluster/local.sh started is running" >&2; stop; exit 1; }
    stop
    ;;
  *)
    trap stop EXIT
    start
    ray job submit --working-dir . --log-style=record --log-color=false -- "$@" 2>&1 \
      | { grep --line-buffered -v -E '(INFO|SUCC|WARNING)[[:space:]](cli|sdk|dashboard_sdk|packaging|working_dir|job_manager)\.py|core_worker\.cc|^ *$' || true; }
    ;;
esac

#!/usr/bin/env bash
# A Ray cluster on this machine for one job: start it with token authentication, submit, stop it again.
#
#   cluster/local.sh python jobs/distill.py [RUN.yaml] [--section.key value …]
#
# It listens on 127.0.0.1 alone and leaves other Ray clusters on the machine as they are.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
export EMBEDLIB_CWD="$PWD"
cd "$(dirname "$0")/.."

export EMBEDLIB_ARTIFACTS="${EMBEDLIB_ARTIFACTS:-$PWD/artifacts}"
unset PYTHONDONTWRITEBYTECODE # every worker would compile its libraries anew, which doubles its start
export PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_COLOR_PREFIX=0
# On a machine of few cores a worker of low priority waits for every small task of Ray's own: a fifth of its speed.
export RAY_worker_niceness=0
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
[ -n "${RAY_AUTH_TOKEN:-}" ] || ray get-auth-token --generate >/dev/null

# Five free ports between Ray's own (up to 19999) and those that the kernel gives to connections (from 32768): one of
# theirs could be taken before Ray, which needs seconds to start, binds it.
read -r port dashboard agent stats metrics < <(python - <<'EOF'
import random
import socket

found = []
for port in random.sample(range(20000, 32768), 100):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            found.append(port)
print(*found[:5])
EOF
)
# Ray Data cannot resume where Ray counts two CPUs or fewer (Ray 2.60), so it is told of at least four.
cores=$(python -c 'import os; print(max(4, os.cpu_count() or 1))')
log=$(mktemp -t embedlib-ray.XXXXXX)
haproxy=$(mktemp -d -t embedlib-haproxy.XXXXXX)
export RAY_SERVE_HAPROXY_STATS_PORT=$stats RAY_SERVE_HAPROXY_METRICS_PORT=$metrics
export RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=$haproxy/haproxy.cfg RAY_SERVE_HAPROXY_SOCKET_PATH=$haproxy/admin.sock
export RAY_SERVE_HAPROXY_SERVER_STATE_BASE=$haproxy RAY_SERVE_HAPROXY_SERVER_STATE_FILE=$haproxy/server-state

setsid ray start --head --block --num-cpus "$cores" --node-ip-address 127.0.0.1 --port "$port" \
  --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "$agent" >"$log" 2>&1 &
head=$!
stop() {
  kill -TERM "$head" 2>/dev/null || true
  for _ in $(seq 20); do # Ray may wait for replicas longer than anyone who stops it
    kill -0 "$head" 2>/dev/null || break
    sleep 0.5
  done
  kill -KILL -- "-$head" 2>/dev/null || true
  pkill -KILL -f "$haproxy" || true # it outlives Ray
  rm -rf "$log" "$haproxy"
}
trap stop EXIT

export RAY_ADDRESS="http://127.0.0.1:$dashboard"
# Jobs are run by the agent, which comes up last.
up() { (exec 3<>"/dev/tcp/127.0.0.1/$agent") 2>/dev/null && ray job list >/dev/null 2>&1; }
for _ in $(seq 240); do
  up && break
  kill -0 "$head" 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.5
done
up || { echo "Ray did not come up; its logs are below /tmp/ray/session_latest/logs" >&2; cat "$log" >&2; exit 1; }
ray job submit --working-dir . --log-style=record --log-color=false -- "$@" 2>&1 \
  | grep --line-buffered -v -E '(INFO|SUCC|WARNING)[[:space:]](cli|sdk|dashboard_sdk|packaging|working_dir|job_manager)\.py|core_worker\.cc|^ *$'

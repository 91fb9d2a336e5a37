#!/usr/bin/env bash
# The MLflow server of a cluster, on its head; does nothing where one answers already. Prints nothing secret.
# Listens on one address of this machine (MLFLOW_HOST), takes requests addressed to that name only (no DNS rebinding),
# and runs no code. It has no login: who reaches the address may write, so keep the port inside the cluster's network.
set -euo pipefail
cd "$(dirname "$0")/.."
. cluster/env.sh
host="${MLFLOW_HOST:-127.0.0.1}"
port="${MLFLOW_PORT:-5000}"
place="${SCLDM_HOME}/mlflow"
mkdir -p "$place"
python - "$host" "$port" <<'P' && exit 0
import socket, sys
sys.exit(0 if socket.socket().connect_ex((sys.argv[1], int(sys.argv[2]))) == 0 else 1)
P
nohup python -m mlflow server --host "$host" --port "$port" --allowed-hosts "$host:$port,localhost:$port" \
  --backend-store-uri "sqlite:///$place/mlflow.db" --artifacts-destination "$place/artifacts" --workers 2 \
  > "$place/server.log" 2>&1 < /dev/null &

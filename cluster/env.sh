# What every node of every cluster here has in its environment before `ray start`: sourced, never run.
# Jobs inherit it from the raylet, so nothing of it has to be sent with a job.

# Nobody submits, reads or stops anything without the token. Ray looks for it in RAY_AUTH_TOKEN, in the file that
# RAY_AUTH_TOKEN_PATH names, and in ~/.ray/auth_token; all nodes need the same.
export RAY_AUTH_MODE=token

# `ray job stop` sends SIGTERM and, after so many seconds, SIGKILL. Ray's 3 s are too few to write a checkpoint. Read by
# the job's supervisor, on the head; `scldm submit` sends it as well.
export RAY_JOB_STOP_WAIT_TIME_S=600

# A fixed number of training workers waits so long for machines that boot (Ray: 60 s). A range sets its own.
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=1800

# Where output goes if a job was sent with its own copy of the code (--working-dir).
export SCLDM_HOME="${SCLDM_HOME:-/shared}"

# An MLflow server must not run code that it is sent.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

# EFA, where both the device and Amazon's libraries are there; without the libraries NCCL takes TCP.
if [ -e /dev/infiniband ] && [ -d /opt/amazon/efa ]; then
  export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1 RDMAV_FORK_SAFE=1
fi

ulimit -n 65536 2>/dev/null || true

#!/usr/bin/env bash
# Fine-tune on one machine with eight Ascend 910B. Run it in the project's environment (. .venv/bin/activate):
#
#     bash experiments/launch/ascend_1x8.sh --model DIR --features DIR --out DIR [flags of experiments.finetune]
set -eu
. "$(dirname "$0")/ascend_env.sh"

# Machines, and which of them this is: one, unless the environment says otherwise. For more, ascend_2x8.sh tells what they need.
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
# Where the processes meet: on one machine at the loopback (127.0.0.1), which no network reaches, and at any port that is free (0), so
# that several runs do not disturb each other. The machine's name is not looked up: in a container it may mean nothing.
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
LOCAL_ADDR=
if [ "$NNODES" = 1 ]; then
    MASTER_PORT="${MASTER_PORT:-0}"
    LOCAL_ADDR=127.0.0.1
fi
MASTER_PORT="${MASTER_PORT:-29500}"

# Seconds that torchrun gives its processes to save and end once it is told to stop, after which it kills them.
SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-900}"
# How often torchrun starts all processes again after one of them failed; they go on from the last checkpoint. Each then waits ten
# seconds before it opens its NPU: HCCL needs them once a process was killed.
MAX_RESTARTS="${MAX_RESTARTS:-0}"

# exec: Ctrl-C and a scheduler's signals reach torchrun itself.
# lumina: the project's own meeting of machines. torchrun's listens on all addresses, without a password.
exec torchrun --nnodes "$NNODES" --nproc_per_node "$NPUS_PER_NODE" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --rdzv_backend lumina --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_conf "rank=$NODE_RANK" \
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_TIMEOUT" -m experiments.finetune "$@"

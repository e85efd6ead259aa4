#!/usr/bin/env bash
# Fine-tune on one machine with eight Ascend 910B. Run it in the project's environment (. .venv/bin/activate):
#
#     bash experiments/launch/ascend_1x8.sh --model DIR --features DIR --out DIR [flags of experiments.finetune]
set -eu
. "$(dirname "$0")/ascend_env.sh"

# Machines, and which of them this is: one, unless the environment says otherwise. For more, ascend_2x8.sh tells what they need.
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
# Where the processes meet: this machine, and a TCP port that is free on it, which is torchrun's own. Two runs on one machine need
# different ports. On one machine everything listens on the loopback (127.0.0.1), which no network reaches.
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"

# Seconds that torchrun gives its processes to save and end once it is told to stop, after which it kills them.
SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-900}"

# exec: Ctrl-C and a scheduler's signals reach torchrun itself.
# lumina: the project's own meeting of machines. torchrun's listens on all addresses, without a password.
exec torchrun --nnodes "$NNODES" --nproc_per_node "$NPUS_PER_NODE" \
    --rdzv_backend lumina --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_conf "rank=$NODE_RANK" \
    --shutdown-timeout "$SHUTDOWN_TIMEOUT" -m experiments.finetune "$@"

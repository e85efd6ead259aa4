#!/usr/bin/env bash
# Fine-tune on two machines with eight Ascend 910B each. Run it on both, within ten minutes, in the project's environment:
#
#     MASTER_ADDR=10.0.0.1 NODE_RANK=0 bash experiments/launch/ascend_2x8.sh --model DIR --features DIR --out DIR [flags]
#     MASTER_ADDR=10.0.0.1 NODE_RANK=1 bash experiments/launch/ascend_2x8.sh ... the same
#
# Both need the same code and the same flags, and see --model and --features under the same path (a shared disk, or copies).
# --out is on a disk that both share: each device saves its part of the training state there. Parameters are sharded over all 16 devices; `--strategy hybrid` shards within each machine
# and keeps a copy on both, which sends less over the network and takes twice the memory.
set -eu
. "$(dirname "$0")/ascend_env.sh"

# Machines, and which of them this is, from 0.
NNODES="${NNODES:-2}"
NODE_RANK="${NODE_RANK:?the number of this machine: 0 on the first, 1 on the second}"
# The first machine, by an address of its own that the others reach (not 127.0.0.1), and a TCP port that is free on it, which is
# torchrun's own. A firewall must let the machines talk to each other on any port: processes choose their own for what follows.
# And it must keep others out: the run listens on the network of MASTER_ADDR alone, but has no password there. Whoever reaches
# these ports can stop the run and change its numbers, so that this is a private network of the machines.
MASTER_ADDR="${MASTER_ADDR:?the address of the first machine on the network that both share}"
MASTER_PORT="${MASTER_PORT:-29500}"
# The network interface between the machines is the one that leads to MASTER_ADDR. Where that is wrong, set it for the
# processes (GLOO_SOCKET_IFNAME=eth0) and for HCCL (HCCL_SOCKET_IFNAME="=eth0"; left alone it takes the first by name).

# Seconds that torchrun gives its processes to save and end once it is told to stop, after which it kills them.
SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-900}"
# How often torchrun starts all processes again after one of them failed; they go on from the last checkpoint. Each then waits ten
# seconds before it opens its NPU: HCCL needs them once a process was killed.
MAX_RESTARTS="${MAX_RESTARTS:-0}"

# lumina: the project's own meeting of machines. torchrun's listens on all addresses.
exec torchrun --nnodes "$NNODES" --nproc_per_node "$NPUS_PER_NODE" \
    --rdzv_backend lumina --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_conf "rank=$NODE_RANK" \
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_TIMEOUT" -m experiments.finetune "$@"

#!/usr/bin/env bash
# Fine-tune on the machines of a Slurm job: one torchrun on each, which starts a process per device.
#
#     sbatch experiments/launch/ascend_slurm.sh --model DIR --features DIR --out DIR [flags of experiments.finetune]
#
# Submit it from the project's folder, in its environment (sbatch passes both on). Paths must be on a disk that all machines
# see. How devices are asked for is a matter of the cluster: add its --gres, --partition and --account lines.
#SBATCH --job-name=lumina
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Fifteen minutes before its time is over a run is told to stop: it saves after its step, and the same command goes on from there.
#SBATCH --signal=TERM@900
#SBATCH --output=lumina-%j.log
set -eu
# Slurm runs a copy of this script: what lies beside it is found from the folder it was submitted in.
. "${SLURM_SUBMIT_DIR:-.}/experiments/launch/ascend_env.sh"

# Machines. Which of them each is needs no NODE_RANK: Slurm says it, by SLURM_NODEID.
NNODES="${NNODES:-$SLURM_NNODES}"
# The first machine of the job, by a name or address of its own that the others reach, and a port for torchrun's own store, another
# one for each job that may share the machine. The run listens on the network of that address alone (on one machine, on the
# loopback) and has no password there: a private network of the machines, which talk to each other on any port.
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

# Seconds that torchrun gives its processes to save and end once it is told to stop, after which it kills them.
SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-900}"
# How often torchrun starts all processes again after one of them failed; they go on from the last checkpoint. Each then waits ten
# seconds before it opens its NPU: HCCL needs them once a process was killed.
MAX_RESTARTS="${MAX_RESTARTS:-0}"

# --kill-on-bad-exit: a machine that fails ends the job on all. lumina: the project's own meeting of machines; torchrun's listen on
# all addresses. Its machine's number is read there.
exec srun --kill-on-bad-exit=1 sh -c 'exec torchrun --rdzv_conf "rank=${SLURM_NODEID:-0}" "$@"' sh \
    --nnodes "$NNODES" --nproc_per_node "$NPUS_PER_NODE" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend lumina --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_TIMEOUT" -m experiments.finetune "$@"

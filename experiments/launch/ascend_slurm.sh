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

# Machines. Which of them each is needs no NODE_RANK: they get their numbers where they meet, by torchrun's c10d.
NNODES="${NNODES:-$SLURM_NNODES}"
# The first machine of the job, and a port of its own for each job that may share it.
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

# Seconds that torchrun gives its processes to save and end once it is told to stop, after which it kills them.
SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-900}"

# --kill-on-bad-exit: a machine that fails ends the job on all.
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$NNODES" --nproc_per_node "$NPUS_PER_NODE" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --shutdown-timeout "$SHUTDOWN_TIMEOUT" -m experiments.finetune "$@"

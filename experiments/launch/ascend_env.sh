# What CANN, HCCL and torch_npu are told, for the launch scripts beside this file, which source it; `python -m experiments.ascend_env`
# says what each variable means and may be. A variable that is already set keeps its value. Those of the guide's table that
# are not here keep their reader's own default: ACLNN_CACHE_LIMIT, MULTI_STREAM_MEMORY_REUSE, NPU_ASD_ENABLE and
# ASCEND_LAUNCH_BLOCKING.

# CANN's own environment: ASCEND_ENV names its set_env.sh, else it is looked for where CANN's installers put it, older and newer
# ones. Where there is none, as on a CPU, nothing is sourced.
for found in ${ASCEND_ENV:+"$ASCEND_ENV"} /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
    if [ -f "$found" ]; then
        set +u # it reads variables that may not be there
        . "$found"
        set -u
        break
    fi
done

# Devices to use on each machine, the first ones: a process each.
export NPUS_PER_NODE="${NPUS_PER_NODE:-8}"

# These seven are as the guide's own pretrain.sh sets them.
# CANN's log: to files, errors only.
export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
# Ops are queued in two stages, so that the device waits less for the host. 1, torch_npu's own default, may take less memory.
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"
export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"
# Each device's threads on cores of their own.
export CPU_AFFINITY_CONF="${CPU_AFFINITY_CONF:-1}"
# Seconds that a device waits for another one's connection. They connect at their first collective, when one rank may still be
# reading its part of the model.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
# Segments that can grow, against fragmentation.
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"

# Seconds that a device waits for the others in a collective. One rank may still be compiling; a rank that died is noticed by
# experiments.finetune itself, at once.
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-3600}"
# A process tokenizes one caption at a time, and its cores are the dispatch's.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-False}"

# What HCCL and torch_npu are told, for the launch scripts beside this file, which source it; see docs/from-mindspeed.md.
# A variable that is already set keeps its value.

# CANN's own environment: ASCEND_ENV names its set_env.sh. Where there is none, as on a CPU, nothing is sourced.
: "${ASCEND_ENV:=/usr/local/Ascend/ascend-toolkit/set_env.sh}"
if [ -f "$ASCEND_ENV" ]; then
    set +u # it reads variables that may not be there
    . "$ASCEND_ENV"
    set -u
fi

# Seconds that a device waits for another one's connection (120 to 7200). They connect at their first collective, when one rank
# may still be reading its part of the model.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
# Seconds that a device waits for the others in a collective (68 to 17340). One rank may still be compiling; a rank that died
# is noticed by experiments.finetune itself, at once.
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-3600}"
# Segments that can grow, against fragmentation.
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
# CANN's log: to files, errors only.
export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"

/* A stand-in for CANN, Ascend's driver and runtime, on a machine without an NPU: torch_npu imports over it.
 *
 * "Device" memory is host memory, streams and events are numbers, and whatever was enqueued is already done. No operator
 * runs: a launch ends in an error, so numbers come only from tests/ascend/npu_sim.py, which never launches one.
 * What torch_npu links against and this file leaves out is filled up by build.py with functions that return 0.
 * The vendor's own headers, which come with the torch_npu wheel, check every signature below.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

enum { DEVICES = 8, ALIGNMENT = 512, CORES = 24 }; /* of an Ascend 910B2, in a server of eight */
static const size_t MEMORY = (size_t)64 << 30;

/* Opaque handles (streams, events, contexts, physical pages) are never dereferenced: any distinct value will do. */
static void *new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

/* ---- Devices: one current device per thread; its context is its address in this table. ---- */
static char contexts[DEVICES];
static __thread int32_t current = 0;

aclError aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return ACL_SUCCESS; }
aclError aclrtGetDevice(int32_t *device) { *device = current; return ACL_SUCCESS; }
aclError aclrtSetDevice(int32_t device) { current = device; return ACL_SUCCESS; }
aclError aclrtGetCurrentContext(aclrtContext *context) { *context = &contexts[current]; return ACL_SUCCESS; }
aclError aclrtSetCurrentContext(aclrtContext context) { current = (int32_t)((char *)context - contexts); return ACL_SUCCESS; }
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return "the CANN stand-in runs no operator: see tests/ascend/npu_sim.py"; }
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) {
    (void)device, (void)what;
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t *value) {
    (void)device, (void)what;
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return ACL_SUCCESS;
}

/* Settings that torch_npu looks up by name, so that the linker does not miss them: accepted and forgotten. */
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { (void)stream, (void)mode; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option, (void)value; return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option, (void)value; return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { (void)option; *value = 0; return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { (void)option, (void)value; return ACL_SUCCESS; }

/* ---- Memory: the host's. ---- */
static aclError allocate(void **address, size_t size) {
    return posix_memalign(address, ALIGNMENT, size ? size : ALIGNMENT) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}
aclError aclrtMalloc(void **address, size_t size, aclrtMemMallocPolicy policy) { (void)policy; return allocate(address, size); }
aclError aclrtMallocAlign32(void **address, size_t size, aclrtMemMallocPolicy policy) { (void)policy; return allocate(address, size); }
aclError aclrtMallocHost(void **address, size_t size) { return allocate(address, size); }
aclError aclrtMallocHostWithCfg(void **address, uint64_t size, aclrtMallocConfig *config) { (void)config; return allocate(address, size); }
aclError aclrtFree(void *address) { free(address); return ACL_SUCCESS; }
aclError aclrtFreeHost(void *address) { free(address); return ACL_SUCCESS; }
aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *available, size_t *total) {
    (void)kind;
    *available = *total = MEMORY;
    return ACL_SUCCESS;
}
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    (void)room, (void)kind;
    memmove(to, from, size);
    return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    (void)room;
    memset(to, value, size);
    return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, aclrtStream stream) {
    (void)stream;
    return aclrtMemset(to, room, value, size);
}

/* ---- Virtual memory of the expandable allocator: a reserved range is usable from the start, so mapping does nothing.
 * munmap wants the size back, which Release is not told: ranges are few and live as long as the process. ---- */
aclError aclrtReserveMemAddress(void **address, size_t size, size_t alignment, void *wanted, uint64_t flags) {
    (void)alignment, (void)wanted, (void)flags;
    *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *address == MAP_FAILED ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}
aclError aclrtMallocPhysical(aclrtDrvMemHandle *pages, size_t size, const aclrtPhysicalMemProp *kind, uint64_t flags) {
    (void)size, (void)kind, (void)flags;
    *pages = new_handle();
    return ACL_SUCCESS;
}

/* ---- Streams and events: what was enqueued is done. ---- */
aclError aclrtCreateStream(aclrtStream *stream) { *stream = new_handle(); return ACL_SUCCESS; }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    return aclrtCreateStream(stream);
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { (void)stream; return ACL_SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { (void)stream, (void)timeout; return ACL_SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    (void)stream;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtCreateEvent(aclrtEvent *event) { *event = new_handle(); return ACL_SUCCESS; }
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flags) { (void)flags; return aclrtCreateEvent(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flags) { (void)flags; return aclrtCreateEvent(event); }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    (void)event;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    (void)start, (void)end;
    *milliseconds = 0;
    return ACL_SUCCESS;
}

/* ---- Operators: described and never run. ---- */
static void *new_object(void) { return calloc(1, ALIGNMENT); }
aclTensorDesc *aclCreateTensorDesc(aclDataType type, int rank, const int64_t *sizes, aclFormat format) {
    (void)type, (void)rank, (void)sizes, (void)format;
    return new_object();
}
void aclDestroyTensorDesc(const aclTensorDesc *description) { free((void *)description); }
aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) { (void)data, (void)size; return new_object(); }
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) { free((void *)buffer); return ACL_SUCCESS; }
aclopAttr *aclopCreateAttr(void) { return new_object(); }
void aclopDestroyAttr(const aclopAttr *attribute) { free((void *)attribute); }
aclError aclopCompileAndExecute(
    const char *type, int inputs, const aclTensorDesc *const input[], const aclDataBuffer *const in[], int outputs,
    const aclTensorDesc *const output[], aclDataBuffer *const out[], const aclopAttr *attribute, aclopEngineType engine,
    aclopCompileType compile, const char *path, aclrtStream stream) {
    (void)inputs, (void)input, (void)in, (void)outputs, (void)output, (void)out, (void)attribute, (void)engine;
    (void)compile, (void)path, (void)stream;
    fprintf(stderr, "CANN stand-in: operator %s was launched, and none can run here\n", type);
    return ACL_ERROR_FEATURE_UNSUPPORTED;
}
size_t aclGetCompileoptSize(aclCompileOpt option) { (void)option; return ALIGNMENT; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size) {
    (void)option;
    memset(value, 0, size);
    return ACL_SUCCESS;
}

// A CUDA device that is not there: what torch, Triton and this package call of the driver's and the
// runtime's library, in one library to preload. Device memory is the host's, kernels do not run, and
// each launch through the driver is kept for `stub_launches`.
//
// Loaded before anything else, and named libcuda.so.1, it is what `dlopen("libcuda.so.1")` finds.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Launches -------------------------------------------------------------------------------------

enum { MOST_LAUNCHES = 4096, MOST_PARAMETERS = 96, MOST_ATTRIBUTES = 8 };

// As tests/support/cuda_stub.py reads it.
typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared, attribute_count, parameter_count;
  int32_t attributes[MOST_ATTRIBUTES][4];
  uint64_t parameters[MOST_PARAMETERS];
} Launch;

// A kernel of a loaded cubin. Its handle is a pointer to one.
typedef struct {
  char name[256];
  uint32_t count;
  uint32_t sizes[MOST_PARAMETERS];
} Kernel;

static Launch launches[MOST_LAUNCHES];
static uint64_t launch_count;
static int recording = 1;
static CUresult fail_with = CUDA_SUCCESS;
static uint64_t runtime_launches;

uint64_t stub_launch_count(void) { return launch_count; }
const Launch* stub_launches(void) { return launches; }
void stub_reset(int record)
{
  launch_count = 0;
  recording = record;
}
// What launches through the driver return from now on.
void stub_fail(int status) { fail_with = (CUresult)status; }
// Launches through the runtime: of torch's own kernels.
uint64_t stub_runtime_launches(void) { return runtime_launches; }
const char* stub_kernel_name(uint64_t function) { return ((const Kernel*)function)->name; }

// Of a library whose kernels are looked at: how many words of eight bytes each parameter has.
static Kernel own[64];
static const void* own_functions[64];
static unsigned own_count;
int stub_takes(const void* function, uint32_t count, const uint32_t* words)
{
  if (own_count == 64) return 0;
  own_functions[own_count] = function;
  own[own_count].count = count;
  memcpy(own[own_count].sizes, words, count * sizeof(uint32_t));
  ++own_count;
  return 1;
}
static const Kernel* own_kernel(const void* function)
{
  for (unsigned i = 0; i < own_count; ++i)
    if (own_functions[i] == function) return &own[i];
  return NULL;
}
static int keep_words(Launch* launch, const Kernel* kernel, void** parameters)
{
  for (uint32_t p = 0; p < kernel->count; ++p) {
    if (launch->parameter_count + kernel->sizes[p] > MOST_PARAMETERS) return 0;
    memcpy(&launch->parameters[launch->parameter_count], parameters[p], 8ul * kernel->sizes[p]);
    launch->parameter_count += kernel->sizes[p];
  }
  return 1;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra)
{
  (void)extra;
  if (fail_with != CUDA_SUCCESS) return fail_with;
  const Kernel* kernel = (const Kernel*)f;
  uint64_t at = __atomic_fetch_add(&launch_count, 1, __ATOMIC_SEQ_CST);
  if (!recording || at >= MOST_LAUNCHES) return CUDA_SUCCESS;
  Launch* launch = &launches[at];
  memset(launch, 0, sizeof(*launch));
  launch->function = (uint64_t)f;
  launch->stream = (uint64_t)config->hStream;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->block[0] = config->blockDimX;
  launch->block[1] = config->blockDimY;
  launch->block[2] = config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  launch->attribute_count = config->numAttrs;
  for (uint32_t i = 0; i < config->numAttrs && i < MOST_ATTRIBUTES; ++i) {
    launch->attributes[i][0] = (int32_t)config->attrs[i].id;
    // Of a cluster three numbers count, of all others the first.
    int values = config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION ? 3 : 1;
    memcpy(&launch->attributes[i][1], &config->attrs[i].value, (size_t)values * sizeof(int32_t));
  }
  if (kernel >= own && kernel < own + own_count)
    return keep_words(launch, kernel, parameters) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  launch->parameter_count = kernel->count;
  // As many bytes as the kernel was compiled to take, so a value of another size is read wrongly.
  for (uint32_t i = 0; i < kernel->count; ++i)
    memcpy(&launch->parameters[i], parameters[i], kernel->sizes[i]);
  return CUDA_SUCCESS;
}

// ---- Cubins ---------------------------------------------------------------------------------------

// Reads the sizes of a kernel's parameters from its ELF section ".nv.info.NAME": records of a format
// byte, an attribute byte and two bytes of size or value, EIATTR_KPARAM_INFO (0x17) holding index,
// ordinal, offset and, in the upper 14 bits of the last word, the size.
static int read_parameters(const unsigned char* image, Kernel* kernel)
{
  uint64_t table = *(const uint64_t*)(image + 0x28);
  uint16_t entry = *(const uint16_t*)(image + 0x3a);
  uint16_t sections = *(const uint16_t*)(image + 0x3c);
  uint16_t names = *(const uint16_t*)(image + 0x3e);
  const unsigned char* headers = image + table;
  const char* text = (const char*)image + *(const uint64_t*)(headers + (size_t)names * entry + 0x18);
  char wanted[300];
  snprintf(wanted, sizeof(wanted), ".nv.info.%s", kernel->name);
  for (uint16_t i = 0; i < sections; ++i) {
    const unsigned char* header = headers + (size_t)i * entry;
    if (strcmp(text + *(const uint32_t*)header, wanted) != 0) continue;
    const unsigned char* at = image + *(const uint64_t*)(header + 0x18);
    const unsigned char* end = at + *(const uint64_t*)(header + 0x20);
    while (at + 4 <= end) {
      unsigned format = at[0], attribute = at[1];
      uint16_t size = *(const uint16_t*)(at + 2);
      if (format == 4 && attribute == 0x17) {
        uint16_t ordinal = *(const uint16_t*)(at + 8);
        uint32_t bits = *(const uint32_t*)(at + 12);
        if (ordinal >= MOST_PARAMETERS) return 0;
        kernel->sizes[ordinal] = bits >> 18;
        if (ordinal + 1u > kernel->count) kernel->count = ordinal + 1u;
      }
      at += 4 + (format == 4 ? size : 0);
    }
    return 1;
  }
  return 0;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image)
{
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name)
{
  Kernel* kernel = calloc(1, sizeof(Kernel));
  snprintf(kernel->name, sizeof(kernel->name), "%s", name);
  if (!read_parameters((const unsigned char*)module, kernel)) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function)
{
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v)
{
  return (void)f, (void)a, (void)v, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return (void)f, (void)c, CUDA_SUCCESS; }

// ---- The device -----------------------------------------------------------------------------------

enum { SHARED = 232448, MULTIPROCESSORS = 132, MAJOR = 9, MINOR = 0 };

CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text)
{
  *text = error == CUDA_SUCCESS ? "no error" : "an error of the stub";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device)
{
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = MAJOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = MINOR; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
static CUcontext context = (CUcontext)1;
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = context, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return (void)c, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d)
{
  return (void)d, *c = context, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice d) { return (void)d, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned* flags, int* active)
{
  (void)d;
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer)
{
  (void)attribute;
  memcpy(value, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

// ---- The runtime ----------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
// Of kernels that `stub_takes` was told of.
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* handle, const void* f)
{
  *handle = (cudaFunction_t)own_kernel(f);
  return *handle ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute attribute, int value)
{
  return (void)f, (void)attribute, (void)value, cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device)
{
  (void)device;
  memset(properties, 0, sizeof(*properties));
  strcpy(properties->name, "NVIDIA H100 80GB HBM3 (stub)");
  properties->totalGlobalMem = (size_t)80 << 30;
  properties->major = MAJOR;
  properties->minor = MINOR;
  properties->multiProcessorCount = MULTIPROCESSORS;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  for (int i = 0; i < 3; ++i) {
    properties->maxGridSize[i] = i == 0 ? INT32_MAX : 65535;
    properties->maxThreadsDim[i] = i == 2 ? 64 : 1024;
  }
  properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = SHARED;
  properties->sharedMemPerMultiprocessor = SHARED + 1024;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device)
{
  return cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest)
{
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b)
{
  return (void)a, (void)b, *can = 0, cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t size)
{
  *pointer = aligned_alloc(512, (size + 511) / 512 * 512);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* pointer) { return free(pointer), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total)
{
  *available = *total = (size_t)80 << 30;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, enum cudaMemcpyKind k, cudaStream_t s)
{
  return (void)k, (void)s, memcpy(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, enum cudaMemcpyKind k)
{
  return (void)k, memcpy(to, from, n), cudaSuccess;
}
static uint64_t clearings;
uint64_t stub_clearings(void) { return clearings; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t s)
{
  return (void)s, ++clearings, memset(to, value, n), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer)
{
  memset(attributes, 0, sizeof(*attributes));
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void*)pointer;
  return cudaSuccess;
}

static uintptr_t next_handle = 0x1000;
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority)
{
  (void)flags, (void)priority;
  *stream = (cudaStream_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return (void)s, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return (void)s, cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f)
{
  return (void)s, (void)e, (void)f, cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags)
{
  (void)flags;
  *event = (cudaEvent_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return (void)e, (void)s, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f)
{
  return (void)e, (void)s, (void)f, cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return (void)e, cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return (void)e, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return (void)e, cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b)
{
  return (void)a, (void)b, *ms = 1, cudaSuccess;
}

// ---- Graphs: what is captured, no more than whether something is ----------------------------------

static cudaStream_t captured;
static int is_captured;
static unsigned long long capture_id;
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode)
{
  return (void)mode, cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
  (void)mode;
  captured = stream;
  is_captured = 1;
  ++capture_id;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status)
{
  *status = is_captured && stream == captured ? cudaStreamCaptureStatusActive
                                              : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
    size_t* count)
{
  (void)edges;
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture_id;
  if (graph) *graph = (cudaGraph_t)1;
  if (dependencies) *dependencies = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
static uint64_t graph_launches;
uint64_t stub_graph_launches(void) { return graph_launches; }
uint64_t stub_captures(void) { return capture_id; }
static uint64_t freed_graphs;
uint64_t stub_freed_graphs(void) { return freed_graphs; }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph)
{
  (void)stream;
  is_captured = 0;
  *graph = (cudaGraph_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count)
{
  return (void)graph, (void)nodes, *count = 1, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t g, unsigned long long f)
{
  (void)g, (void)f;
  *exec = (cudaGraphExec_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
  (void)exec, (void)stream;
  ++graph_launches;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
  return (void)exec, ++freed_graphs, cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return (void)graph, cudaSuccess; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status)
{
  enum cudaStreamCaptureStatus found;
  cudaStreamIsCapturing(stream, &found);
  return *status = (CUstreamCaptureStatus)found, CUDA_SUCCESS;
}

// ---- torch's own kernels do nothing ---------------------------------------------------------------

cudaError_t cudaLaunchKernel(
    const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream)
{
  const Kernel* kernel = own_kernel(f);
  if (kernel) {
    uint64_t at = __atomic_fetch_add(&launch_count, 1, __ATOMIC_SEQ_CST);
    if (!recording || at >= MOST_LAUNCHES) return cudaSuccess;
    Launch* launch = &launches[at];
    memset(launch, 0, sizeof(*launch));
    launch->function = (uint64_t)f;
    launch->stream = (uint64_t)stream;
    memcpy(launch->grid, &grid, sizeof(launch->grid));
    memcpy(launch->block, &block, sizeof(launch->block));
    launch->shared = (uint32_t)shared;
    return keep_words(launch, kernel, arguments) ? cudaSuccess : cudaErrorInvalidValue;
  }
  ++runtime_launches;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream)
{
  return cudaLaunchKernel((const void*)f, grid, block, arguments, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f)
{
  *kernel = (cudaKernel_t)f;
  return cudaSuccess;
}

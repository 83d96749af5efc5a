// A CUDA runtime without a GPU: device memory is host memory, copies copy, kernels do nothing, and all are noted.
//
// FAKE_CUDA_CAPABILITY  compute capability times ten
// FAKE_CUDA_NO_KERNELS  every launch fails, as where a library has no machine code for the GPU
//
// A graph is the copies that were captured. Launching it performs them, and notes those that read from host memory what
// was not there at the capture: a staging buffer that somebody used again.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "log.h"

namespace {

struct Copy {
  void* target;
  const void* source;
  std::string bytes;
  cudaMemcpyKind kind;
};
using Graph = std::vector<Copy>;
using Blocks = std::map<const char*, size_t>;

std::mutex mutex;
Blocks device_blocks, pinned_blocks;
Graph* capture = nullptr;  // one at a time is captured
cudaError_t last_error = cudaSuccess;

std::map<const void*, std::string>& kernel_names() {  // other libraries register kernels before this one's globals exist
  static std::map<const void*, std::string> names;
  return names;
}

int capability() {
  static const char* given = std::getenv("FAKE_CUDA_CAPABILITY");
  return given == nullptr ? 90 : std::atoi(given);
}

int processors() { return capability() == 90 ? 132 : 16; }
int shared_memory() { return capability() == 90 ? 232448 : 101376; }  // the most that a block may ask for

const char* when() { return capture == nullptr ? "" : "captured "; }

void forbidden(const char* call) {
  if (capture != nullptr) fake::note("forbidden %s", call);
}

cudaError_t wait(const char* call) {
  forbidden(call);
  fake::note("wait %s", call);
  return cudaSuccess;
}

cudaError_t discard(void* graph) {
  delete static_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t launch(const void* function) {
  if (std::getenv("FAKE_CUDA_NO_KERNELS") != nullptr) return last_error = cudaErrorNoKernelImageForDevice;
  auto found = kernel_names().find(function);
  fake::note("%skernel %s", when(), found == kernel_names().end() ? "unknown" : found->second.c_str());
  return cudaSuccess;
}

cudaError_t allocate(Blocks& blocks, void** address, size_t size, const char* call) {
  forbidden(call);
  fake::note("%s %zu", call, size);
  const size_t rounded = (size / 512 + 1) * 512;
  *address = std::aligned_alloc(512, rounded);
  std::memset(*address, 0, rounded);
  std::lock_guard<std::mutex> lock(mutex);
  blocks[static_cast<char*>(*address)] = rounded;
  return cudaSuccess;
}

cudaError_t release(Blocks& blocks, void* address, const char* call) {
  forbidden(call);
  std::lock_guard<std::mutex> lock(mutex);
  blocks.erase(static_cast<char*>(address));
  std::free(address);
  return cudaSuccess;
}

bool within(const Blocks& blocks, const void* address) {
  auto next = blocks.upper_bound(static_cast<const char*>(address));
  if (next == blocks.begin()) return false;
  --next;
  return static_cast<const char*>(address) < next->first + next->second;
}

const char* direction(cudaMemcpyKind kind) {
  static const char* names[] = {"host-to-host", "host-to-device", "device-to-host", "device-to-device", "unknown"};
  return names[kind];
}

template <typename T>
cudaError_t give(T* place, T value) {
  *place = value;
  return cudaSuccess;
}

template <typename T>
cudaError_t created(T* object) {
  return give(object, static_cast<T>(fake::handle()));
}

}  // namespace

extern "C" {

// ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(fake::handle()); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernel_names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3(1);
  *shared = 0;
  return give(static_cast<void**>(stream), static_cast<void*>(nullptr));
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return give(kernel, static_cast<cudaKernel_t>(const_cast<void*>(function)));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
cudaError_t cudaLaunchKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) { return launch(host); }
cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(host);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) { return launch(function); }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  return created(library);
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  char* address = strdup(name);
  kernel_names()[address] = name;
  return give(kernel, reinterpret_cast<cudaKernel_t>(address));
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = 49152;
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return give(blocks, 2);
}

// ── the device ──────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaGetDeviceCount(int* count) { return give(count, 1); }
cudaError_t cudaGetDevice(int* device) { return give(device, 0); }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return give(version, 13000); }
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result != nullptr) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = processors(); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_memory(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_memory() + 1024; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  std::memset(device, 0, sizeof *device);
  std::strcpy(device->name, "no GPU");
  device->major = capability() / 10;
  device->minor = capability() % 10;
  device->multiProcessorCount = processors();
  device->totalGlobalMem = 16ull << 30;
  device->totalConstMem = 65536;
  device->l2CacheSize = 50 << 20;
  device->memoryBusWidth = 5120;
  device->memPitch = 2147483647;
  device->warpSize = 32;
  device->regsPerBlock = device->regsPerMultiprocessor = 65536;
  device->sharedMemPerBlock = 49152;
  device->sharedMemPerBlockOptin = shared_memory();
  device->sharedMemPerMultiprocessor = shared_memory() + 1024;
  device->maxThreadsPerBlock = device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024;
  device->maxThreadsDim[2] = 64;
  device->maxThreadsPerMultiProcessor = 2048;
  device->maxBlocksPerMultiProcessor = 32;
  device->maxGridSize[0] = 2147483647;
  device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->concurrentKernels = device->unifiedAddressing = device->cooperativeLaunch = device->memoryPoolsSupported = 1;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "an error of CUDA"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for the device" : "an error of CUDA";
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

// ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaMalloc(void** address, size_t size) { return allocate(device_blocks, address, size, "cudaMalloc"); }
cudaError_t cudaFree(void* address) { return release(device_blocks, address, "cudaFree"); }
cudaError_t cudaMallocFromPoolAsync(void** address, size_t size, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(address, size);
}
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return allocate(pinned_blocks, address, size, "cudaHostAlloc");
}
cudaError_t cudaMallocHost(void** address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFreeHost(void* address) { return release(pinned_blocks, address, "cudaFreeHost"); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = 15ull << 30;
  return give(total, size_t{16} << 30);
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return created(pool); }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return give(static_cast<unsigned long long*>(value), 0ull);
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = within(device_blocks, address)   ? cudaMemoryTypeDevice
                     : within(pinned_blocks, address) ? cudaMemoryTypeHost
                                                      : cudaMemoryTypeUnregistered;
  attributes->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
  forbidden("cudaMemcpy");
  fake::note("copy %s %zu", direction(kind), size);
  std::memmove(target, source, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  fake::note("%scopy %s %zu", when(), direction(kind), size);
  if (capture != nullptr) {
    capture->push_back({target, source, std::string(static_cast<const char*>(source), size), kind});
  } else {
    std::memmove(target, source, size);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaMemcpyAsync(static_cast<char*>(target) + row * target_pitch,
                    static_cast<const char*>(source) + row * source_pitch, width, kind, stream);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* target, const void*, size_t size, size_t, cudaMemcpyKind) {
  std::memset(target, 0, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* target, int value, size_t size) {
  forbidden("cudaMemset");
  std::memset(target, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t) {
  fake::note("%sset %zu", when(), size);
  std::memset(target, value, size);
  return cudaSuccess;
}

// ── streams, events and graphs ──────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return created(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return created(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return give(milliseconds, 1.0f);
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  forbidden("cudaStreamBeginCapture");
  capture = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  return give(graph, reinterpret_cast<cudaGraph_t>(std::exchange(capture, nullptr)));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return give(status, capture == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return give(executable, reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph))));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  fake::note("replay");
  for (const Copy& copy : *reinterpret_cast<Graph*>(executable)) {
    const size_t size = copy.bytes.size();
    if (copy.kind == cudaMemcpyHostToDevice && std::memcmp(copy.source, copy.bytes.data(), size) != 0) {
      fake::note("overwritten %zu", size);
    }
    std::memmove(copy.target, copy.source, size);
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return discard(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return discard(executable); }

}  // extern "C"

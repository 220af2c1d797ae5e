// The CUDA side of the audio core. A build without nvcc links cuda_stub.cpp, which has the same symbols, so
// that the binding needs no #ifdef.
#pragma once
#include <cstdint>

namespace mmlm {

struct CudaStatus {
  bool compiled = false;  // built with nvcc
  int num_devices = 0;
  int error = 0;  // cudaError_t of the device query
  int runtime_version = 0, driver_version = 0;
  const char* message = "";
};

CudaStatus cuda_status();
const char* cuda_error_text(int error);

struct SpectralCudaArgs;  // spectral_device.h
struct DeviceClip;

// Enqueues the kernels for `args` on `stream`; never synchronises, allocates nothing. Returns a cudaError_t.
int spectral_cuda(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips, void* stream, int device);

}  // namespace mmlm

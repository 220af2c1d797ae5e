// Spectral features on CUDA: one fused kernel from samples to log features, and a small one that clips to the dynamic
// range below each clip's maximum. See spectral_device.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "audio/cuda.h"
#include "audio/spectral_device.h"

namespace mmlm {
namespace {

__global__ void __launch_bounds__(kDeviceThreads) features_kernel(const __grid_constant__ SpectralCudaArgs args) {
  extern __shared__ float shared[];
  __shared__ uint32_t block_max;
  const DeviceClip& clip = args.clips[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.frames_per_block;
  if (first >= clip.num_frames) return;
  const int64_t left = clip.num_frames - first;
  const Tile t = {args, clip, shared, first,
                  static_cast<int>(left < args.frames_per_block ? left : args.frames_per_block)};
  const int i = threadIdx.x, n = kDeviceThreads;
  if (i == 0) block_max = 0;
  stage_samples(t, i, n);
  __syncthreads();
  if (args.remove_dc_offset) partial_means(t, i, n);
  __syncthreads();
  means(t, i, n);
  __syncthreads();
  if (args.energy != Energy::none) {
    partial_energies(t, i, n);
    __syncthreads();
    energies(t, i, n);
    __syncthreads();
  }
  apply_window(t, i, n);
  __syncthreads();
  for (int pass = 0; pass < args.num_passes; ++pass) {
    dft_pass(t, pass, i, n);
    __syncthreads();
  }
  powers(t, i, n);
  __syncthreads();
  filters(t, i, n);
  __syncthreads();
  const float largest = write_outputs(t, i, n);
  if (args.dynamic_range <= 0) return;
  atomicMax(&block_max, ordered(largest));
  __syncthreads();
  if (i == 0) atomicMax(args.clip_max + blockIdx.y, block_max);
}

__global__ void __launch_bounds__(kDeviceThreads) clip_kernel(const __grid_constant__ SpectralCudaArgs args) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeviceThreads + threadIdx.x;
  clip_outputs(args, args.clips[blockIdx.y], args.clip_max[blockIdx.y], thread,
               static_cast<int64_t>(gridDim.x) * kDeviceThreads);
}

cudaError_t launch(const SpectralCudaArgs& args, int num_clips, cudaStream_t stream) {
  int64_t most = 0;
  for (int c = 0; c < num_clips; ++c) most = args.clips[c].num_frames > most ? args.clips[c].num_frames : most;
  if (most == 0) return cudaSuccess;
  const size_t bytes = sizeof(float) * args.frames_per_block * args.floats_per_frame();
  cudaError_t error = cudaSuccess;
  if (bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(features_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  if (args.dynamic_range > 0) error = cudaMemsetAsync(args.clip_max, 0, num_clips * sizeof(uint32_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (most + args.frames_per_block - 1) / args.frames_per_block;
  features_kernel<<<dim3(static_cast<unsigned>(tiles), num_clips), kDeviceThreads, bytes, stream>>>(args);
  if (args.dynamic_range > 0) {
    const int64_t blocks = (args.num_out * most + 4 * kDeviceThreads - 1) / (4 * kDeviceThreads);
    const dim3 grid(static_cast<unsigned>(blocks < 1024 ? blocks : 1024), num_clips);
    clip_kernel<<<grid, kDeviceThreads, 0, stream>>>(args);
  }
  return cudaPeekAtLastError();
}

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  status.compiled = true;
  cudaDriverGetVersion(&status.driver_version);
  cudaRuntimeGetVersion(&status.runtime_version);
  const cudaError_t error = cudaGetDeviceCount(&status.num_devices);
  if (error != cudaSuccess) {
    status.num_devices = 0;
    status.error = static_cast<int>(error);
    cudaGetLastError();
  }
  // Without a driver the runtime says "insufficient driver version": say what is true.
  status.message = error == cudaSuccess         ? "ok"
                   : status.driver_version == 0 ? "no NVIDIA driver (libcuda.so.1) on this machine"
                                                : cudaGetErrorString(error);
  return status;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int spectral_cuda(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips, void* stream_handle, int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return error;
  if (current != device && (error = cudaSetDevice(device)) != cudaSuccess) return error;
  uint32_t* const clip_max = args.clip_max;
  for (int64_t first = 0; first < num_clips && error == cudaSuccess; first += kClipsPerLaunch) {
    const int count = static_cast<int>(num_clips - first < kClipsPerLaunch ? num_clips - first : kClipsPerLaunch);
    for (int c = 0; c < count; ++c) args.clips[c] = clips[first + c];
    args.clip_max = clip_max + first;
    error = launch(args, count, static_cast<cudaStream_t>(stream_handle));
  }
  if (current != device) cudaSetDevice(current);
  return error;
}

}  // namespace mmlm

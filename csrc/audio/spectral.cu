// Spectral features on CUDA: one fused kernel from samples to log features, and a small one that clips to the dynamic
// range below each clip's maximum. See spectral_device.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "audio/cuda.h"
#include "audio/spectral_device.h"

namespace mmlm {
namespace {

// A frame's lanes wait for each other: one warp for itself, more of them for the block.
template <int kLanes>
__device__ __forceinline__ void wait() {
  if (kLanes == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Blocks of a multiprocessor: with nothing said ptxas stops at the registers of six, and spills.
template <int kLanes, int kLength>
__global__ void __launch_bounds__(kDeviceThreads, is_known(kLength) ? 5 : 4)
    features_kernel(const __grid_constant__ SpectralCudaArgs args) {
  extern __shared__ float shared[];
  __shared__ uint32_t block_max;
  const DeviceClip& clip = args.clips[blockIdx.y];
  constexpr int kFrames = kDeviceThreads / kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFrames;
  if (first >= clip.num_frames) return;
  const int64_t left = clip.num_frames - first;
  const int num_frames = static_cast<int>(left < kFrames ? left : kFrames), frame = threadIdx.x / kLanes;
  const Frame f = {
      args,  clip, shared + frame * args.floats_per_frame(), first + frame, static_cast<int>(threadIdx.x) % kLanes,
      kLanes};
  const bool is_there = frame < num_frames;
  if (threadIdx.x == 0) block_max = 0;
  if (is_there) stage_samples(f);
  wait<kLanes>();
  if (!args.is_plain()) {
    if (is_there) partial_means(f);
    wait<kLanes>();
    if (is_there) partial_energies(f);
    wait<kLanes>();
    if (is_there) apply_window(f);
    wait<kLanes>();
  }
#pragma unroll
  for (int pass = 0; pass < num_passes<kLength>(args); ++pass) {
    if (is_there) dft_pass<kLength>(f, pass);
    wait<kLanes>();
  }
  if (is_there) powers<kLength>(f);
  wait<kLanes>();
  if (is_there) filters(f);
  __syncthreads();
  const float largest = write_outputs({args, clip, shared, first, 0, kLanes}, num_frames, threadIdx.x);
  if (args.dynamic_range <= 0) return;
  const uint32_t warp_max = __reduce_max_sync(0xffffffffu, ordered(largest));
  if (threadIdx.x % 32 == 0) atomicMax(&block_max, warp_max);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(args.clip_max + blockIdx.y, block_max);
}

__global__ void __launch_bounds__(kDeviceThreads) clip_kernel(const __grid_constant__ SpectralCudaArgs args) {
  clip_outputs(args, args.clips[blockIdx.y], args.clip_max[blockIdx.y],
               static_cast<int64_t>(blockIdx.x) * kDeviceThreads + threadIdx.x, blockIdx.z, gridDim.z);
}

using FeaturesKernel = void (*)(SpectralCudaArgs);

FeaturesKernel kernel_for(const SpectralCudaArgs& args) {
  switch (args.frames_per_block) {
    case 8:
      return args.dft_length == 200   ? features_kernel<32, 200>
             : args.dft_length == 256 ? features_kernel<32, 256>
                                      : features_kernel<32, 0>;
    case 4:
      return features_kernel<64, 0>;
    case 2:
      return features_kernel<128, 0>;
    default:
      return features_kernel<256, 0>;
  }
}

cudaError_t launch(const SpectralCudaArgs& args, int num_clips, cudaStream_t stream) {
  int64_t most = 0;
  for (int c = 0; c < num_clips; ++c) most = args.clips[c].num_frames > most ? args.clips[c].num_frames : most;
  if (most == 0) return cudaSuccess;
  const size_t bytes = sizeof(float) * args.frames_per_block * args.floats_per_frame();
  const FeaturesKernel kernel = kernel_for(args);
  cudaError_t error = cudaSuccess;
  if (bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  if (args.dynamic_range > 0) error = cudaMemsetAsync(args.clip_max, 0, num_clips * sizeof(uint32_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (most + args.frames_per_block - 1) / args.frames_per_block;
  kernel<<<dim3(static_cast<unsigned>(tiles), num_clips), kDeviceThreads, bytes, stream>>>(args);
  if (args.dynamic_range > 0) {
    const int64_t outer = args.bins_first ? args.num_out : most, inner = args.bins_first ? most : args.num_out;
    const int64_t columns = (inner + kDeviceThreads - 1) / kDeviceThreads;
    constexpr int64_t kBlocksWanted = 1024;  // eight for each multiprocessor of a large GPU
    const int64_t wanted = (kBlocksWanted + columns * num_clips - 1) / (columns * num_clips);
    const dim3 grid(static_cast<unsigned>(columns), num_clips, static_cast<unsigned>(wanted < outer ? wanted : outer));
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

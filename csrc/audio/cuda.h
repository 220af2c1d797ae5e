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

// Whisper's mel, log10 and clipping from a complex spectrum on the device. All pointers are device pointers.
struct LogMelCudaArgs {
  const float* spectrum;  // interleaved complex, element strides below count complex numbers
  int64_t clip_stride, bin_stride, frame_stride;
  const int32_t *first_bin, *count, *offset;  // [num_mel_bins], sparse filters as in LogMelPlan
  const float* weights;
  float* out;          // [num_clips, num_mel_bins, num_frames]
  uint32_t* clip_max;  // [num_clips], scratch
  int64_t num_clips, num_frames;
  int num_mel_bins;
};

// Enqueues two kernels on `stream`; never synchronises. Returns a cudaError_t.
int log_mel_cuda(const LogMelCudaArgs& args, void* stream, int device);

}  // namespace mmlm

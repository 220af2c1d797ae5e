// Linked instead of the .cu files when there is no nvcc.
#include "audio/cuda.h"

namespace mmlm {

CudaStatus cuda_status() {
  CudaStatus status;
  status.message = "built without nvcc";
  return status;
}

const char* cuda_error_text(int) { return "built without nvcc"; }

int spectral_cuda(SpectralCudaArgs&, const DeviceClip*, int64_t, void*, int) {
  return 36;  // cudaErrorCallRequiresNewerDriver
}

}  // namespace mmlm

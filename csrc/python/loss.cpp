#include "loss/ops.h"
#include "python/arguments.h"

namespace mmlm {

void bind_loss(pybind11::module_& m) {
  bind(m, "clip_loss_statistics", &clip_loss_statistics);
  bind(m, "clip_loss_gradients", &clip_loss_gradients);
  bind(m, "linear_cross_entropy_rows", &linear_cross_entropy_rows);
  bind(m, "siglip_loss_pairs", &siglip_loss_pairs);
}

}  // namespace mmlm

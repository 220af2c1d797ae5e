#include "attention/interval_attention.h"
#include "python/arguments.h"

namespace mmlm {

void bind_attention(pybind11::module_& m) {
  bind(m, "interval_attention_fwd", &interval_attention_fwd);
  bind(m, "interval_attention_bwd", &interval_attention_bwd);
}

}  // namespace mmlm

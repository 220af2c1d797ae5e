#include "core/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mmlm {
namespace {

std::atomic<int> g_active{-1};

#if defined(__x86_64__)
uint64_t enabled_state() {  // XCR0: which vector registers the operating system saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

Isa capped_by_environment() {
  const char* cap = std::getenv("MMLM_FAST_ISA");
  if (cap == nullptr || *cap == '\0') return best_isa();
  const Isa isa = isa_named(cap, "MMLM_FAST_ISA");
  return has_isa(isa) ? isa : best_isa();
}

}  // namespace

// Own CPUID: __builtin_cpu_supports answers "no" to everything when linked against compiler-rt by zig.
Isa best_isa() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::baseline;
  if (!(c & bit_OSXSAVE) || !(c & bit_FMA)) return Isa::baseline;
  const uint64_t state = enabled_state();
  if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return Isa::baseline;
  const unsigned avx512 = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
  return ((state & 0xe6) == 0xe6 && (b & avx512) == avx512) ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

bool has_isa(Isa isa) {
  if (isa != Isa::wide) return isa <= best_isa();
#if !defined(MMLM_WIDE)
  return false;
#elif defined(__x86_64__)
  return best_isa() >= Isa::avx2;  // what setup.py compiles it for
#else
  return true;
#endif
}

Isa active_isa() {
  int isa = g_active.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(capped_by_environment());
    g_active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

Isa set_isa(Isa isa) {
  const Isa chosen = has_isa(isa) ? isa : best_isa();
  g_active.store(static_cast<int>(chosen), std::memory_order_relaxed);
  return chosen;
}

Isa isa_named(const std::string& name, const char* what) {
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(std::string(what) + " must be baseline, avx2, avx512 or wide, got " + name);
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "wide"};
  return names[static_cast<int>(isa)];
}

}  // namespace mmlm

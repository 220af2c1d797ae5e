// Which instruction set the audio kernels run on, chosen once at run time.
// One translation unit per ISA is compiled from the same source; a function table picks among them.
#pragma once

namespace mmlm {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// Bytes of the widest vectors of any ISA. What is laid out before the ISA is known (plans are shared by all of them)
// and written a vector at a time has rows of a multiple of this.
constexpr int kWidestVectorBytes = 64;

// Best ISA of this CPU and operating system, from CPUID and XGETBV.
Isa best_isa();

// ISA in use: best_isa(), capped by the environment variable MMLM_FAST_ISA (baseline, avx2, avx512).
Isa active_isa();

// For tests: use `isa`, or the best one when this CPU lacks it. Returns what is active afterwards.
Isa set_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace mmlm

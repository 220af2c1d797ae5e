// Which instruction set the audio kernels run on, chosen once at run time.
// One translation unit per ISA is compiled from the same source; a function table picks among them.
#pragma once
#include <string>

namespace mmlm {

// `wide` is for tests: vectors of AVX-512's width on any machine, by the compiler's vector extensions. A build has it
// with MMLM_FAST_WIDE=1 (see setup.py), and it is used only where it is named.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, wide = 3 };
constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::wide};

// Bytes of the widest vectors of any ISA. What is laid out before the ISA is known (plans are shared by all of them)
// and written a vector at a time has rows of a multiple of this.
constexpr int kWidestVectorBytes = 64;

// Best ISA of this CPU and operating system, from CPUID and XGETBV.
Isa best_isa();

// Whether this build and this CPU have it.
bool has_isa(Isa isa);

// ISA in use: best_isa(), or the one that the environment variable MMLM_FAST_ISA names, where there is that. Throws
// std::invalid_argument where it names none.
Isa active_isa();

// For tests: use `isa`, or the best one when this CPU lacks it. Returns what is active afterwards.
Isa set_isa(Isa isa);

const char* isa_name(Isa isa);
Isa isa_named(const std::string& name, const char* what);  // `what`: for the error

}  // namespace mmlm

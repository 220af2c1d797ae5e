// The choice of the instruction set, for every kernel the same. A kernel is compiled once per ISA, in a namespace of
// its name (MMLM_ISA); what calls it declares it for all of them and picks the active one.
#pragma once
#include "core/isa.h"

#if defined(__x86_64__)
#define MMLM_IF_X86(...) __VA_ARGS__
#else
#define MMLM_IF_X86(...)
#endif
#if defined(MMLM_WIDE)
#define MMLM_IF_WIDE(...) __VA_ARGS__
#else
#define MMLM_IF_WIDE(...)
#endif

#define MMLM_DECLARE_IN(isa, returns, name, ...) \
  namespace isa {                                \
  returns name(__VA_ARGS__);                     \
  }
// Declares `returns name(arguments)` for every ISA of this build.
#define MMLM_KERNEL(returns, name, ...)                                                                              \
  MMLM_DECLARE_IN(baseline, returns, name, __VA_ARGS__)                                                              \
  MMLM_IF_X86(MMLM_DECLARE_IN(avx2, returns, name, __VA_ARGS__) MMLM_DECLARE_IN(avx512, returns, name, __VA_ARGS__)) \
  MMLM_IF_WIDE(MMLM_DECLARE_IN(wide, returns, name, __VA_ARGS__))
// The function of that name of the active ISA.
#define MMLM_PICK(name)                                                                        \
  ([] {                                                                                        \
    switch (active_isa()) {                                                                    \
      MMLM_IF_X86(case Isa::avx512 : return avx512::name; case Isa::avx2 : return avx2::name;) \
      MMLM_IF_WIDE(case Isa::wide : return wide::name;) default : return baseline::name;       \
    }                                                                                          \
  }())

// Which instruction set the kernels use, chosen once at run time.
#pragma once
#include <string>

namespace granvit {

enum class Isa { base, avx2, avx512 };

// The best instruction set this machine has, or the one GRANVIT_KERNELS_ISA names (base, avx2, avx512; read once).
// Throws std::runtime_error when it names an unknown one, or one that this machine or build lacks.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace granvit

// GRANVIT_BY_ISA(f, args...) calls granvit::{base,avx2,avx512}::f(args...) by isa().
#ifdef GRANVIT_X86
#define GRANVIT_BY_ISA(f, ...)                                          \
    (::granvit::isa() == ::granvit::Isa::avx512 ? ::granvit::avx512::f(__VA_ARGS__) \
     : ::granvit::isa() == ::granvit::Isa::avx2 ? ::granvit::avx2::f(__VA_ARGS__)   \
                                                : ::granvit::base::f(__VA_ARGS__))
// GRANVIT_DECLARE_PER_ISA(declarations) puts declarations into each ISA's namespace.
#define GRANVIT_DECLARE_PER_ISA(...)                     \
    namespace granvit { namespace base { __VA_ARGS__ }   \
    namespace avx2 { __VA_ARGS__ } namespace avx512 { __VA_ARGS__ } }
#else
#define GRANVIT_BY_ISA(f, ...) ::granvit::base::f(__VA_ARGS__)
#define GRANVIT_DECLARE_PER_ISA(...) namespace granvit { namespace base { __VA_ARGS__ } }
#endif

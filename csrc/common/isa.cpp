#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace granvit {
namespace {

bool runs(Isa isa) {
#ifdef GRANVIT_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : true;
#else
    return isa == Isa::base;
#endif
}

Isa choose() {
    const Isa all[] = {Isa::avx512, Isa::avx2, Isa::base};
    const char* wanted = std::getenv("GRANVIT_KERNELS_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        for (Isa isa : all)
            if (runs(isa)) return isa;
    }
    for (Isa isa : all) {
        if (std::string(wanted) != isa_name(isa)) continue;
        if (!runs(isa)) throw std::runtime_error("GRANVIT_KERNELS_ISA=" + std::string(wanted) + ": this machine lacks it");
        return isa;
    }
    throw std::runtime_error("GRANVIT_KERNELS_ISA=" + std::string(wanted) + ": it takes base, avx2 or avx512");
}

}  // namespace

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base"; }

}  // namespace granvit

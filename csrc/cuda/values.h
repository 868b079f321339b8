// The types that the CUDA kernels store, and how they move.
#pragma once
#include <cstdint>

#include "common/convert.h"

namespace granvit {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

GRANVIT_HOST_DEVICE inline void convert(float x, float& out) { out = x; }
GRANVIT_HOST_DEVICE inline void convert(float x, Bfloat16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    out.bits = float_to_bfloat16(x);
#endif
}
GRANVIT_HOST_DEVICE inline void convert(float x, Float16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    out.bits = float_to_float16(x);
#endif
}

// Elements that move as one; the address must be a multiple of their size.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
    T at[COUNT];
};

// 16 bytes.
using Chunk = Vector<uint32_t, 4>;

// Loads and stores as one access each, by name: the compiler takes a struct's apart where branches meet.
GRANVIT_HOST_DEVICE inline void store_global(void* to, const Chunk& chunk) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(__cvta_generic_to_global(to)), "r"(chunk.at[0]), "r"(chunk.at[1]), "r"(chunk.at[2]), "r"(chunk.at[3])
                 : "memory");
#else
    *static_cast<Chunk*>(to) = chunk;
#endif
}

// 2 to 16 bytes.
template <typename T, int COUNT>
GRANVIT_HOST_DEVICE inline void store_shared(T* to, const Vector<T, COUNT>& values) {
#if defined(__CUDA_ARCH__)
    constexpr int BYTES = sizeof(values), WORDS = BYTES / 4, SOME = WORDS ? WORDS : 1;
    if (BYTES < 4) {
        *to = values.at[0];
        return;
    }
    uint32_t word[SOME];
    memcpy(word, &values, WORDS * 4);
    const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
    if (WORDS == 4)
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "r"(at), "r"(word[0]), "r"(word[1 % SOME]), "r"(word[2 % SOME]), "r"(word[3 % SOME]) : "memory");
    else if (WORDS == 2)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(at), "r"(word[0]), "r"(word[1 % SOME]) : "memory");
    else
        asm volatile("st.shared.b32 [%0], %1;" :: "r"(at), "r"(word[0]) : "memory");
#else
    *reinterpret_cast<Vector<T, COUNT>*>(to) = values;
#endif
}

// A chunk of an image. Its address comes through shared memory, so the compiler can't see that it is global.
GRANVIT_HOST_DEVICE inline Chunk load_image(const void* from) {
#if defined(__CUDA_ARCH__)
    const uint4 four = __ldg(static_cast<const uint4*>(from));
    return {{four.x, four.y, four.z, four.w}};
#else
    return *static_cast<const Chunk*>(from);
#endif
}

}  // namespace granvit

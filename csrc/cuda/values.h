// The types that the CUDA kernels store, and how they move.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/convert.h"

// Before a loop that is run seldom: its steps side by side would cost registers that others need.
#if defined(__CUDACC__)
#define GRANVIT_NOT_UNROLLED _Pragma("unroll 1")
#else
#define GRANVIT_NOT_UNROLLED
#endif

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

// 16 bytes of an image into shared memory, both at multiples of 16 bytes. The thread goes on before they have arrived:
// `each.loading` waits for them.
GRANVIT_HOST_DEVICE inline void load_shared(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)) : "memory");
#else
    *static_cast<Chunk*>(to) = *static_cast<const Chunk*>(from);
#endif
}

// Elements that nothing writes while the kernel runs, as one access.
template <typename T, int COUNT>
GRANVIT_HOST_DEVICE inline Vector<T, COUNT> load_global(const Vector<T, COUNT>* from) {
#if defined(__CUDA_ARCH__)
    static_assert(sizeof(*from) == 8 || sizeof(*from) == 16, "one access");
    using Words = std::conditional_t<sizeof(*from) == 8, uint2, uint4>;
    const Words words = __ldg(reinterpret_cast<const Words*>(from));
    Vector<T, COUNT> elements;
    memcpy(&elements, &words, sizeof(elements));
    return elements;
#else
    return *from;
#endif
}
GRANVIT_HOST_DEVICE inline int32_t load_global(const int32_t* from) {
#if defined(__CUDA_ARCH__)
    return __ldg(from);
#else
    return *from;
#endif
}

// ---- arithmetic on the four bytes of a word ----

// The bytes of (low, high), numbered 0 to 7, that the four hexadecimal digits of `which` name, the lowest first.
GRANVIT_HOST_DEVICE inline uint32_t permute(uint32_t low, uint32_t high, uint32_t which) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, which);
#else
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t out = 0;
    for (int k = 0; k < 4; ++k) out |= uint32_t(both >> 8 * (which >> 4 * k & 7) & 255) << 8 * k;
    return out;
#endif
}

// The word that starts `bits` % 32 bits into (low, high).
GRANVIT_HOST_DEVICE inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_r(low, high, bits);
#else
    return uint32_t((uint64_t(high) << 32 | low) >> (bits & 31));
#endif
}

// sum + the products of two halves of 16 bits and two bytes: the lower two of `bytes`, or the upper two.
template <bool UPPER>
GRANVIT_HOST_DEVICE inline uint32_t dot_halves(uint32_t halves, uint32_t bytes, uint32_t sum) {
#if defined(__CUDA_ARCH__)
    return UPPER ? __dp2a_hi(halves, bytes, sum) : __dp2a_lo(halves, bytes, sum);
#else
    bytes >>= UPPER ? 16 : 0;
    return sum + (halves & 0xffff) * (bytes & 255) + (halves >> 16) * (bytes >> 8 & 255);
#endif
}

// sum + the products of four signed bytes and four unsigned ones.
GRANVIT_HOST_DEVICE inline uint32_t dot_bytes(uint32_t signed_bytes, uint32_t bytes, uint32_t sum) {
#if defined(__CUDA_ARCH__)
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(signed_bytes));
#else
    for (int k = 0; k < 4; ++k) sum += uint32_t(int8_t(signed_bytes >> 8 * k & 255) * int32_t(bytes >> 8 * k & 255));
#endif
    return sum;
}

}  // namespace granvit

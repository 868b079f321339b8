// One float32 to bfloat16 or float16 and back, to the nearest, ties to even, as torch rounds. Internal linkage: files of
// every instruction set include this, and the linker must not hand one's copy to another.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GRANVIT_HOST_DEVICE __host__ __device__
#else
#define GRANVIT_HOST_DEVICE
#endif

namespace granvit {

GRANVIT_HOST_DEVICE static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
GRANVIT_HOST_DEVICE static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

GRANVIT_HOST_DEVICE static inline float bfloat16_to_float(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

GRANVIT_HOST_DEVICE static inline uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry it into infinity
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

GRANVIT_HOST_DEVICE static inline float float16_to_float(uint16_t half) {
    // Shift exponent and mantissa into float32's place; a multiplication fixes the bias and normalises subnormals.
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    uint32_t bits = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    if ((half & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000u;  // infinity and NaN
    return float_of_bits(bits | uint32_t(half & 0x8000) << 16);
}

GRANVIT_HOST_DEVICE static inline uint16_t float_to_float16(float x) {
    uint32_t bits = bits_of_float(x);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to more than the largest float16
    if (bits < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
        return uint16_t(sign | (bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13));
}

}  // namespace granvit

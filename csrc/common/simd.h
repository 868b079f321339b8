// One float32 vector type a ISA, with loads and stores from float32, bfloat16 and float16. For *_isa.cpp files only:
// everything lies in granvit::GRANVIT_ISA, so that each ISA links its own copy.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/convert.h"

namespace granvit {
namespace GRANVIT_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef float VecU __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t VecI __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t VecH __attribute__((vector_size(WIDTH * 2)));
typedef uint16_t VecHU __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// ---- one value ----
inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bfloat16_to_float(x.bits); }
inline float to_float(float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    return float16_to_float(x.bits);
#endif
}
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bfloat16& out) { out.bits = float_to_bfloat16(x); }
inline void from_float(float x, float16& out) {
#if defined(__F16C__)
    out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    out.bits = float_to_float16(x);
#endif
}

// ---- WIDTH values ----
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecU*>(p) = x; }

inline Vec load(const bfloat16* p) {
    const VecH half = *reinterpret_cast<const VecHU*>(p);
    return (Vec)(__builtin_convertvector(half, VecI) << 16);
}
inline void store(bfloat16* p, Vec x) {
    const VecI bits = (VecI)x;
    const VecI nan = (VecI)((bits & 0x7fffffffu) > 0x7f800000u);
    const VecI rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecI out = (nan & 0x7fc0u) | (~nan & rounded);
    *reinterpret_cast<VecHU*>(p) = __builtin_convertvector(out, VecH);
}

inline Vec load(const float16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec out;
    for (int i = 0; i < WIDTH; ++i) out[i] = to_float(p[i]);
    return out;
#endif
}
inline void store(float16* p, Vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < WIDTH; ++i) from_float(x[i], p[i]);
#endif
}

// Stores past the caches, for outputs that nobody reads soon. The address must be streamable(); end with stream_fence().
inline bool streamable(const void* p) { return reinterpret_cast<uintptr_t>(p) % (WIDTH * 4) == 0; }
#if defined(__AVX512F__)
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, (__m512)x); }
#elif defined(__AVX2__)
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, (__m256)x); }
#elif defined(__x86_64__)
inline void stream(float* p, Vec x) { _mm_stream_ps(p, (__m128)x); }
#else
inline void stream(float* p, Vec x) { store(p, x); }
#endif
template <typename T>
inline void stream(T* p, Vec x) { store(p, x); }  // half a line at a time gains nothing
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Runs `call` with T the stored type of a Dtype.
#define GRANVIT_BY_DTYPE(dtype, call)                              \
    switch (dtype) {                                               \
        case Dtype::float32: { using T = float; call; break; }     \
        case Dtype::bfloat16: { using T = bfloat16; call; break; } \
        case Dtype::float16: { using T = float16; call; break; }   \
    }

}  // namespace GRANVIT_ISA
}  // namespace granvit

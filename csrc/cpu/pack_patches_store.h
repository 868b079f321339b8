// Finished pixels into patches: normalised, in the stored type, in their places. For pack_patches_*_isa.cpp only.
#pragma once
#include "common/simd.h"
#include "cpu/pack_patches.h"

namespace granvit {
namespace GRANVIT_ISA {

inline Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__SSE2__)
    int32_t four;
    std::memcpy(&four, p, 4);
    const __m128i zero = _mm_setzero_si128();
    const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero);
    return (Vec)_mm_cvtepi32_ps(_mm_unpacklo_epi16(words, zero));
#else
    return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
#endif
}

template <typename Source, typename T>
inline void normalise(const Source* source, const float* scale, const float* bias, int64_t values, T* out) {
    int64_t k = 0;
    for (; k + WIDTH <= values; k += WIDTH) store(out + k, load(source + k) * load(scale + k) + load(bias + k));
    for (; k < values; ++k) from_float(float(source[k]) * scale[k] + bias[k], out[k]);
}

// Output row y of the crop, pixels 0-255 in RGBRGB..., into its row of each patch.
template <typename Source, typename T>
void store_line(const PatchRows& job, const Source* line, int64_t y) {
    const int64_t p = job.patch_size, values = 3 * p, r = y % p;
    for (int64_t x = 0; x < job.grid_width; ++x, line += values) {
        T* patch = static_cast<T*>(job.patches) + patch_index(y / p, x, job.grid_width, job.merge) * values * p;
        if (!job.channels_first) {
            normalise(line, job.scale, job.bias, values, patch + r * values);
            continue;
        }
        for (int64_t k = 0; k < p; ++k)
            for (int64_t c = 0; c < 3; ++c) job.segment[c * p + k] = float(line[3 * k + c]);
        for (int64_t c = 0; c < 3; ++c)
            normalise(job.segment + c * p, job.scale + c * p, job.bias + c * p, p, patch + (c * p + r) * p);
    }
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

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

// over: a vector may read and write past `values`, up to WIDTH - 1 further.
template <typename Source, typename T>
inline void normalise(const Source* source, const float* scale, const float* bias, int64_t values, bool over, T* out) {
    int64_t k = 0;
    for (; k + WIDTH <= values || (over && k < values); k += WIDTH)
        store(out + k, load(source + k) * load(scale + k) + load(bias + k));
    for (; k < values; ++k) from_float(float(source[k]) * scale[k] + bias[k], out[k]);
}

// RGBRGB... as three rows that lie `pitch` apart
inline void split_channels(const float* line, int64_t pixels, float* planes, int64_t pitch) {
    for (int64_t k = 0; k < pixels; ++k)
        for (int64_t c = 0; c < 3; ++c) planes[c * pitch + k] = line[3 * k + c];
}
inline void split_channels(const uint8_t* line, int64_t pixels, uint8_t* planes, int64_t pitch) {
    int64_t k = 0;
#if defined(__AVX2__)
    // Of 48 bytes in three vectors, channel c's 16: those that vector v has, in their places.
    alignas(16) int8_t places[3][3][16];
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 3; ++v)
            for (int i = 0; i < 16; ++i) {
                const int at = 3 * i + c - 16 * v;
                places[c][v][i] = at >= 0 && at < 16 ? at : -1;
            }
    __m128i masks[3][3];
    std::memcpy(masks, places, sizeof(masks));
    for (; k + 16 <= pixels; k += 16) {
        const __m128i* from = reinterpret_cast<const __m128i*>(line + 3 * k);
        const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), d = _mm_loadu_si128(from + 2);
        for (int c = 0; c < 3; ++c) {
            const __m128i two = _mm_or_si128(_mm_shuffle_epi8(a, masks[c][0]), _mm_shuffle_epi8(b, masks[c][1]));
            const __m128i plane = _mm_or_si128(two, _mm_shuffle_epi8(d, masks[c][2]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + c * pitch + k), plane);
        }
    }
#endif
    for (; k < pixels; ++k)
        for (int64_t c = 0; c < 3; ++c) planes[c * pitch + k] = line[3 * k + c];
}

// Output row y of the crop, pixels 0-255 in RGBRGB..., into its row of each patch. Rows come in order, so a vector may write
// into those of its patch that follow. padded: the line may be read past its end.
template <typename Source, typename T>
void store_line(const PatchRows& job, const Source* line, int64_t y, bool padded) {
    const int64_t p = job.patch_size, width = job.grid_width * p, r = y % p;
    Source* planes = reinterpret_cast<Source*>(job.planes);
    const int64_t pitch = width + WIDTH;
    if (job.channels_first) split_channels(line, width, planes, pitch);
    // A row of at least half a vector: what a vector writes beyond it, the next row holds.
    const bool room = r + 1 < p && (job.channels_first ? p : 3 * p) >= WIDTH / 2;
    for (int64_t x = 0; x < job.grid_width; ++x) {
        T* patch = static_cast<T*>(job.patches) + patch_index(y / p, x, job.grid_width, job.merge) * 3 * p * p;
        if (!job.channels_first) {
            const bool over = room && (padded || x + 1 < job.grid_width);
            normalise(line + 3 * x * p, job.scale, job.bias, 3 * p, over, patch + 3 * r * p);
            continue;
        }
        for (int64_t c = 0; c < 3; ++c)
            normalise(planes + c * pitch + x * p, job.scale + c * p, job.bias + c * p, p, room, patch + (c * p + r) * p);
    }
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

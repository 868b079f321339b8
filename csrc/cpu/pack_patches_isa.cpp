// One row of patches: resample down the columns, then along the rows, normalise, store.
//
// Down the columns comes first: it is the pass that reads every source pixel, and it runs along contiguous bytes. The
// pass along the rows takes one output pixel at a time, its three channels (and an idle lane) in a 4-wide vector.
#include "common/simd.h"
#include "cpu/pack_patches.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

typedef float Pixel __attribute__((vector_size(16)));
typedef float PixelU __attribute__((vector_size(16), aligned(4), may_alias));
using GRANVIT_ISA::load;
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

constexpr float ONE = 1;
constexpr int AHEAD = 512;  // bytes: so many rows at once are more than the hardware's prefetcher follows

// out[k] = sum over t of weights[t] * source[t * stride + k] for N vectors of k, kept in registers
template <int N>
inline void blend_block(const uint8_t* source, int64_t stride, const float* weights, int64_t taps, float* out) {
    Vec sum[N] = {};
    for (int64_t t = 0; t < taps; ++t, source += stride) {
        __builtin_prefetch(source + AHEAD);
        __builtin_prefetch(source + AHEAD + 64);
        const Vec weight = splat(weights[t]);
        for (int n = 0; n < N; ++n) sum[n] += weight * load(source + n * WIDTH);
    }
    for (int n = 0; n < N; ++n) store(out + n * WIDTH, sum[n]);
}

inline void blend_rows(const uint8_t* source, int64_t stride, const float* weights, int64_t taps, int64_t values,
                       float* out) {
    int64_t k = 0;
    for (; k + 8 * WIDTH <= values; k += 8 * WIDTH) blend_block<8>(source + k, stride, weights, taps, out + k);
    for (; k + WIDTH <= values; k += WIDTH) blend_block<1>(source + k, stride, weights, taps, out + k);
    for (; k < values; ++k) {
        float sum = 0;
        for (int64_t t = 0; t < taps; ++t) sum += weights[t] * float(source[t * stride + k]);
        out[k] = sum;
    }
}

// Reads one float past the row's last pixel and writes one past the line's: both have padding.
inline void blend_columns(const float* row, const Taps& taps, int64_t outputs, float* line) {
    for (int64_t i = 0; i < outputs; ++i) {
        const float* weights = taps.weights + i * taps.taps;
        const float* source = row + 3 * taps.first[i];
        Pixel sum = {};
        for (int64_t t = 0; t < taps.taps; ++t) sum += weights[t] * *reinterpret_cast<const PixelU*>(source + 3 * t);
        *reinterpret_cast<PixelU*>(line + 3 * i) = sum;
    }
}

template <typename Source, typename T>
inline void normalise(const Source* source, const float* scale, const float* bias, int64_t values, T* out) {
    int64_t k = 0;
    for (; k + WIDTH <= values; k += WIDTH) store(out + k, load(source + k) * load(scale + k) + load(bias + k));
    for (; k < values; ++k) from_float(float(source[k]) * scale[k] + bias[k], out[k]);
}

// One output row, pixels 0-255 in RGBRGB..., into row r of each patch
template <typename Source, typename T>
void store_line(const PatchRow& job, const Source* line, int64_t r) {
    const int64_t p = job.patch_size, values = 3 * p;
    T* patch = static_cast<T*>(job.patches);
    for (int64_t x = 0; x < job.grid_width; ++x, line += values, patch += values * p) {
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

template <typename T>
void patch_row(const PatchRow& job) {
    const Taps &rows = *job.rows, &columns = *job.columns;
    for (int64_t r = 0; r < job.patch_size; ++r) {
        const int64_t y = job.top + r;
        if (rows.copies && columns.copies) {
            store_line<uint8_t, T>(job, job.window + y * job.row_stride, r);
            continue;
        }
        const uint8_t* source = job.window + (rows.copies ? y : rows.first[y]) * job.row_stride;
        blend_rows(source, job.row_stride, rows.copies ? &ONE : rows.weights + y * rows.taps,
                   rows.copies ? 1 : rows.taps, 3 * job.window_width, job.row);
        if (!columns.copies) blend_columns(job.row, columns, job.grid_width * job.patch_size, job.line);
        store_line<float, T>(job, columns.copies ? job.row : job.line, r);
    }
}

}  // namespace

void pack_patch_row(const PatchRow& job) {
    GRANVIT_BY_DTYPE(job.dtype, patch_row<T>(job))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

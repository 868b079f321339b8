// Rows of patches without rounding: resample down the columns, then along the rows, normalise, store.
//
// Down the columns comes first: it is the pass that reads every source pixel, and it runs along contiguous bytes. The
// pass along the rows takes one output pixel at a time, its three channels (and an idle lane) in a 4-wide vector.
#include "cpu/pack_patches_store.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

typedef float Pixel __attribute__((vector_size(16)));
typedef float PixelU __attribute__((vector_size(16), aligned(4), may_alias));

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

template <typename T>
void pack(const PatchRows& job) {
    const Taps &rows = *job.rows, &columns = *job.columns;
    for (int64_t y = job.begin * job.patch_size; y < job.end * job.patch_size; ++y) {
        const uint8_t* source = job.source + (rows.copies ? y : rows.first[y]) * job.row_stride;
        if (rows.copies && columns.copies) {
            store_line<uint8_t, T>(job, source, y, false);
            continue;
        }
        blend_rows(source, job.row_stride, rows.copies ? &ONE : rows.weights + y * rows.taps,
                   rows.copies ? 1 : rows.taps, 3 * job.source_columns, job.blended);
        if (!columns.copies) blend_columns(job.blended, columns, job.grid_width * job.patch_size, job.line);
        store_line<float, T>(job, columns.copies ? job.blended : job.line, y, true);
    }
}

}  // namespace

void pack_exact(const PatchRows& job) {
    GRANVIT_BY_DTYPE(job.dtype, pack<T>(job))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

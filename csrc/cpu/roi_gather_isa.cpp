// The arithmetic of roi_gather, once an ISA. A run of channels is held in registers while the cells or bins pass.
#include "cpu/roi_gather.h"

#include "common/simd.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

template <int N, bool STREAMING, typename T>
inline void bins_of_channels(const T* tokens, T* out, int64_t channels, int width, RoiLists rows, RoiLists columns) {
    for (int ph = 0; ph < rows.count; ++ph) {
        for (int pw = 0; pw < columns.count; ++pw) {
            Vec sum[N] = {};
            for (int32_t y = rows.begin[ph]; y < rows.begin[ph + 1]; ++y) {
                const T* row = tokens + int64_t(rows.taps[y].cell) * width * channels;
                for (int32_t x = columns.begin[pw]; x < columns.begin[pw + 1]; ++x) {
                    const T* token = row + columns.taps[x].cell * channels;
                    const Vec weight = splat(rows.taps[y].weight * columns.taps[x].weight);
                    for (int n = 0; n < N; ++n) sum[n] += weight * load(token + n * WIDTH);
                }
            }
            T* bin = out + (int64_t(ph) * columns.count + pw) * channels;
            for (int n = 0; n < N; ++n) {
                if (STREAMING) stream(bin + n * WIDTH, sum[n]);
                else store(bin + n * WIDTH, sum[n]);
            }
        }
    }
}

template <typename T>
inline void bins_of_one_channel(const T* tokens, T* out, int64_t channels, int width, RoiLists rows, RoiLists columns) {
    for (int ph = 0; ph < rows.count; ++ph) {
        for (int pw = 0; pw < columns.count; ++pw) {
            float sum = 0;
            for (int32_t y = rows.begin[ph]; y < rows.begin[ph + 1]; ++y)
                for (int32_t x = columns.begin[pw]; x < columns.begin[pw + 1]; ++x)
                    sum += rows.taps[y].weight * columns.taps[x].weight *
                           to_float(tokens[(int64_t(rows.taps[y].cell) * width + columns.taps[x].cell) * channels]);
            from_float(sum, out[(int64_t(ph) * columns.count + pw) * channels]);
        }
    }
}

template <typename T>
void box(const T* tokens, T* out, int64_t channels, int64_t from, int64_t to, int width, RoiLists rows,
         RoiLists columns, bool streaming) {
    int64_t c = from;
    streaming = streaming && streamable(out) && channels % WIDTH == 0;
    for (; c + 8 * WIDTH <= to; c += 8 * WIDTH) {
        if (streaming) bins_of_channels<8, true>(tokens + c, out + c, channels, width, rows, columns);
        else bins_of_channels<8, false>(tokens + c, out + c, channels, width, rows, columns);
    }
    for (; c + WIDTH <= to; c += WIDTH)
        bins_of_channels<1, false>(tokens + c, out + c, channels, width, rows, columns);
    for (; c < to; ++c) bins_of_one_channel(tokens + c, out + c, channels, width, rows, columns);
    if (streaming) stream_fence();
}

template <int N>
inline void scatter_channels(const float* packed, float* sum, int64_t size, int width, int out_w, RoiLists rows,
                             RoiLists columns) {
    for (int h = 0; h < rows.count; ++h) {
        float* row = sum + (int64_t(rows.first + h) * width + columns.first) * size;
        const RoiTap* y_begin = rows.taps + rows.begin[h];
        const RoiTap* y_end = rows.taps + rows.begin[h + 1];
        if (y_begin == y_end) continue;
        for (int w = 0; w < columns.count; ++w) {
            const RoiTap* x_begin = columns.taps + columns.begin[w];
            const RoiTap* x_end = columns.taps + columns.begin[w + 1];
            if (x_begin == x_end) continue;
            Vec total[N];
            for (int n = 0; n < N; ++n) total[n] = load(row + w * size + n * WIDTH);
            for (const RoiTap* y = y_begin; y < y_end; ++y) {
                for (const RoiTap* x = x_begin; x < x_end; ++x) {
                    const float* bin = packed + (int64_t(y->cell) * out_w + x->cell) * size;
                    const Vec weight = splat(y->weight * x->weight);
                    for (int n = 0; n < N; ++n) total[n] += weight * load(bin + n * WIDTH);
                }
            }
            for (int n = 0; n < N; ++n) store(row + w * size + n * WIDTH, total[n]);
        }
    }
}

template <typename T>
void pack(const T* grad, float* packed, int64_t channels, int64_t size, int bins) {
    for (int bin = 0; bin < bins; ++bin, grad += channels, packed += size) {
        int64_t c = 0;
        for (; c + WIDTH <= size; c += WIDTH) store(packed + c, load(grad + c));
        for (; c < size; ++c) packed[c] = to_float(grad[c]);
    }
}

template <typename T>
void unpack(const float* sum, T* out, int64_t channels, int64_t size, int64_t cells, bool streaming) {
    streaming = streaming && streamable(out) && channels % WIDTH == 0;
    for (int64_t cell = 0; cell < cells; ++cell, sum += size, out += channels) {
        int64_t c = 0;
        if (streaming)
            for (; c + WIDTH <= size; c += WIDTH) stream(out + c, load(sum + c));
        for (; c + WIDTH <= size; c += WIDTH) store(out + c, load(sum + c));
        for (; c < size; ++c) from_float(sum[c], out[c]);
    }
    if (streaming) stream_fence();
}

}  // namespace

void roi_gather_box(Dtype dtype, const void* tokens, void* out, int64_t channels, int64_t from, int64_t to, int width,
                    RoiLists rows, RoiLists columns, bool streaming) {
    GRANVIT_BY_DTYPE(dtype, box(static_cast<const T*>(tokens), static_cast<T*>(out), channels, from, to, width, rows,
                                columns, streaming))
}

void roi_gather_pack(Dtype dtype, const void* grad, float* packed, int64_t channels, int64_t from, int64_t size,
                     int bins) {
    GRANVIT_BY_DTYPE(dtype, pack(static_cast<const T*>(grad) + from, packed, channels, size, bins))
}

void roi_gather_scatter(const float* packed, float* sum, int64_t size, int width, int out_w, RoiLists rows,
                        RoiLists columns) {
    int64_t c = 0;
    for (; c + 4 * WIDTH <= size; c += 4 * WIDTH)
        scatter_channels<4>(packed + c, sum + c, size, width, out_w, rows, columns);
    for (; c + WIDTH <= size; c += WIDTH) scatter_channels<1>(packed + c, sum + c, size, width, out_w, rows, columns);
    for (; c < size; ++c) {
        for (int h = 0; h < rows.count; ++h) {
            for (int w = 0; w < columns.count; ++w) {
                float& total = sum[(int64_t(rows.first + h) * width + columns.first + w) * size + c];
                for (int32_t y = rows.begin[h]; y < rows.begin[h + 1]; ++y)
                    for (int32_t x = columns.begin[w]; x < columns.begin[w + 1]; ++x)
                        total += rows.taps[y].weight * columns.taps[x].weight *
                                 packed[(int64_t(rows.taps[y].cell) * out_w + columns.taps[x].cell) * size + c];
            }
        }
    }
}

void roi_gather_unpack(Dtype dtype, const float* sum, void* grad_tokens, int64_t channels, int64_t from, int64_t size,
                       int64_t cells, bool streaming) {
    GRANVIT_BY_DTYPE(dtype, unpack(sum, static_cast<T*>(grad_tokens) + from, channels, size, cells, streaming))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

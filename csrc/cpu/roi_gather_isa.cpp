// The arithmetic of roi_gather, once an ISA. A run of channels is held in registers while a list's taps pass.
#include "cpu/roi_gather.h"

#include "common/simd.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

// Where a list's sum goes: to a row of the output, past the caches or not, or onto what is there.
enum class To { store, stream, add };

// N vectors of channels: to the row of a list the sum of weight * row over its taps. Rows are `stride` values apart.
template <int N, To TO, typename T>
inline void sum_vectors(const T* rows, T* out, int64_t stride, const RoiTap* tap, const RoiTap* end) {
    Vec sum[N] = {};
    for (; tap < end; ++tap) {
        const T* row = rows + tap->place * stride;
        const Vec weight = splat(tap->weight);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[n] += weight * load(row + n * WIDTH);
    }
#pragma GCC unroll 8  // or GCC keeps the sums on the stack
    for (int n = 0; n < N; ++n) {
        if (TO == To::stream) stream(out + n * WIDTH, sum[n]);
        else if (TO == To::add) store(out + n * WIDTH, load(out + n * WIDTH) + sum[n]);
        else store(out + n * WIDTH, sum[n]);
    }
}

// Channels [from, to) of all lists of a box.
template <To TO, typename T>
inline void sum_lists(const T* rows, T* out, int64_t stride, int64_t from, int64_t to, RoiLists box) {
    const RoiTap* tap = box.taps;
    for (const RoiList* list = box.lists; list < box.lists + box.count; ++list) {
        const RoiTap* end = box.taps + list->end;
        T* sums = out + list->place * stride;
        int64_t c = from;
        for (; c + 8 * WIDTH <= to; c += 8 * WIDTH) sum_vectors<8, TO>(rows + c, sums + c, stride, tap, end);
        for (; c + 4 * WIDTH <= to; c += 4 * WIDTH) sum_vectors<4, TO>(rows + c, sums + c, stride, tap, end);
        for (; c + WIDTH <= to; c += WIDTH) sum_vectors<1, TO>(rows + c, sums + c, stride, tap, end);
        for (; c < to; ++c) {
            float sum = 0;
            for (const RoiTap* t = tap; t < end; ++t) sum += t->weight * to_float(rows[t->place * stride + c]);
            from_float(TO == To::add ? to_float(sums[c]) + sum : sum, sums[c]);
        }
        tap = end;
    }
}

template <typename T>
void gather(const T* tokens, T* out, int64_t channels, int64_t from, int64_t to, RoiLists bins, bool streaming) {
    if (streaming && streamable(out) && channels % WIDTH == 0) {
        sum_lists<To::stream>(tokens, out, channels, from, to, bins);
        stream_fence();
    } else {
        sum_lists<To::store>(tokens, out, channels, from, to, bins);
    }
}

template <typename T>
void pack(const T* grad, float* packed, int64_t channels, int64_t size, int64_t bins) {
    for (int64_t bin = 0; bin < bins; ++bin, grad += channels, packed += size) {
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

void roi_gather_box(Dtype dtype, const void* tokens, void* out, int64_t channels, int64_t from, int64_t to,
                    RoiLists bins, bool streaming) {
    GRANVIT_BY_DTYPE(dtype, gather(static_cast<const T*>(tokens), static_cast<T*>(out), channels, from, to, bins,
                                   streaming))
}

void roi_gather_pack(Dtype dtype, const void* grad, float* packed, int64_t channels, int64_t from, int64_t size,
                     int64_t bins) {
    GRANVIT_BY_DTYPE(dtype, pack(static_cast<const T*>(grad) + from, packed, channels, size, bins))
}

void roi_gather_scatter(const float* packed, float* sum, int64_t size, RoiLists cells) {
    sum_lists<To::add>(packed, sum, size, 0, size, cells);
}

void roi_gather_unpack(Dtype dtype, const float* sum, void* grad_tokens, int64_t channels, int64_t from, int64_t size,
                       int64_t cells, bool streaming) {
    GRANVIT_BY_DTYPE(dtype, unpack(sum, static_cast<T*>(grad_tokens) + from, channels, size, cells, streaming))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

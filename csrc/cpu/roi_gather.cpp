// Geometry, partition and threads of roi_gather; roi_gather_isa.cpp has the arithmetic.
#include "cpu/roi_gather.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/parallel.h"

namespace granvit {
namespace {

// Outputs larger than this go past the caches: they would only push the tokens out of them.
constexpr int64_t STREAM_BYTES = int64_t(8) << 20;
// Channels of one backward item: an image's float32 sums of so many channels stay in a core's L2 cache.
constexpr int64_t BLOCK = 64;

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

RoiAxis axis_of(const RoiGather& p, int64_t box, bool vertical) {
    const float* b = p.boxes + 4 * box;
    const int32_t* grid = p.grids + 2 * p.image[box];
    return vertical ? RoiAxis(b[1], b[3], p.out_h, p.sampling_ratio, grid[0])
                    : RoiAxis(b[0], b[2], p.out_w, p.sampling_ratio, grid[1]);
}

// The bins' lists of cells. begin has room for bins + 1, taps for bins * capacity().
RoiLists bin_lists(const RoiAxis& axis, int bins, int32_t* begin, RoiTap* taps) {
    begin[0] = 0;
    for (int i = 0; i < bins; ++i) begin[i + 1] = begin[i] + axis.taps(i, taps + begin[i]);
    return {begin, taps, 0, bins};
}

// The same pairs by cell: the cells' lists of bins. begin has room for size + 2.
RoiLists cell_lists(const RoiLists& bins, int32_t* begin, RoiTap* taps) {
    const int32_t total = bins.begin[bins.count];
    if (total == 0) return {begin, taps, 0, 0};
    int32_t first = bins.taps[0].cell, last = first;
    for (int32_t i = 1; i < total; ++i) {
        first = std::min(first, bins.taps[i].cell);
        last = std::max(last, bins.taps[i].cell);
    }
    const int32_t count = last - first + 1;
    std::fill(begin, begin + count + 2, 0);
    for (int32_t i = 0; i < total; ++i) ++begin[bins.taps[i].cell - first + 2];
    for (int32_t c = 0; c < count; ++c) begin[c + 2] += begin[c + 1];
    // begin[c + 1] is now cell c's write position, and its end (begin of c + 1) after the last write.
    for (int32_t bin = 0; bin < bins.count; ++bin)
        for (int32_t i = bins.begin[bin]; i < bins.begin[bin + 1]; ++i)
            taps[begin[bins.taps[i].cell - first + 1]++] = {bin, bins.taps[i].weight};
    return {begin, taps, first, count};
}

// Room for one box's bin lists.
struct Scratch {
    std::vector<int32_t> begin_y, begin_x;
    std::vector<RoiTap> taps_y, taps_x;
    Scratch(const RoiGather& p, int64_t taps_y, int64_t taps_x)
        : begin_y(p.out_h + 1), begin_x(p.out_w + 1), taps_y(taps_y), taps_x(taps_x) {}
};

// One for each thread, large enough for every box.
std::vector<Scratch> scratches(const RoiGather& p) {
    int64_t most_y = 0, most_x = 0;
    for (int64_t box = 0; box < p.num_boxes; ++box) {
        most_y = std::max(most_y, axis_of(p, box, true).capacity());
        most_x = std::max(most_x, axis_of(p, box, false).capacity());
    }
    return std::vector<Scratch>(std::max(p.threads, 1), Scratch(p, most_y * p.out_h, most_x * p.out_w));
}

}  // namespace

void roi_gather_forward(const RoiGather& p, const void* tokens, void* out) {
    if (p.num_boxes == 0 || p.channels == 0) return;
    const int64_t bins = int64_t(p.out_h) * p.out_w, item_bytes = size_of(p.dtype);
    const bool streaming = p.num_boxes * bins * p.channels * item_bytes > STREAM_BYTES;
    // Few boxes share out their channels, so that every thread has work.
    const int64_t parts = p.num_boxes >= 4 * p.threads ? 1 : (p.channels + 127) / 128;
    const int64_t part = (((p.channels + parts - 1) / parts) + 63) / 64 * 64;
    auto scratch = scratches(p);
    parallel_for(p.num_boxes * parts, p.threads, [&](int64_t item, int thread) {
        const int64_t box = item / parts, from = item % parts * part, to = std::min(from + part, p.channels);
        if (from >= to) return;
        Scratch& s = scratch[thread];
        const int64_t image = p.image[box];
        const RoiLists rows = bin_lists(axis_of(p, box, true), p.out_h, s.begin_y.data(), s.taps_y.data());
        const RoiLists columns = bin_lists(axis_of(p, box, false), p.out_w, s.begin_x.data(), s.taps_x.data());
        GRANVIT_BY_ISA(roi_gather_box, p.dtype,
                       static_cast<const char*>(tokens) + p.cu_seqlens[image] * p.channels * item_bytes,
                       static_cast<char*>(out) + box * bins * p.channels * item_bytes, p.channels, from, to,
                       p.grids[2 * image + 1], rows, columns, streaming);
    });
}

void roi_gather_backward(const RoiGather& p, const void* grad, void* grad_tokens) {
    if (p.images == 0 || p.channels == 0) return;
    const int64_t bins = int64_t(p.out_h) * p.out_w, item_bytes = size_of(p.dtype);

    // The boxes of each image, in their order; and every box's lists by cell, in one piece of memory.
    std::vector<int64_t> begin(p.images + 2, 0), order(p.num_boxes);
    for (int64_t box = 0; box < p.num_boxes; ++box) ++begin[p.image[box] + 2];
    for (int64_t image = 0; image < p.images; ++image) begin[image + 2] += begin[image + 1];
    for (int64_t box = 0; box < p.num_boxes; ++box) order[begin[p.image[box] + 1]++] = box;
    std::vector<int64_t> tap_at(2 * p.num_boxes + 1, 0), begin_at(2 * p.num_boxes + 1, 0);
    for (int64_t box = 0; box < p.num_boxes; ++box) {
        for (int vertical = 0; vertical < 2; ++vertical) {
            const RoiAxis axis = axis_of(p, box, vertical);
            const int64_t i = 2 * box + vertical;
            tap_at[i + 1] = tap_at[i] + axis.capacity() * (vertical ? p.out_h : p.out_w);
            begin_at[i + 1] = begin_at[i] + axis.size + 2;
        }
    }
    std::vector<RoiTap> taps(tap_at.back());
    std::vector<int32_t> begins(begin_at.back());
    std::vector<RoiLists> lists(2 * p.num_boxes);
    auto scratch = scratches(p);
    parallel_for(p.num_boxes, p.threads, [&](int64_t box, int thread) {
        Scratch& s = scratch[thread];
        for (int vertical = 0; vertical < 2; ++vertical) {
            const int64_t i = 2 * box + vertical;
            const RoiLists by_bin =
                vertical ? bin_lists(axis_of(p, box, true), p.out_h, s.begin_y.data(), s.taps_y.data())
                         : bin_lists(axis_of(p, box, false), p.out_w, s.begin_x.data(), s.taps_x.data());
            lists[i] = cell_lists(by_bin, begins.data() + begin_at[i], taps.data() + tap_at[i]);
        }
    });

    // An item is a block of an image's channels: it owns what it writes.
    int64_t longest = 0;
    for (int64_t image = 0; image < p.images; ++image)
        longest = std::max<int64_t>(longest, p.cu_seqlens[image + 1] - p.cu_seqlens[image]);
    const int64_t blocks = (p.channels + BLOCK - 1) / BLOCK;
    const bool streaming = int64_t(p.cu_seqlens[p.images]) * p.channels * item_bytes > STREAM_BYTES;
    const int64_t room = (longest + bins) * BLOCK;
    std::unique_ptr<float[]> buffer(new float[std::max(p.threads, 1) * room]);
    parallel_for(p.images * blocks, p.threads, [&](int64_t item, int thread) {
        const int64_t image = item / blocks, from = item % blocks * BLOCK, size = std::min(BLOCK, p.channels - from);
        const int64_t start = p.cu_seqlens[image], cells = p.cu_seqlens[image + 1] - start;
        float* sum = buffer.get() + thread * room;
        float* packed = sum + longest * BLOCK;
        std::fill(sum, sum + cells * size, 0.0f);
        for (int64_t i = begin[image]; i < begin[image + 1]; ++i) {
            const int64_t box = order[i];
            GRANVIT_BY_ISA(roi_gather_pack, p.dtype,
                           static_cast<const char*>(grad) + box * bins * p.channels * item_bytes, packed, p.channels, from,
                           size, int(bins));
            GRANVIT_BY_ISA(roi_gather_scatter, packed, sum, size, p.grids[2 * image + 1], p.out_w, lists[2 * box + 1],
                           lists[2 * box]);
        }
        GRANVIT_BY_ISA(roi_gather_unpack, p.dtype, sum,
                       static_cast<char*>(grad_tokens) + start * p.channels * item_bytes, p.channels, from, size, cells,
                       streaming);
    });
}

}  // namespace granvit

// Geometry, partition and threads of roi_gather; roi_gather_isa.cpp has the arithmetic.
#include "cpu/roi_gather.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/layout.h"
#include "common/parallel.h"
#include "common/roi_geometry.h"

namespace granvit {
namespace {

// Outputs larger than this go past the caches: they would only push the tokens out of them.
constexpr int64_t STREAM_BYTES = int64_t(8) << 20;
// Channels of one item: so much of an image (backward: in float32) stays in a core's L2 cache while its boxes pass.
constexpr int64_t FORWARD_BLOCK = 128, BACKWARD_BLOCK = 64;

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
    // begin[c + 1] is cell c's write position now, and where cell c + 1 begins once all is written.
    for (int32_t bin = 0; bin < bins.count; ++bin)
        for (int32_t i = bins.begin[bin]; i < bins.begin[bin + 1]; ++i)
            taps[begin[bins.taps[i].cell - first + 1]++] = {bin, bins.taps[i].weight};
    return {begin, taps, first, count};
}

// What both directions need before the arithmetic.
struct Plan {
    std::vector<int64_t> begin, order;    // image i's boxes, in their order: order[begin[i]] to order[begin[i + 1]]
    std::vector<RoiLists> rows, columns;  // each box's lists: cells of a bin, or bins of a cell
    std::vector<RoiTap> taps;
    std::vector<int32_t> begins;

    Plan(const RoiGather& p, bool by_cell)
        : begin(p.images + 2, 0), order(p.num_boxes), rows(p.num_boxes), columns(p.num_boxes) {
        for (int64_t box = 0; box < p.num_boxes; ++box) ++begin[p.image[box] + 2];
        for (int64_t image = 0; image < p.images; ++image) begin[image + 2] += begin[image + 1];
        for (int64_t box = 0; box < p.num_boxes; ++box) order[begin[p.image[box] + 1]++] = box;

        // Room: two lists of lists a box and axis, by bin and by cell (the latter only if asked for).
        std::vector<int64_t> tap_at(2 * p.num_boxes + 1, 0), begin_at(2 * p.num_boxes + 1, 0);
        for (int64_t i = 0; i < 2 * p.num_boxes; ++i) {
            const RoiAxis axis = axis_of(p, i / 2, i % 2);
            const int bins = i % 2 ? p.out_h : p.out_w;
            tap_at[i + 1] = tap_at[i] + axis.capacity() * bins * (by_cell ? 2 : 1);
            begin_at[i + 1] = begin_at[i] + bins + 1 + (by_cell ? axis.size + 2 : 0);
        }
        taps.resize(tap_at.back());
        begins.resize(begin_at.back());
        parallel_for((p.num_boxes + 15) / 16, p.threads, [&](int64_t item, int) {
            for (int64_t i = 32 * item; i < std::min(32 * item + 32, 2 * p.num_boxes); ++i) {
                const RoiAxis axis = axis_of(p, i / 2, i % 2);
                const int bins = i % 2 ? p.out_h : p.out_w;
                RoiTap* tap = taps.data() + tap_at[i];
                int32_t* start = begins.data() + begin_at[i];
                RoiLists lists = bin_lists(axis, bins, start, tap);
                if (by_cell) lists = cell_lists(lists, start + bins + 1, tap + axis.capacity() * bins);
                (i % 2 ? rows : columns)[i / 2] = lists;
            }
        });
    }
};

}  // namespace

void roi_gather_forward(const RoiGather& p, const void* tokens, void* out) {
    check_layout("tokens", p.num_tokens, p.grids, p.cu_seqlens, p.images);
    if (p.num_boxes == 0 || p.channels == 0) return;
    const int64_t bins = int64_t(p.out_h) * p.out_w, item_bytes = size_of(p.dtype);
    const bool streaming = p.num_boxes * bins * p.channels * item_bytes > STREAM_BYTES;
    const Plan plan(p, false);

    // An item is a block of channels of some boxes of one image.
    const int64_t blocks = (p.channels + FORWARD_BLOCK - 1) / FORWARD_BLOCK;
    const int64_t most = std::clamp<int64_t>(p.num_boxes * blocks / (4 * p.threads), 1, 64);
    struct Item { int64_t image, block, from, to; };
    std::vector<Item> items;
    for (int64_t image = 0; image < p.images; ++image)
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t from = plan.begin[image]; from < plan.begin[image + 1]; from += most)
                items.push_back({image, block, from, std::min(from + most, plan.begin[image + 1])});
    parallel_for(int64_t(items.size()), p.threads, [&](int64_t index, int) {
        const Item item = items[index];
        const int64_t from = item.block * FORWARD_BLOCK, to = std::min(from + FORWARD_BLOCK, p.channels);
        const char* first = static_cast<const char*>(tokens) + p.cu_seqlens[item.image] * p.channels * item_bytes;
        for (int64_t i = item.from; i < item.to; ++i) {
            const int64_t box = plan.order[i];
            GRANVIT_BY_ISA(roi_gather_box, p.dtype, first,
                           static_cast<char*>(out) + box * bins * p.channels * item_bytes, p.channels, from, to,
                           p.grids[2 * item.image + 1], plan.rows[box], plan.columns[box], streaming);
        }
    });
}

void roi_gather_backward(const RoiGather& p, const void* grad, void* grad_tokens) {
    check_layout("the tokens' gradient", p.num_tokens, p.grids, p.cu_seqlens, p.images);
    if (p.images == 0 || p.channels == 0) return;
    const int64_t bins = int64_t(p.out_h) * p.out_w, item_bytes = size_of(p.dtype);
    const bool streaming = int64_t(p.cu_seqlens[p.images]) * p.channels * item_bytes > STREAM_BYTES;
    const Plan plan(p, true);

    // An item is a block of an image's channels: it owns what it writes.
    int64_t longest = 0;
    for (int64_t image = 0; image < p.images; ++image)
        longest = std::max<int64_t>(longest, p.cu_seqlens[image + 1] - p.cu_seqlens[image]);
    const int64_t blocks = (p.channels + BACKWARD_BLOCK - 1) / BACKWARD_BLOCK;
    const int64_t room = (longest + bins) * BACKWARD_BLOCK;
    std::unique_ptr<float[]> buffer(new float[p.threads * room]);
    parallel_for(p.images * blocks, p.threads, [&](int64_t item, int thread) {
        const int64_t image = item / blocks, from = item % blocks * BACKWARD_BLOCK;
        const int64_t size = std::min(BACKWARD_BLOCK, p.channels - from);
        const int64_t start = p.cu_seqlens[image], cells = p.cu_seqlens[image + 1] - start;
        float* sum = buffer.get() + thread * room;
        float* packed = sum + longest * BACKWARD_BLOCK;
        std::fill(sum, sum + cells * size, 0.0f);
        for (int64_t i = plan.begin[image]; i < plan.begin[image + 1]; ++i) {
            const int64_t box = plan.order[i];
            GRANVIT_BY_ISA(roi_gather_pack, p.dtype,
                           static_cast<const char*>(grad) + box * bins * p.channels * item_bytes, packed, p.channels, from,
                           size, int(bins));
            GRANVIT_BY_ISA(roi_gather_scatter, packed, sum, size, p.grids[2 * image + 1], p.out_w, plan.rows[box],
                           plan.columns[box]);
        }
        GRANVIT_BY_ISA(roi_gather_unpack, p.dtype, sum,
                       static_cast<char*>(grad_tokens) + start * p.channels * item_bytes, p.channels, from, size, cells,
                       streaming);
    });
}

}  // namespace granvit

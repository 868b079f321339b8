// Geometry, partition and threads of roi_gather; roi_gather_isa.cpp has the arithmetic.
#include "cpu/roi_gather.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/layout.h"
#include "common/parallel.h"
#include "common/roi_geometry.h"

namespace granvit {
namespace {

// Outputs larger than this go past the caches: they would only push the tokens out of them.
constexpr int64_t STREAM_BYTES = int64_t(8) << 20;
// Channels of one item: so much of a box (forward), or of an image's gradient in float32 (backward), stays in a core's L2
// cache. Forward, more would be read again from the L3 cache, and less would visit each page of the output more often.
constexpr int64_t FORWARD_BLOCK = 256, BACKWARD_BLOCK = 64;
// Boxes whose gradients are summed on their own: a float32 sum over hundreds of boxes that meet at one token loses digits.
constexpr int64_t BATCH = 64;
constexpr int64_t LINE = 64, PAGE = 4096;

RoiAxis axis_of(const RoiGather& p, int64_t box, bool vertical) {
    const float* b = p.boxes + 4 * box;
    const int32_t* grid = p.grids + 2 * p.image[box];
    return vertical ? RoiAxis(b[1], b[3], p.out_h, p.sampling_ratio, grid[0])
                    : RoiAxis(b[0], b[2], p.out_w, p.sampling_ratio, grid[1]);
}

// One axis' lists: of bin i, or of cell first + i, taps[begin[i]] to taps[begin[i + 1]].
struct AxisLists {
    const int32_t* begin;
    const RoiTap* taps;
    int32_t first;
    int32_t count;

    int64_t total() const { return begin[count]; }
};

// The bins' lists of cells. begin has room for bins + 1, taps for bins * capacity().
AxisLists bin_lists(const RoiAxis& axis, int bins, int32_t* begin, RoiTap* taps) {
    begin[0] = 0;
    for (int i = 0; i < bins; ++i) begin[i + 1] = begin[i] + axis.taps(i, taps + begin[i]);
    return {begin, taps, 0, bins};
}

// The same pairs by cell: the cells' lists of bins. begin has room for size + 2.
AxisLists cell_lists(const AxisLists& bins, int32_t* begin, RoiTap* taps) {
    begin[0] = 0;
    if (bins.total() == 0) return {begin, taps, 0, 0};
    int32_t first = bins.taps[0].place, last = first;
    for (int32_t i = 1; i < bins.total(); ++i) {
        first = std::min(first, bins.taps[i].place);
        last = std::max(last, bins.taps[i].place);
    }
    const int32_t count = last - first + 1;
    std::fill(begin, begin + count + 2, 0);
    for (int32_t i = 0; i < bins.total(); ++i) ++begin[bins.taps[i].place - first + 2];
    for (int32_t c = 0; c < count; ++c) begin[c + 2] += begin[c + 1];
    // begin[c + 1] is cell c's write position now, and where cell c + 1 begins once all is written.
    for (int32_t bin = 0; bin < bins.count; ++bin)
        for (int32_t i = bins.begin[bin]; i < bins.begin[bin + 1]; ++i)
            taps[begin[bins.taps[i].place - first + 1]++] = {bin, bins.taps[i].weight};
    return {begin, taps, first, count};
}

// Every row's list times every column's. Places count along rows of list_width and tap_width.
// Lists without taps are left out where nothing is to be written for them.
RoiLists product(const AxisLists& rows, const AxisLists& columns, int list_width, int tap_width, bool leave_out_empty,
                 RoiList* lists, RoiTap* taps) {
    RoiList* list = lists;
    int32_t end = 0;
    for (int32_t row = 0; row < rows.count; ++row) {
        const RoiTap* y_begin = rows.taps + rows.begin[row];
        const RoiTap* y_end = rows.taps + rows.begin[row + 1];
        if (leave_out_empty && y_begin == y_end) continue;
        for (int32_t column = 0; column < columns.count; ++column) {
            const RoiTap* x_begin = columns.taps + columns.begin[column];
            const RoiTap* x_end = columns.taps + columns.begin[column + 1];
            if (leave_out_empty && x_begin == x_end) continue;
            for (const RoiTap* y = y_begin; y < y_end; ++y)
                for (const RoiTap* x = x_begin; x < x_end; ++x)
                    taps[end++] = {y->place * tap_width + x->place, y->weight * x->weight};
            *list++ = {(rows.first + row) * list_width + columns.first + column, end};
        }
    }
    return {lists, taps, list - lists};
}

// What both directions need before the arithmetic. A box' lists are made once for all of its channels. Combining rows
// first and then columns would not multiply less: a bin of 2 x 2 samples reads about three rows of three cells.
struct Plan {
    std::vector<int64_t> begin, order;  // image i's boxes, in their order: order[begin[i]] to order[begin[i + 1]]
    std::vector<RoiLists> boxes;        // each box's lists

    Plan(const RoiGather& p, bool by_cell) : begin(p.images + 2, 0), order(p.num_boxes), boxes(p.num_boxes) {
        for (int64_t box = 0; box < p.num_boxes; ++box) ++begin[p.image[box] + 2];
        for (int64_t image = 0; image < p.images; ++image) begin[image + 2] += begin[image + 1];
        for (int64_t box = 0; box < p.num_boxes; ++box) order[begin[p.image[box] + 1]++] = box;

        // Room: two axes a box, by bin and by cell (the latter only if asked for).
        std::vector<int64_t> tap_at(2 * p.num_boxes + 1, 0), begin_at(2 * p.num_boxes + 1, 0);
        for (int64_t i = 0; i < 2 * p.num_boxes; ++i) {
            const RoiAxis axis = axis_of(p, i / 2, i % 2);
            const int bins = i % 2 ? p.out_h : p.out_w;
            tap_at[i + 1] = tap_at[i] + axis.capacity() * bins * (by_cell ? 2 : 1);
            begin_at[i + 1] = begin_at[i] + bins + 1 + (by_cell ? axis.size + 2 : 0);
        }
        const std::unique_ptr<RoiTap[]> axis_taps(new RoiTap[tap_at.back()]);
        const std::unique_ptr<int32_t[]> begins(new int32_t[begin_at.back()]);
        std::vector<AxisLists> axes(2 * p.num_boxes);
        const int64_t items = (p.num_boxes + 15) / 16;
        parallel_for(items, p.threads, [&](int64_t item, int) {
            for (int64_t i = 32 * item; i < std::min(32 * item + 32, 2 * p.num_boxes); ++i) {
                const RoiAxis axis = axis_of(p, i / 2, i % 2);
                const int bins = i % 2 ? p.out_h : p.out_w;
                RoiTap* tap = axis_taps.get() + tap_at[i];
                int32_t* start = begins.get() + begin_at[i];
                axes[i] = bin_lists(axis, bins, start, tap);
                if (by_cell) axes[i] = cell_lists(axes[i], start + bins + 1, tap + axis.capacity() * bins);
            }
        });

        std::vector<int64_t> list_from(p.num_boxes + 1, 0), tap_from(p.num_boxes + 1, 0);
        for (int64_t box = 0; box < p.num_boxes; ++box) {
            const AxisLists &columns = axes[2 * box], &rows = axes[2 * box + 1];
            const int64_t most = std::numeric_limits<int32_t>::max();
            if (int64_t(p.out_h) * p.out_w > most || rows.total() * columns.total() > most)
                throw std::invalid_argument("output_size is too large: a box has more than 2147483647 bins, or they read "
                                            "more cells than that");
            list_from[box + 1] = list_from[box] + int64_t(rows.count) * columns.count;
            tap_from[box + 1] = tap_from[box] + rows.total() * columns.total();
        }
        lists.reset(new RoiList[list_from.back()]);
        taps.reset(new RoiTap[tap_from.back()]);
        parallel_for(items, p.threads, [&](int64_t item, int) {
            for (int64_t box = 16 * item; box < std::min(16 * item + 16, p.num_boxes); ++box) {
                const int width = p.grids[2 * p.image[box] + 1];
                boxes[box] = product(axes[2 * box + 1], axes[2 * box], by_cell ? width : p.out_w, by_cell ? p.out_w : width,
                                     by_cell, lists.get() + list_from[box], taps.get() + tap_from[box]);
            }
        });
    }

   private:
    std::unique_ptr<RoiList[]> lists;
    std::unique_ptr<RoiTap[]> taps;
};

// Fetches into the L2 cache what is read next: rows of `bytes`, `stride` bytes apart.
void fetch(const void* first, int64_t rows, int64_t stride, int64_t bytes) {
    const char* row = static_cast<const char*>(first);
    for (int64_t i = 0; i < rows; ++i, row += stride)
        for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(row + at, 0, 2);
}

// Has the processor look up the pages of rows that are written next past the caches, by fetching a line of each: stores
// would wait for one page after the other, and what follows for them.
void look_up(const void* first, int64_t rows, int64_t stride) {
    const char* row = static_cast<const char*>(first);
    uintptr_t page = 0;
    for (int64_t i = 0; i < rows; ++i, row += stride) {
        if (reinterpret_cast<uintptr_t>(row) / PAGE == page) continue;
        page = reinterpret_cast<uintptr_t>(row) / PAGE;
        __builtin_prefetch(row, 0, 2);
    }
}

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
            char* bin = static_cast<char*>(out) + box * bins * p.channels * item_bytes;
            if (streaming) look_up(bin + from * item_bytes, bins, p.channels * item_bytes);
            GRANVIT_BY_ISA(roi_gather_box, p.dtype, first, bin, p.channels, from, to, plan.boxes[box], streaming);
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
    const int64_t room = (2 * longest + bins) * BACKWARD_BLOCK;  // floats, whole lines: vectors that cross lines cost more
    const std::unique_ptr<float[]> memory(new float[p.threads * room + LINE / 4]);
    float* const buffer = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) % LINE) / 4;
    parallel_for(p.images * blocks, p.threads, [&](int64_t item, int thread) {
        const int64_t image = item / blocks, from = item % blocks * BACKWARD_BLOCK;
        const int64_t size = std::min(BACKWARD_BLOCK, p.channels - from);
        const int64_t start = p.cu_seqlens[image], cells = p.cu_seqlens[image + 1] - start;
        float* sum = buffer + thread * room;
        float* batch = sum + longest * BACKWARD_BLOCK;
        float* packed = batch + longest * BACKWARD_BLOCK;
        const int64_t first = plan.begin[image], end = plan.begin[image + 1];
        const bool batches = end - first > BATCH;
        const auto grad_of = [&](int64_t box) {
            return static_cast<const char*>(grad) + box * bins * p.channels * item_bytes;
        };
        std::fill(sum, sum + cells * size, 0.0f);
        if (batches) std::fill(batch, batch + cells * size, 0.0f);
        for (int64_t i = first; i < end; ++i) {
            const int64_t box = plan.order[i];
            GRANVIT_BY_ISA(roi_gather_pack, p.dtype, grad_of(box), packed, p.channels, from, size, bins);
            if (i + 1 < end)
                fetch(grad_of(plan.order[i + 1]) + from * item_bytes, bins, p.channels * item_bytes, size * item_bytes);
            GRANVIT_BY_ISA(roi_gather_scatter, packed, batches ? batch : sum, size, plan.boxes[box]);
            if (!batches || ((i + 1 - first) % BATCH != 0 && i + 1 < end)) continue;
            for (int64_t k = 0; k < cells * size; ++k) {
                sum[k] += batch[k];
                batch[k] = 0;
            }
        }
        GRANVIT_BY_ISA(roi_gather_unpack, p.dtype, sum,
                       static_cast<char*>(grad_tokens) + start * p.channels * item_bytes, p.channels, from, size, cells,
                       streaming);
    });
}

}  // namespace granvit

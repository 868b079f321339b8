// RoIAlign on packed tokens; the specification is granvit_kernels/ops/roi_gather/reference.py.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace granvit {

struct RoiGather {
    Dtype dtype;                // of tokens, output and their gradients
    const int32_t* grids;       // [images, 2]
    const int32_t* cu_seqlens;  // [images + 1]
    const float* boxes;         // [num_boxes, 4], finite
    const int64_t* image;       // [num_boxes], each in [0, images)
    int64_t images, num_boxes, channels;
    int64_t num_tokens;         // rows of tokens or of their gradient
    int out_h, out_w;
    int64_t sampling_ratio;
    int threads;
};

// tokens [T, channels] -> out [num_boxes, out_h, out_w, channels].
void roi_gather_forward(const RoiGather& p, const void* tokens, void* out);

// grad [num_boxes, out_h, out_w, channels] -> grad_tokens [T, channels], all of it written.
// A token's gradient adds its boxes in their order, whatever the threads: equal bits for any number of them.
void roi_gather_backward(const RoiGather& p, const void* grad, void* grad_tokens);

// What a list reads (a cell of a bin's list, or a bin of a cell's), and its share.
struct RoiTap {
    int32_t place;
    float weight;
};
// Who owns a list (a bin, or a cell), and where its taps end; they begin where the list before ends.
struct RoiList {
    int32_t place;
    int32_t end;
};
// One box: forward, every bin's cells; backward, the bins of every cell that one reads.
struct RoiLists {
    const RoiList* lists;
    const RoiTap* taps;
    int64_t count;  // lists
};

}  // namespace granvit

GRANVIT_DECLARE_PER_ISA(
    // One box, channels [from, to): tokens is its image's first token. streaming: write past the caches.
    void roi_gather_box(Dtype dtype, const void* tokens, void* out, int64_t channels, int64_t from, int64_t to,
                        RoiLists bins, bool streaming);
    // One box's gradient, channels [from, from + size), as float32 into packed [out_h * out_w, size].
    void roi_gather_pack(Dtype dtype, const void* grad, float* packed, int64_t channels, int64_t from, int64_t size,
                         int64_t bins);
    // Adds a packed gradient to sum [h * width, size]. A cell's share is summed on its own and added once.
    void roi_gather_scatter(const float* packed, float* sum, int64_t size, RoiLists cells);
    // sum [cells, size] -> channels [from, from + size) of grad_tokens [cells, channels].
    void roi_gather_unpack(Dtype dtype, const float* sum, void* grad_tokens, int64_t channels, int64_t from, int64_t size,
                           int64_t cells, bool streaming);
)

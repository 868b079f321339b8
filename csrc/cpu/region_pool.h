// region_pool on the CPU: what the partition (region_pool.cpp) hands to the inner loops (region_pool_isa.cpp). Addresses,
// sizes and strides only; strides in elements.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/regions.h"

namespace granvit {

struct RegionPool {
    Dtype dtype;  // of value, output and their gradients; logits, lse and theirs are float32
    int64_t images, regions, queries, heads, size, tokens;  // B, R, K, H, D, T
    int64_t value_token_stride, value_head_stride;          // the last dimension has stride 1; all else is contiguous
    const float* logits;                                    // [T, K, H]
    const void* value;                                      // [T, H, D]
    const int32_t *grids, *cu_seqlens;                      // [B, 2] (h, w), [B + 1]
    void* output;                                           // [R, K, H, D]
    float* lse;                                             // [R, K, H]; -inf where a region meets no cell

    // Backward only.
    const void* grad_output;  // [R, K, H, D]
    const float* grad_lse;    // [R, K, H]
    float* grad_logits;       // [T, K, H]
    void* grad_value;         // [T, H, D]

    // Worked out by the two functions below.
    Regions table;
    struct RegionPoolUpstream* upstream;  // [R, H], backward only
};

// What backward needs of one region in one head: its output's gradient as float32 rows with zeros up to padded_queries and
// padded_size, and for each query the largest logit, what exp(logit - largest) is multiplied by besides its share, and
// output . gradient - gradient of lse.
struct RegionPoolUpstream {
    const float* gradient;
    int64_t stride;  // of its rows
    float *largest, *factor, *shift;
};

// Fill in output and lse, or the gradients. boxes float32 [R, 4]; image_index int64 [R]. A region whose box or index is
// invalid meets no cell.
void region_pool_forward(RegionPool problem, const float* boxes, const int64_t* image_index, bool coverage, int threads);
void region_pool_backward(RegionPool problem, const float* boxes, const int64_t* image_index, bool coverage, int threads);

}  // namespace granvit

GRANVIT_DECLARE_PER_ISA(
    // Floats of scratch that a call needs, 64-byte aligned.
    int64_t region_pool_forward_scratch(const RegionPool& problem);
    int64_t region_pool_backward_scratch(const RegionPool& problem);
    // Floats that `prepare` needs for one region in one head.
    int64_t region_pool_upstream_floats(const RegionPool& problem);
    // Output and lse of one region in one head.
    void region_pool_forward(const RegionPool& problem, int64_t region, int64_t head, float* scratch);
    // Fills in upstream[region, head], which points into `floats`. scratch: as of region_pool_forward.
    void region_pool_prepare(const RegionPool& problem, int64_t region, int64_t head, float* floats, float* scratch);
    // Gradients of the tokens of one tile: the image's cells from this row and column.
    void region_pool_backward(const RegionPool& problem, int64_t image, int64_t row, int64_t column, float* scratch);
    int64_t region_pool_tile_side();
)

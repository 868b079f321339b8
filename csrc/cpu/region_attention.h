// region_attention on the CPU: what the partition (region_attention.cpp) hands to the inner loops
// (region_attention_isa.cpp). Addresses, sizes and strides only; strides in elements.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/regions.h"

namespace granvit {

struct RegionAttention {
    Dtype dtype;
    int64_t images, regions, queries, heads, size, tokens;  // B, R, K, H, D, T
    float scale;
    int64_t query_region_stride;  // 0: [K, H, D] shared by all regions; queries are contiguous otherwise
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;  // the last dimension has stride 1
    const void *query, *key, *value;
    const int32_t *grids, *cu_seqlens;  // [B, 2] (h, w), [B + 1]
    Regions table;                      // worked out by the two functions below

    void* output;  // [R, K, H, D]
    float* lse;    // [R, K, H]; -inf where a region meets no cell

    // Backward only; the gradients are contiguous.
    const void* grad_output;      // [R, K, H, D]
    const float* grad_lse;        // [R, K, H]
    float* grad_query;            // float32 in query's shape (in the inner loops always [R, K, H, D])
    void *grad_key, *grad_value;  // [T, H, D]
};

// Fill in output and lse, or the gradients. boxes float32 [R, 4]; image_index int64 [R]. A region whose box or
// index is invalid meets no cell.
void region_attention_forward(RegionAttention problem, const float* boxes, const int64_t* image_index, bool coverage,
                              int threads);
void region_attention_backward(RegionAttention problem, const float* boxes, const int64_t* image_index, bool coverage,
                               int threads);

}  // namespace granvit

GRANVIT_DECLARE_PER_ISA(
    // Floats of scratch that a call for this many heads needs, 64-byte aligned.
    int64_t region_attention_forward_scratch(const RegionAttention& problem, int64_t heads);
    int64_t region_attention_backward_scratch(const RegionAttention& problem, int64_t heads);
    // Output and lse of one image's regions in the heads [head0, head1).
    void region_attention_forward(const RegionAttention& problem, int64_t image, int64_t head0, int64_t head1, float* scratch);
    // Gradients of one image's keys and values, and of its regions' queries, in the heads [head0, head1).
    void region_attention_backward(const RegionAttention& problem, int64_t image, int64_t head0, int64_t head1, float* scratch);
)

// What a launch of pack_patches knows of its crops.
#pragma once
#include <cstdint>

#include "common/convert.h"

namespace granvit {

// The crops of one launch, at most N.
template <int N>
struct PackJob {
    const uint8_t* image[N];
    double box[N][4];                                              // x1, y1, x2, y2 in pixels, inside the image
    int32_t stride[N], height[N], width[N];                        // bytes from row to row; size in patches
    int32_t first_block[N], first_patch[N];
    int32_t crops, patch_size;
    float scale[3], bias[3];  // value = pixel * scale + bias
    bool channels_first;
    void* patches;                 // [T, patch_size**2 * 3]
    int32_t *grids, *cu_seqlens;   // the layout's, from this launch's first crop on: [crops, 2], [crops + 1]
};

// The crop that a block belongs to.
template <typename Job>
GRANVIT_HOST_DEVICE inline int find_crop(const Job& job, int block) {
    int n = 0;
    for (int beyond = job.crops; beyond - n > 1;) {
        const int middle = (n + beyond) / 2;
        if (job.first_block[middle] <= block) n = middle;
        else beyond = middle;
    }
    return n;
}

// Crop n's part of the layout.
template <typename Job>
GRANVIT_HOST_DEVICE inline void write_layout(const Job& job, int n) {
    job.grids[2 * n] = job.height[n];
    job.grids[2 * n + 1] = job.width[n];
    if (n == 0) job.cu_seqlens[0] = job.first_patch[0];
    job.cu_seqlens[n + 1] = job.first_patch[n] + job.height[n] * job.width[n];
}

}  // namespace granvit

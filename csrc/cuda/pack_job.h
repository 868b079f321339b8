// What a launch of pack_patches knows of its crops. It comes by value, in the launch's parameters: nothing is copied to the
// device before, and a CUDA graph can capture it.
#pragma once
#include <cstdint>

#include "common/packing.h"

namespace granvit {

// A crop, and where its patches go.
struct CropJob {
    const uint8_t* image;                      // its first pixel, or of the window that it is resampled from
    int32_t stride, height, width;             // bytes from row to row; size in patches
    int32_t first_block, first_patch, number;  // number: of the call's crops
};

// How a crop's rows come about: it shrinks downwards, or grows, or (with rounding) it is resampled downwards first.
enum class Way : int32_t { shrinks, grows, columns_first };

// A crop that is resampled.
struct ResampledCropJob : CropJob {
    uint32_t weights;         // where its weights lie in the workspace (pack_weights.h), in units of 16 bytes
    int32_t sources, groups;  // source rows of its window; weights of an output column, by fours
    Way way;
};

// The crops of one launch, at most N.
template <typename Crop, int N>
struct PackJob {
    Crop crop[N];
    int32_t crops, patch_size, merge;
    float scale[3], bias[3];  // value = pixel * scale + bias
    bool channels_first;
    void* patches;                // [T, patch_size**2 * 3]
    int32_t *grids, *cu_seqlens;  // the layout's, of all crops
    int32_t* workspace;           // of resampled crops
    int32_t bands;                // that a block resamples, one below the other
};

// The crop that a block belongs to.
template <typename Job>
GRANVIT_HOST_DEVICE inline int find_crop(const Job& job, int block) {
    int n = 0;
    for (int beyond = job.crops; beyond - n > 1;) {
        const int middle = (n + beyond) / 2;
        if (job.crop[middle].first_block <= block) n = middle;
        else beyond = middle;
    }
    return n;
}

// A crop's part of the layout.
template <typename Job>
GRANVIT_HOST_DEVICE inline void write_layout(const Job& job, const CropJob& crop) {
    const int i = crop.number;
    job.grids[2 * i] = crop.height;
    job.grids[2 * i + 1] = crop.width;
    if (i == 0) job.cu_seqlens[0] = 0;
    job.cu_seqlens[i + 1] = crop.first_patch + crop.height * crop.width;
}

// The index of the first value of a crop's patch in row y and column x of its grid.
template <typename Job>
GRANVIT_HOST_DEVICE inline int64_t patch_offset(const Job& job, const CropJob& crop, int y, int x) {
    const int p = job.patch_size;
    return int64_t(crop.first_patch + patch_index(y, x, crop.width, job.merge)) * (3 * p * p);
}

}  // namespace granvit

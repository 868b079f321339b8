// pack_patches on the CPU: uint8 images to packed patches. Pointers and sizes only.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace granvit {

struct PackPatches {
    const int64_t* images;  // [num_images, 2]: address of the first pixel, bytes from row to row; a row is RGBRGB...
    const double* crops;    // [num_crops, 5]: image index, x1, y1, x2, y2; inside the image
    const int64_t* grids;   // [num_crops, 2]: height and width in patches
    int64_t num_crops;
    int64_t patch_size;
    float scale[3], bias[3];  // value = pixel * scale + bias
    bool channels_first;
    Dtype dtype;
    void* patches;  // [T, patch_size**2 * 3]
};

void pack_patches(const PackPatches& job, int threads);

// The weights of one axis of one crop.
struct Taps {
    bool copies;           // output i is source pixel i: the rest is unused
    int64_t taps;
    const float* weights;  // [outputs, taps]
    const int32_t* first;  // [outputs] source pixel of the first weight, from the start of the window
};

// What an instruction set does at once: one row of patches of one crop.
struct PatchRow {
    const uint8_t* window;  // the pixels that the crop touches
    int64_t row_stride, window_width;
    const Taps *rows, *columns;
    int64_t top;  // first output row
    int64_t grid_width, patch_size;
    const float *scale, *bias;  // [3 * patch_size], in the order in which a row of a patch is stored
    bool channels_first;
    Dtype dtype;
    void* patches;  // the first patch of this row
    float* row;      // scratch [3 * window_width + PADDING]: one output row, not yet resampled along it
    float* line;     // scratch [3 * grid_width * patch_size + PADDING]: one output row, 0-255
    float* segment;  // scratch [3 * patch_size + PADDING]: a row of one patch
};
constexpr int64_t PADDING = 16;  // floats that a vector may touch past the end

}  // namespace granvit

GRANVIT_DECLARE_PER_ISA(void pack_patch_row(const PatchRow& job);)

// A call of pack_patches, as every kernel gets it, and the order of its patches. Pointers and sizes only.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/resample.h"

namespace granvit {

struct PackPatches {
    const int64_t* images;  // [num_images, 2]: address of the first pixel, bytes from row to row; a row is RGBRGB...
    const double* crops;    // [num_crops, 5]: image index, x1, y1, x2, y2; inside the image
    const int64_t* grids;   // [num_crops, 2]: height and width in patches
    const int64_t* frames;  // [num_crops, 4]: height and width that the crop is resampled to, in pixels, and the top and
                            // left from where on the grid lies in that: only the grid's pixels are made
    int64_t num_crops;
    int64_t patch_size;
    int64_t merge;            // patches lie block by block of merge x merge; it divides the grids
    float scale[3], bias[3];  // value = pixel * scale + bias
    bool channels_first;
    Filter filter;
    Rounding rounding;
    Dtype dtype;
    void* patches;  // [T, patch_size**2 * 3]

    GRANVIT_HOST_DEVICE Axis rows(int64_t crop) const {
        const int64_t* frame = frames + 4 * crop;
        return make_axis(filter, crops[5 * crop + 2], crops[5 * crop + 4], frame[0], frame[2]);
    }
    GRANVIT_HOST_DEVICE Axis columns(int64_t crop) const {
        const int64_t* frame = frames + 4 * crop;
        return make_axis(filter, crops[5 * crop + 1], crops[5 * crop + 3], frame[1], frame[3]);
    }
    // With rounding: the crop is resampled down its columns before it is along its rows.
    GRANVIT_HOST_DEVICE bool columns_first(int64_t crop) const {
        const Axis y = rows(crop), x = columns(crop);
        return granvit::columns_first(rounding, y.end - y.begin, x.end - x.begin, frames[4 * crop], frames[4 * crop + 1]);
    }
};

// Which of its crop's patches the one in row y and column x of the grid is.
template <typename Int>
GRANVIT_HOST_DEVICE static inline Int patch_index(Int y, Int x, Int grid_width, Int merge) {
    if (merge == 1) return y * grid_width + x;
    return (y / merge * grid_width + x / merge * merge + y % merge) * merge + x % merge;
}

}  // namespace granvit

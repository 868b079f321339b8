// pack_patches on the CPU: uint8 images to packed patches. Pointers and sizes only.
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/packing.h"

namespace granvit {

void pack_patches(const PackPatches& job, int threads);

// One axis of one crop. Source pixels are counted from the first that the crop reads.
struct Taps {
    bool copies;           // output i is source pixel i: the rest is unused
    int64_t taps;          // source pixels of each output
    const int32_t* first;  // [outputs] the first of them
    const float* weights;  // [outputs, taps], for Rounding::none
    // With rounding, [outputs, 2, fixed_taps(taps)]: a weight is high * 2**LOW_BITS + low, so that products of 16 bits
    // will do. First the high parts, then the low ones; what is beyond the taps is zero.
    const int16_t* fixed;
};
constexpr int LOW_BITS = 11;
static constexpr int64_t fixed_taps(int64_t taps) { return (taps + 3) / 4 * 4; }  // horizontally, four are taken at once

// What an instruction set does at once: some rows of patches of one crop.
struct PatchRows {
    const uint8_t* source;     // the first pixel that the crop reads
    const uint8_t* image_end;  // past the image's last byte: reading a row, vectors may touch what is before
    int64_t row_stride;
    int64_t source_rows, source_columns;  // that the crop reads
    const Taps *rows, *columns;
    int64_t begin, end;        // rows of patches
    int64_t grid_width, patch_size, merge;
    const float *scale, *bias; // [3 * patch_size], in the order in which a row of a patch is stored; padded
    bool channels_first, columns_first;
    Dtype dtype;
    void* patches;             // the crop's first

    // Scratch, with room for a vector past each row's end.
    void* planes;              // [3, grid_width * patch_size] an output row, channels first: bytes or floats
    float* blended;            // [3 * source_columns] an output row that is not yet resampled along the row
    float* line;               // [3 * grid_width * patch_size] an output row, 0-255
    uint8_t* ring;             // [rows.taps + GROUP - 1, ring_pitch] source rows that are resampled along the row
    int64_t ring_pitch;
    uint8_t* copied;           // [GROUP, copied_pitch] rows that can't be read in place, for they end where the image does
    int64_t copied_pitch;
    const uint8_t** pointers;  // [rows.taps]
    uint8_t* rounded;          // an output row
};
constexpr int64_t PADDING = 64;  // bytes that a vector may touch past a row's end
constexpr int GROUP = 4;         // source rows that are resampled along the row at once

}  // namespace granvit

// Makes rows of patches without rounding, and with it.
GRANVIT_DECLARE_PER_ISA(void pack_exact(const PatchRows& job); void pack_rounded(const PatchRows& job);)

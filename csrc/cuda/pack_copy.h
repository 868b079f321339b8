// pack_patches on the GPU where nothing is resampled: what one block of threads does.
//
// This is memory traffic, so every access to it is of 16 bytes and contiguous across a warp, whatever the patch size and
// however the rows are aligned: a tile's source rows go into shared memory as they are, from there as finished values into
// the order in which patches lie, and from there out. A tile is either several whole patches side by side, which lie in one
// run of the output (or one run for every `merge` of them), or a rectangle of a large patch, a run a row. A thread has some fifty values to make, so what a tile's
// threads all need, one of them works out: searches and divisions would cost each of them more than its values.
#pragma once
#include <cstdint>

#include "cuda/pack_job.h"
#include "cuda/pack_moves.h"

namespace granvit {

constexpr int COPY_THREADS = 128;
constexpr int COPY_PIXELS = 2048, COPY_COLUMNS = 128;  // of a tile, at most
constexpr int COPY_ROWS = 45;                          // at most: patches of 46 x 46 are no longer whole

// The tiles of a launch, apart from those at an edge.
struct CopyShape {
    int patches, rows, columns;  // of each patch
    bool whole;                  // rows and columns are the patch's
};

GRANVIT_HOST_DEVICE inline CopyShape copy_shape(int p, int merge) {
    if (p * int64_t(p) <= COPY_PIXELS) {
        const int patches = COPY_PIXELS / (p * p);
        return {patches < merge ? 1 : patches / merge * merge, p, p, true};  // whole runs of the output
    }
    const int columns = p < COPY_COLUMNS ? p : COPY_COLUMNS;
    return {1, COPY_PIXELS / columns, columns, false};
}

// Blocks of a crop.
GRANVIT_HOST_DEVICE inline int64_t copy_tiles(int64_t height, int64_t width, int p, int merge) {
    const CopyShape shape = copy_shape(p, merge);
    if (shape.whole) return height * ((width + shape.patches - 1) / shape.patches);
    return height * width * ((p + shape.rows - 1) / shape.rows) * ((p + shape.columns - 1) / shape.columns);
}

struct CopyTile {
    ImageRows in;
    int64_t to;                  // its first value's index in the output
    int patches, rows, columns;  // of each patch
    bool whole;

    int runs, length; // of the output that it makes, and values of each
    int run_pitch;    // from run to run in shared memory
    Divide groups, across, slots;  // of a row; columns; of a run

    // Pixels that are handled at once.
    GRANVIT_HOST_DEVICE int group() const { return columns % 4 == 0 ? 4 : columns % 2 == 0 ? 2 : 1; }
};

template <typename T>
struct CopyShared {
    alignas(16) uint32_t raw[(3 * COPY_PIXELS + COPY_ROWS * 49 + 15) / 16 * 4];
    alignas(16) T values[3 * COPY_PIXELS + 3 * COPY_ROWS * 8];
    CopyTile tile;
};

// Tile `number` of a crop.
template <typename T, typename Job>
GRANVIT_HOST_DEVICE inline CopyTile copy_tile(const Job& job, const CropJob& crop, uint32_t number) {
    constexpr int V = 16 / sizeof(T);
    const int p = job.patch_size;
    const CopyShape shape = copy_shape(p, job.merge);
    const uint32_t width = crop.width;
    uint32_t row, column;  // in patches
    int y = 0, x = 0;      // in their first
    if (shape.whole) {
        const uint32_t across = (width + shape.patches - 1) / shape.patches;
        row = number / across;
        column = number % across * shape.patches;
    } else {
        const uint32_t across = (p + shape.columns - 1) / shape.columns, parts = (p + shape.rows - 1) / shape.rows * across;
        const uint32_t patch = number / parts, part = number % parts;
        row = patch / width;
        column = patch % width;
        y = part / across * shape.rows;
        x = part % across * shape.columns;
    }
    CopyTile tile;
    tile.whole = shape.whole;
    tile.patches = int(width - column) < shape.patches ? int(width - column) : shape.patches;
    tile.rows = p - y < shape.rows ? p - y : shape.rows;
    tile.columns = p - x < shape.columns ? p - x : shape.columns;
    const uint8_t* source = crop.image + (int64_t(row) * p + y) * crop.stride + (int64_t(column) * p + x) * 3;
    tile.in = ImageRows::at(source, crop.stride, 3 * tile.patches * tile.columns);
    tile.to = patch_offset(job, crop, row, column) +
              (job.channels_first ? int64_t(y) * p + x : (int64_t(y) * p + x) * 3);

    if (tile.whole) tile.runs = job.merge == 1 || shape.patches == 1 ? 1 : tile.patches / job.merge;
    else tile.runs = job.channels_first ? 3 * tile.rows : tile.rows;
    tile.length = tile.in.bytes * tile.rows / tile.runs;
    tile.run_pitch = tile.whole ? tile.length : (tile.length + V - 1) / V * V;
    tile.groups = Divide::by(tile.patches * tile.columns / tile.group());
    tile.across = Divide::by(tile.columns);
    tile.slots = Divide::by(run_slots<T>(tile.length));
    return tile;
}

// Values from those, GROUP pixels a thread.
template <int GROUP, bool PLANES, typename T, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void copy_values(const Job& job, const CopyTile& tile, CopyShared<T>& shared, const Each& each) {
    const uint32_t columns = tile.columns, row = !tile.whole ? tile.run_pitch : PLANES ? columns : 3 * columns;
    const uint32_t plane = row * tile.rows, patch_values = 3 * tile.rows * columns;
    each(tile.rows * tile.groups.divisor, [&](uint32_t i) {
        const uint32_t r = tile.groups(i), x = (i - r * tile.groups.divisor) * GROUP;
        const uint32_t patch = tile.across(x), k = x - patch * columns;
        const uint32_t at = r * tile.in.pitch + tile.in.lead(r) + 3 * x;
        uint32_t bytes[3 * GROUP];
        if (GROUP == 4) {
            const uint32_t* words = shared.raw + at / 4;
            for (int b = 0; b < 3 * GROUP; ++b) {
                const uint64_t two = uint64_t(words[b / 4 + 1]) << 32 | words[b / 4];
                bytes[b] = uint32_t(two >> at % 4 * 8) >> b % 4 * 8 & 255;
            }
        } else {
            const uint8_t* from = reinterpret_cast<const uint8_t*>(shared.raw) + at;
            for (int b = 0; b < 3 * GROUP; ++b) bytes[b] = from[b];
        }
        T* to = shared.values + patch * patch_values + r * row + k * (PLANES ? 1 : 3);
        for (int v = 0; v < 3; ++v) {
            Vector<T, GROUP> out;
            for (int g = 0; g < GROUP; ++g) {
                const int b = PLANES ? 3 * g + v : v * GROUP + g;
                convert(float(bytes[b]) * job.scale[b % 3] + job.bias[b % 3], out.at[g]);
            }
            store_shared(to + v * (PLANES ? plane : GROUP), out);
        }
    });
}

template <bool PLANES, typename T, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void copy_values(const Job& job, const CopyTile& tile, CopyShared<T>& shared, const Each& each) {
    if (tile.group() == 4) copy_values<4, PLANES>(job, tile, shared, each);
    else if (tile.group() == 2) copy_values<2, PLANES>(job, tile, shared, each);
    else copy_values<1, PLANES>(job, tile, shared, each);
}

template <typename T, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void copy_block(const Job& job, int block, CopyShared<T>& shared, const Each& each) {
    each(1, [&](int) {
        const CropJob& crop = job.crop[find_crop(job, block)];
        if (block == crop.first_block) write_layout(job, crop);
        shared.tile = copy_tile<T>(job, crop, block - crop.first_block);
    });
    const CopyTile tile = shared.tile;
    load_rows(tile.in, tile.rows, shared.raw, each);
    if (job.channels_first) copy_values<true>(job, tile, shared, each);
    else copy_values<false>(job, tile, shared, each);

    T* to = static_cast<T*>(job.patches) + tile.to;
    if (tile.runs == 1) {
        each(tile.slots.divisor, [&](int slot) { store_slot(shared.values, tile.length, to, slot); });
        return;
    }
    const int64_t p = job.patch_size;
    each(tile.runs * tile.slots.divisor, [&](uint32_t i) {
        const int run = tile.slots(i), slot = i - run * tile.slots.divisor;
        int64_t offset;
        if (tile.whole) offset = 3 * p * p * job.merge * job.merge * run;
        else offset = job.channels_first ? (run / tile.rows * p + run % tile.rows) * p : 3 * p * run;
        const int from = run * tile.run_pitch;
        store_slot(shared.values + from, tile.length, to + offset, slot, from % int(16 / sizeof(T)) == 0);
    });
}

}  // namespace granvit

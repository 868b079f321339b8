// pack_patches on the GPU where nothing is resampled: what one block of threads does.
//
// This is memory traffic, so every access to it is of 16 bytes and contiguous across a warp, whatever the patch size and
// however the rows are aligned: a tile's source rows go into shared memory as they are, from there as finished values into
// the order in which patches lie, and from there out. A tile is either several whole patches side by side, which lie in one
// run of the output, or a rectangle of a large patch, a run a row. A thread has some fifty values to make, so what a tile's
// threads all need, one of them works out: searches and divisions would cost each of them more than its values.
#pragma once
#include <cstdint>

#include "cuda/pack_job.h"
#include "cuda/values.h"

namespace granvit {

constexpr int COPY_THREADS = 128;
constexpr int COPY_PIXELS = 2048, COPY_COLUMNS = 128;  // of a tile, at most
constexpr int COPY_ROWS = 45;                          // at most: patches of 46 x 46 are no longer whole

// The tiles of a launch, apart from those at an edge.
struct CopyShape {
    int patches, rows, columns;  // of each patch
    bool whole;                  // rows and columns are the patch's
};

GRANVIT_HOST_DEVICE inline CopyShape copy_shape(int p) {
    if (p * int64_t(p) <= COPY_PIXELS) return {COPY_PIXELS / (p * p), p, p, true};
    const int columns = p < COPY_COLUMNS ? p : COPY_COLUMNS;
    return {1, COPY_PIXELS / columns, columns, false};
}

// Blocks of a crop.
GRANVIT_HOST_DEVICE inline int64_t copy_tiles(int64_t height, int64_t width, int p) {
    const CopyShape shape = copy_shape(p);
    if (shape.whole) return height * ((width + shape.patches - 1) / shape.patches);
    return height * width * ((p + shape.rows - 1) / shape.rows) * ((p + shape.columns - 1) / shape.columns);
}

// Division by a number that many threads divide by: exact while n * divisor stays under 2**32.
struct Divide {
    uint32_t divisor, inverse;

    GRANVIT_HOST_DEVICE static Divide by(uint32_t divisor) { return {divisor, 0xffffffffu / divisor + 1}; }
    GRANVIT_HOST_DEVICE uint32_t operator()(uint32_t n) const {
        return divisor == 1 ? n : uint32_t((uint64_t(n) * inverse) >> 32);
    }
};

struct CopyTile {
    const uint8_t* source;
    int64_t stride;
    int64_t to;                  // its first value's index in the output
    int patches, rows, columns;  // of each patch
    bool whole;

    int bytes;        // of a source row
    uint32_t pitch;   // from row to row in shared memory
    int runs, length; // of the output that it makes, and values of each
    int run_pitch;    // from run to run in shared memory: each starts at a multiple of 16 bytes
    Divide chunks, groups, across, slots;  // of a row; of a row; columns; of a run

    // Of source row r, which starts as far into its place in shared memory as it is past a multiple of 16.
    GRANVIT_HOST_DEVICE uint32_t lead(uint32_t r) const {
        return (uint32_t(reinterpret_cast<uintptr_t>(source)) + r * uint32_t(stride)) & 15;
    }
    // Pixels that are handled at once.
    GRANVIT_HOST_DEVICE int group() const { return columns % 4 == 0 ? 4 : columns % 2 == 0 ? 2 : 1; }
};

template <typename T>
struct CopyShared {
    alignas(16) uint32_t raw[(3 * COPY_PIXELS + COPY_ROWS * 49 + 15) / 16 * 4];
    alignas(16) T values[3 * COPY_PIXELS + 3 * COPY_ROWS * 8];
    CopyTile tile;
};

// Tile `number` of crop n. vector: values in 16 bytes.
template <typename Job>
GRANVIT_HOST_DEVICE inline CopyTile copy_tile(const Job& job, int n, uint32_t number, int vector) {
    const int p = job.patch_size;
    const CopyShape shape = copy_shape(p);
    const uint32_t width = job.width[n];
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
    tile.stride = job.stride[n];
    tile.source = job.image[n] + (int64_t(job.box[n][1]) + int64_t(row) * p + y) * tile.stride +
                  (int64_t(job.box[n][0]) + int64_t(column) * p + x) * 3;
    tile.to = (job.first_patch[n] + int64_t(row) * width + column) * 3 * p * p +
              (job.channels_first ? int64_t(y) * p + x : (int64_t(y) * p + x) * 3);

    tile.bytes = 3 * tile.patches * tile.columns;
    tile.pitch = (15 + tile.bytes + 4 + 15) / 16 * 16;  // who reads words may read one more
    tile.runs = tile.whole ? 1 : job.channels_first ? 3 * tile.rows : tile.rows;
    tile.length = tile.bytes * tile.rows / tile.runs;
    tile.run_pitch = (tile.length + vector - 1) / vector * vector;
    tile.chunks = Divide::by(tile.pitch / 16);
    tile.groups = Divide::by(tile.patches * tile.columns / tile.group());
    tile.across = Divide::by(tile.columns);
    tile.slots = Divide::by((tile.length + 2 * vector - 2) / vector);  // that a run may touch, wherever it starts
    return tile;
}

// Source rows into shared memory, a chunk a thread.
template <typename T, typename Each>
GRANVIT_HOST_DEVICE inline void copy_rows(const CopyTile& tile, CopyShared<T>& shared, const Each& each) {
    // Between the tile's first byte and its last all is the image's own storage; before and after it may not be.
    const uintptr_t low = reinterpret_cast<uintptr_t>(tile.source);
    const uintptr_t high = low + (tile.rows - 1) * tile.stride + tile.bytes;
    each(tile.rows * tile.chunks.divisor, [&](uint32_t i) {
        const uint32_t r = tile.chunks(i), c = i - r * tile.chunks.divisor, lead = tile.lead(r);
        if (16 * c >= lead + tile.bytes) return;
        const uintptr_t from = low + r * tile.stride - lead + 16 * c;
        uint32_t* to = shared.raw + 4 * i;
        if (from >= low && from + 16 <= high) {
            store_shared(to, load_image(reinterpret_cast<const void*>(from)));
            return;
        }
        for (int k = 0; k < 16; ++k)
            if (from + k >= low && from + k < high)
                reinterpret_cast<uint8_t*>(to)[k] = *reinterpret_cast<const uint8_t*>(from + k);
    });
}

// Values from those, GROUP pixels a thread.
template <int GROUP, bool PLANES, typename T, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void copy_values(const Job& job, const CopyTile& tile, CopyShared<T>& shared, const Each& each) {
    const uint32_t columns = tile.columns, row = !tile.whole ? tile.run_pitch : PLANES ? columns : 3 * columns;
    const uint32_t plane = row * tile.rows, patch_values = 3 * tile.rows * columns;
    each(tile.rows * tile.groups.divisor, [&](uint32_t i) {
        const uint32_t r = tile.groups(i), x = (i - r * tile.groups.divisor) * GROUP;
        const uint32_t patch = tile.across(x), k = x - patch * columns;
        const uint32_t at = r * tile.pitch + tile.lead(r) + 3 * x;
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

// 16 bytes of values, at any value's address.
GRANVIT_HOST_DEVICE inline Chunk gather(const float* from) {
    return {{bits_of_float(from[0]), bits_of_float(from[1]), bits_of_float(from[2]), bits_of_float(from[3])}};
}
template <typename T>
GRANVIT_HOST_DEVICE inline Chunk gather(const T* from) {
    Chunk out;
    for (int k = 0; k < 4; ++k) out.at[k] = uint32_t(from[2 * k + 1].bits) << 16 | from[2 * k].bits;
    return out;
}

// The 16 bytes of the output that are the slot-th that a run touches: those of them that are the run's.
template <typename T>
GRANVIT_HOST_DEVICE inline void copy_slot(const T* run, int length, T* to, int slot) {
    constexpr int V = 16 / sizeof(T);
    const int lead = int(uint32_t(reinterpret_cast<uintptr_t>(to)) % 16 / sizeof(T)), first = slot * V - lead;
    run += first;
    to += first;
    if (first >= 0 && first + V <= length) {
        store_global(to, lead == 0 ? *reinterpret_cast<const Chunk*>(run) : gather(run));
        return;
    }
    for (int k = 0; k < V; ++k)
        if (first + k >= 0 && first + k < length) to[k] = run[k];
}

// each: as resample_block's.
template <typename T, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void copy_block(const Job& job, int block, CopyShared<T>& shared, const Each& each) {
    each(1, [&](int) {
        const int n = find_crop(job, block);
        if (block == job.first_block[n]) write_layout(job, n);
        shared.tile = copy_tile(job, n, block - job.first_block[n], 16 / sizeof(T));
    });
    const CopyTile tile = shared.tile;
    copy_rows(tile, shared, each);
    if (job.channels_first) copy_values<true>(job, tile, shared, each);
    else copy_values<false>(job, tile, shared, each);

    T* to = static_cast<T*>(job.patches) + tile.to;
    if (tile.whole) {
        each(tile.slots.divisor, [&](int slot) { copy_slot(shared.values, tile.length, to, slot); });
        return;
    }
    const int64_t p = job.patch_size;
    each(tile.runs * tile.slots.divisor, [&](uint32_t i) {
        const int run = tile.slots(i), slot = i - run * tile.slots.divisor;
        const int64_t offset = job.channels_first ? (run / tile.rows * p + run % tile.rows) * p : 3 * p * run;
        copy_slot(shared.values + run * tile.run_pitch, tile.length, to + offset, slot);
    });
}

}  // namespace granvit

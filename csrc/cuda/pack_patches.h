// pack_patches on the GPU: what one block of threads does, in phases that the host can run too (pack_patches_emulated).
//
// Where no crop of a launch is resampled, pack_copy.h has the blocks. Otherwise a block makes a tile of TILE_ROWS x
// TILE_COLUMNS output pixels of one crop: it blends source rows (the pass that reads every source pixel, along contiguous
// bytes) into shared memory, CHUNK source pixels at a time, then columns, then stores; a crop that needs no resampling is
// read VEC bytes at once. All that a block has to know comes by value in the launch's parameters: nothing is copied to the
// device before, and a CUDA graph can capture it.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/packing.h"
#include "cuda/pack_copy.h"
#include "cuda/pack_job.h"
#include "cuda/values.h"

namespace granvit {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 64, CHUNK = 128, THREADS = 256;

struct PackShared {
    float blended[TILE_ROWS * 3 * CHUNK];            // source columns of each output row
    float values[TILE_ROWS * 3 * TILE_COLUMNS];      // 0-255
    int32_t first[TILE_ROWS + TILE_COLUMNS];         // of each output row, then column: its first source pixel, from the
    float offset[TILE_ROWS + TILE_COLUMNS];          // crop's; where that lies; and 1 / the sum of its weights
    float share[TILE_ROWS + TILE_COLUMNS];
};

// Blocks of a crop that is resampled.
GRANVIT_HOST_DEVICE inline int64_t tiles_across(int64_t width, int64_t patch_size) {
    return (width * patch_size + TILE_COLUMNS - 1) / TILE_COLUMNS;
}
GRANVIT_HOST_DEVICE inline int64_t tiles(int64_t height, int64_t width, int64_t patch_size) {
    return (height * patch_size + TILE_ROWS - 1) / TILE_ROWS * tiles_across(width, patch_size);
}

// One tile's place in its crop and in the packed patches.
struct PackTile {
    int64_t top, left;  // in output pixels
    int rows, columns;
    int64_t patch;             // that its first pixel belongs to
    uint32_t y, x;             // where in that patch
    uint32_t patch_size;
    int32_t grid_width;
    bool channels_first;

    // Where channel c of the tile's pixel (r, z) is stored. Division in 32 bits: in 64 it would cost more than the rest.
    GRANVIT_HOST_DEVICE int64_t index(int r, int z, int c) const {
        const uint32_t p = patch_size, row = y + r, column = x + z;
        const int64_t to = patch + int64_t(row / p) * grid_width + column / p;
        const int64_t i = row % p, j = column % p;
        return to * 3 * p * p + (channels_first ? (c * int64_t(p) + i) * p + j : (i * p + j) * 3 + c);
    }
};

// VEC bytes at any address.
template <int VEC>
GRANVIT_HOST_DEVICE inline Vector<uint8_t, VEC> read_bytes(const uint8_t* source) {
    if (reinterpret_cast<uintptr_t>(source) % VEC == 0) return *reinterpret_cast<const Vector<uint8_t, VEC>*>(source);
    Vector<uint8_t, VEC> bytes;
    for (int i = 0; i < VEC; ++i) bytes.at[i] = source[i];
    return bytes;
}

// Stores the tile. fetch(r, v, out): VEC consecutive values of row r from v = 3 * column + channel on, 0-255. VEC values
// never leave a patch's row: it divides 3 * patch_size, and patch_size where channels come first.
template <typename T, int VEC, typename Job, typename Each, typename Fetch>
GRANVIT_HOST_DEVICE inline void store_tile(const Job& job, const PackTile& tile, const Each& each, const Fetch& fetch) {
    T* patches = static_cast<T*>(job.patches);
    const int values = 3 * tile.columns;
    if (!job.channels_first) {
        const int units = values / VEC;
        each(tile.rows * units, [&](int i) {
            const int r = i / units, v = i % units * VEC, channel = v % 3;
            // In the order in which channels follow one another from here on.
            float scale[3], bias[3];
            for (int c = 0; c < 3; ++c) {
                const int from = channel + c < 3 ? channel + c : channel + c - 3;
                scale[c] = from == 0 ? job.scale[0] : from == 1 ? job.scale[1] : job.scale[2];
                bias[c] = from == 0 ? job.bias[0] : from == 1 ? job.bias[1] : job.bias[2];
            }
            float pixels[VEC];
            fetch(r, v, pixels);
            Vector<T, VEC> out;
            for (int k = 0; k < VEC; ++k) convert(pixels[k] * scale[k % 3] + bias[k % 3], out.at[k]);
            *reinterpret_cast<Vector<T, VEC>*>(patches + tile.index(r, v / 3, channel)) = out;
        });
        return;
    }
    const int units = tile.columns / VEC;
    each(tile.rows * units, [&](int i) {
        const int r = i / units, x = i % units * VEC;
        float pixels[3 * VEC];
        for (int k = 0; k < 3; ++k) fetch(r, 3 * x + k * VEC, pixels + k * VEC);
        for (int c = 0; c < 3; ++c) {
            Vector<T, VEC> out;
            for (int k = 0; k < VEC; ++k) convert(pixels[3 * k + c] * job.scale[c] + job.bias[c], out.at[k]);
            *reinterpret_cast<Vector<T, VEC>*>(patches + tile.index(r, x, c)) = out;
        }
    });
}

// each(count, f) calls f(0) to f(count - 1), in any order and by any thread, and returns when all are done.
template <typename T, int VEC, int N, typename Each>
GRANVIT_HOST_DEVICE inline void resample_block(const PackJob<N>& job, int block, PackShared& shared, const Each& each) {
    const int n = find_crop(job, block);
    const int64_t p = job.patch_size, height = job.height[n] * p, width = job.width[n] * p, number = block - job.first_block[n];
    const int64_t across = tiles_across(job.width[n], p);
    const int64_t top = number / across * TILE_ROWS, left = number % across * TILE_COLUMNS;
    PackTile tile{top, left, TILE_ROWS, TILE_COLUMNS, job.first_patch[n] + top / p * job.width[n] + left / p,
                  uint32_t(top % p), uint32_t(left % p), uint32_t(p), job.width[n], job.channels_first};
    if (height - tile.top < TILE_ROWS) tile.rows = int(height - tile.top);
    if (width - tile.left < TILE_COLUMNS) tile.columns = int(width - tile.left);
    if (number == 0) each(1, [&](int) { write_layout(job, n); });

    const Axis ys = make_axis(Filter::bilinear, job.box[n][1], job.box[n][3], height, 0);
    const Axis xs = make_axis(Filter::bilinear, job.box[n][0], job.box[n][2], width, 0);
    const int64_t stride = job.stride[n];
    if (ys.copies() && xs.copies()) {
        const uint8_t* corner = job.image[n] + (ys.begin + tile.top) * stride + (xs.begin + tile.left) * 3;
        store_tile<T, VEC>(job, tile, each, [&](int r, int v, float* out) {
            const Vector<uint8_t, VEC> bytes = read_bytes<VEC>(corner + r * stride + v);
            for (int k = 0; k < VEC; ++k) out[k] = float(bytes.at[k]);
        });
        return;
    }

    // Double precision only here, once a row and column of the tile.
    const int row_taps = int(ys.taps()), column_taps = int(xs.taps());
    const float row_slope = float(1.0 / ys.scale), column_slope = float(1.0 / xs.scale);
    each(tile.rows + tile.columns, [&](int i) {
        const bool row = i < tile.rows;
        const int slot = row ? i : TILE_ROWS + i - tile.rows;
        const Place at = row ? place(ys, tile.top + i) : place(xs, tile.left + i - tile.rows);
        const float slope = row ? row_slope : column_slope, offset = float(at.offset(0));
        const int taps = row ? row_taps : column_taps;
        float sum = 0;
        for (int t = 0; t < taps; ++t) sum += filter_weight(Filter::bilinear, (offset + float(t)) * slope);
        shared.first[slot] = int32_t(at.first);
        shared.offset[slot] = offset;
        shared.share[slot] = 1 / sum;
    });

    const uint8_t* window = job.image[n] + ys.begin * stride + xs.begin * 3;
    const int begin = shared.first[TILE_ROWS], end = shared.first[TILE_ROWS + tile.columns - 1] + column_taps;
    for (int chunk = begin; chunk < end; chunk += CHUNK) {
        const int pixels = end - chunk < CHUNK ? end - chunk : CHUNK, bytes = 3 * pixels;
        const uint8_t* source = window + 3 * int64_t(chunk);
        // Four bytes at once start at a multiple of four, in every row if the rows are multiples of four apart.
        const int lead = stride % 4 == 0 ? int(reinterpret_cast<uintptr_t>(source) % 4) : 0;
        const int units = (lead + bytes + 3) / 4;
        each(tile.rows * units, [&](int i) {
            const int r = i / units, b = i % units * 4 - lead;
            const uint8_t* from = source + shared.first[r] * stride + b;
            const bool whole = b >= 0 && b + 4 <= bytes;
            float sum[4] = {0, 0, 0, 0}, offset = shared.offset[r];
            for (int t = 0; t < row_taps; ++t, from += stride) {
                const float weight = filter_weight(Filter::bilinear, (offset + float(t)) * row_slope);
                if (whole) {
                    const Vector<uint8_t, 4> four = read_bytes<4>(from);
                    for (int k = 0; k < 4; ++k) sum[k] += weight * float(four.at[k]);
                } else {
                    for (int k = 0; k < 4; ++k)
                        if (b + k >= 0 && b + k < bytes) sum[k] += weight * float(from[k]);
                }
            }
            for (int k = 0; k < 4; ++k)
                if (b + k >= 0 && b + k < bytes) shared.blended[r * 3 * CHUNK + b + k] = sum[k] * shared.share[r];
        });
        each(tile.rows * tile.columns, [&](int i) {
            const int r = i / tile.columns, x = i % tile.columns, slot = TILE_ROWS + x;
            const int first = shared.first[slot] - chunk;
            const int from = first < 0 ? -first : 0, to = pixels - first < column_taps ? pixels - first : column_taps;
            const float* blended = shared.blended + r * 3 * CHUNK + 3 * first;
            float sum[3] = {0, 0, 0};
            for (int t = from; t < to; ++t) {
                const float weight = filter_weight(Filter::bilinear, (shared.offset[slot] + float(t)) * column_slope);
                for (int c = 0; c < 3; ++c) sum[c] += weight * blended[3 * t + c];
            }
            float* value = shared.values + (r * TILE_COLUMNS + x) * 3;
            for (int c = 0; c < 3; ++c)
                value[c] = (chunk == begin ? 0 : value[c]) + sum[c] * shared.share[slot];
        });
    }
    store_tile<T, VEC>(job, tile, each, [&](int r, int v, float* out) {
        for (int k = 0; k < VEC; ++k) out[k] = shared.values[r * 3 * TILE_COLUMNS + v + k];
    });
}

// ---- the host's side: crops to launches ----

// A call, and where the layout goes.
struct PackPatchesCuda : PackPatches {
    int32_t *layout_grids, *cu_seqlens;  // written: [num_crops, 2], [num_crops + 1]

    // Crop i needs no resampling.
    bool copies(int64_t i) const { return rows(i).copies() && columns(i).copies(); }
};

// launch(job, blocks, copy) for as few launches as parameters of N crops allow.
template <int N, typename Launch>
void for_each_launch(const PackPatchesCuda& all, const Launch& launch) {
    int64_t patch = 0;
    for (int64_t from = 0; from < all.num_crops;) {
        PackJob<N> job;
        int64_t blocks = 0;
        int count = 0;
        bool copy = true;
        for (int64_t i = from; i < all.num_crops && i < from + N; ++i) copy = copy && all.copies(i);
        job.grids = all.layout_grids + 2 * from;
        job.cu_seqlens = all.cu_seqlens + from;
        for (; count < N && from + count < all.num_crops; ++count) {
            const double* crop = all.crops + 5 * (from + count);
            const int64_t height = all.grids[2 * (from + count)], width = all.grids[2 * (from + count) + 1];
            const int64_t more = copy ? copy_tiles(height, width, int(all.patch_size)) : tiles(height, width, all.patch_size);
            if (count > 0 && blocks + more >= int64_t(1) << 31) break;
            const int64_t* image = all.images + 2 * int64_t(crop[0]);
            job.image[count] = reinterpret_cast<const uint8_t*>(image[0]);
            job.stride[count] = int32_t(image[1]);
            for (int k = 0; k < 4; ++k) job.box[count][k] = crop[1 + k];
            job.height[count] = int32_t(height);
            job.width[count] = int32_t(width);
            job.first_block[count] = int32_t(blocks);
            job.first_patch[count] = int32_t(patch);
            blocks += more;
            patch += height * width;
        }
        job.crops = count;
        job.patch_size = int32_t(all.patch_size);
        for (int c = 0; c < 3; ++c) {
            job.scale[c] = all.scale[c];
            job.bias[c] = all.bias[c];
        }
        job.channels_first = all.channels_first;
        job.patches = all.patches;
        launch(job, blocks, copy);
        from += count;
    }
}

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

// Runs call(T{}, std::integral_constant<int, VEC>) with the stored type and the values that are stored at once.
template <typename Call>
void by_type(const PackPatchesCuda& all, const Call& call) {
    const int64_t run = all.channels_first ? all.patch_size : 3 * all.patch_size;
    const auto by_vector = [&](auto type, auto widest) {
        if (run % widest.value == 0) call(type, widest);
        else if (run % 2 == 0) call(type, Count<2>{});
        else call(type, Count<1>{});
    };
    if (all.dtype == Dtype::float32) by_vector(float{}, Count<4>{});
    else if (all.dtype == Dtype::bfloat16) by_vector(Bfloat16{}, Count<8>{});
    else by_vector(Float16{}, Count<8>{});
}

// Launches on a stream of a device and returns at once. Throws std::runtime_error with CUDA's reason.
void pack_patches_cuda(const PackPatchesCuda& job, int device, void* stream);

// The same blocks run on the host, one after another, items of a phase from the last on if `backwards`: for tests.
void pack_patches_emulated(const PackPatchesCuda& job, bool backwards);

}  // namespace granvit

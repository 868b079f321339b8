// pack_patches on the GPU, the host's side: which crop goes to which launch of which kernel.
//
// What a kernel's blocks do is written so that the host can do it too (pack_patches_emulated): crops that need no resampling
// are copied (pack_copy.h); of the others one kernel makes the weights (pack_weights.h), and another one the patches
// (pack_resample.h).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/packing.h"
#include "cuda/pack_copy.h"
#include "cuda/pack_resample.h"

namespace granvit {

// A call, and where the layout goes.
struct PackPatchesCuda : PackPatches {
    int32_t *layout_grids, *cu_seqlens;  // written: [num_crops, 2], [num_crops + 1]
    int32_t* workspace;                  // workspace_bytes(), at a multiple of 16 bytes

    // Crop i needs no resampling.
    bool copies(int64_t i) const { return rows(i).copies() && columns(i).copies(); }
    int64_t height(int64_t i) const { return grids[2 * i] * patch_size; }
    int64_t width(int64_t i) const { return grids[2 * i + 1] * patch_size; }
    // Of crop i's weights, in units of 16 bytes.
    int64_t weights_size(int64_t i) const {
        const Axis rows = this->rows(i), columns = this->columns(i);
        const auto place = WeightsPlace::of(height(i), width(i), rows.end - rows.begin, grows(rows), row_taps(filter),
                                            column_groups(columns));
        return (place.size() + 3) / 4;
    }
    int64_t workspace_bytes() const {
        int64_t size = 0;
        for (int64_t i = 0; i < num_crops; ++i) size += copies(i) ? 0 : weights_size(i);
        return 16 * size;
    }
};

// Fills the crops of a job, and calls launch(job, blocks) whenever it is full.
template <typename Job, typename Launch>
class Filling {
public:
    Filling(const Job& job, const Launch& launch) : job(job), launch(launch) { this->job.crops = 0; }

    // The next crop, which takes so many blocks.
    auto& next(int64_t crop_blocks) {
        constexpr int most = sizeof(job.crop) / sizeof(job.crop[0]);
        if (crop_blocks >= LIMIT) throw std::runtime_error("pack_patches: a crop has more pixels than a launch takes");
        if (job.crops == most || blocks + crop_blocks >= LIMIT) flush();
        auto& crop = job.crop[job.crops++];
        crop.first_block = int32_t(blocks);
        blocks += crop_blocks;
        return crop;
    }

    // What is left.
    void flush() {
        if (job.crops) launch(job, blocks);
        job.crops = 0;
        blocks = 0;
    }

private:
    static constexpr int64_t LIMIT = int64_t(1) << 31;
    Job job;
    const Launch& launch;
    int64_t blocks = 0;
};

// launch(job, blocks) for as few launches as parameters of N crops allow, of the weights of the crops that are resampled.
template <int N, typename Launch>
void for_each_weights_launch(const PackPatchesCuda& all, const Launch& launch) {
    WeightsJob<N> job;
    job.filter = all.filter;
    job.rounding = all.rounding;
    job.workspace = all.workspace;
    Filling filling(job, launch);
    int64_t weights = 0;
    for (int64_t i = 0; i < all.num_crops; ++i) {
        if (all.copies(i)) continue;
        const int64_t height = all.height(i), width = all.width(i);
        WeightsCrop& crop = filling.next(weights_blocks(height, width));
        for (int k = 0; k < 4; ++k) crop.box[k] = all.crops[5 * i + 1 + k];
        for (int k = 0; k < 4; ++k) crop.frame[k] = int32_t(all.frames[4 * i + k]);
        crop.height = int32_t(height);
        crop.width = int32_t(width);
        crop.weights = uint32_t(weights);
        weights += all.weights_size(i);
    }
    filling.flush();
}

template <typename Crop, int N>
PackJob<Crop, N> empty_job(const PackPatchesCuda& all) {
    PackJob<Crop, N> job;
    job.patch_size = int32_t(all.patch_size);
    job.merge = int32_t(all.merge);
    for (int c = 0; c < 3; ++c) job.scale[c] = all.scale[c], job.bias[c] = all.bias[c];
    job.channels_first = all.channels_first;
    job.patches = all.patches;
    job.grids = all.layout_grids;
    job.cu_seqlens = all.cu_seqlens;
    job.workspace = all.workspace;
    job.bands = 1;
    return job;
}

// The part of crop i that all kernels take; first_block is set.
inline void fill_crop(CropJob& crop, const PackPatchesCuda& all, int64_t i, int64_t first_patch) {
    const int64_t* image = all.images + 2 * int64_t(all.crops[5 * i]);
    crop.image = reinterpret_cast<const uint8_t*>(image[0]);
    crop.stride = int32_t(image[1]);
    crop.height = int32_t(all.grids[2 * i]);
    crop.width = int32_t(all.grids[2 * i + 1]);
    crop.first_patch = int32_t(first_patch);
    crop.number = int32_t(i);
}

// The same of the crops that are copied.
template <int N, typename Launch>
void for_each_copy_launch(const PackPatchesCuda& all, const Launch& launch) {
    Filling filling(empty_job<CropJob, N>(all), launch);
    int64_t patch = 0;
    for (int64_t i = 0; i < all.num_crops; patch += all.grids[2 * i] * all.grids[2 * i + 1], ++i) {
        const Axis rows = all.rows(i), columns = all.columns(i);
        if (!rows.copies() || !columns.copies()) continue;
        const int64_t height = all.grids[2 * i], width = all.grids[2 * i + 1];
        CropJob& crop = filling.next(copy_tiles(height, width, int(all.patch_size), int(all.merge)));
        fill_crop(crop, all, i, patch);
        crop.image += (rows.begin + rows.first) * crop.stride + 3 * (columns.begin + columns.first);
    }
    filling.flush();
}

constexpr int64_t ENOUGH_BLOCKS = 8192;  // several times as many as the largest GPUs hold at a time
constexpr int MOST_BANDS = 8;            // of a block: by then its first source rows are few of all

// And of those that are resampled.
template <int N, typename Launch>
void for_each_resample_launch(const PackPatchesCuda& all, const Launch& launch) {
    const int p = int(all.patch_size);
    const BandShape shape = BandShape::of(p);
    int64_t bands = 0, weights = 0, patch = 0;
    for (int64_t i = 0; i < all.num_crops; ++i)
        if (!all.copies(i)) bands += shape.down(all.grids[2 * i], p) * shape.strips(all.grids[2 * i + 1], p);
    PackJob<ResampledCropJob, N> job = empty_job<ResampledCropJob, N>(all);
    job.bands = int(bands / ENOUGH_BLOCKS < 1 ? 1 : bands / ENOUGH_BLOCKS > MOST_BANDS ? MOST_BANDS : bands / ENOUGH_BLOCKS);
    Filling filling(job, launch);
    for (int64_t i = 0; i < all.num_crops; patch += all.grids[2 * i] * all.grids[2 * i + 1], ++i) {
        if (all.copies(i)) continue;
        const int64_t height = all.grids[2 * i], width = all.grids[2 * i + 1];
        const int64_t strips = (shape.down(height, p) + job.bands - 1) / job.bands * shape.strips(width, p);
        ResampledCropJob& crop = filling.next(strips);
        fill_crop(crop, all, i, patch);
        const Axis rows = all.rows(i), columns = all.columns(i);
        crop.weights = uint32_t(weights);
        crop.image += rows.begin * crop.stride + 3 * columns.begin;
        crop.sources = int32_t(rows.end - rows.begin);
        crop.groups = column_groups(columns);
        crop.way = all.columns_first(i) ? Way::columns_first : grows(rows) ? Way::grows : Way::shrinks;
        weights += all.weights_size(i);
    }
    filling.flush();
}

// Runs call(T{}) with the stored type.
template <typename Call>
void by_type(Dtype dtype, const Call& call) {
    if (dtype == Dtype::float32) call(float{});
    else if (dtype == Dtype::bfloat16) call(Bfloat16{});
    else call(Float16{});
}

// Runs call(integral_constant<int, TAPS>, bool_constant<ROUNDED>), as resample_block takes them.
template <typename Call>
void by_filter(const PackPatchesCuda& all, const Call& call) {
    const auto by_rounding = [&](auto taps) {
        if (all.rounding == Rounding::none) call(taps, std::false_type{});
        else call(taps, std::true_type{});
    };
    if (all.filter == Filter::bicubic) by_rounding(std::integral_constant<int, 4>{});
    else by_rounding(std::integral_constant<int, 2>{});
}

// Launches on a stream of a device and returns at once. Throws std::runtime_error with CUDA's reason.
void pack_patches_cuda(const PackPatchesCuda& job, int device, void* stream);

// The same blocks run on the host, one after another, items of a phase from the last on if `backwards`: for tests.
void pack_patches_emulated(const PackPatchesCuda& job, bool backwards);

}  // namespace granvit

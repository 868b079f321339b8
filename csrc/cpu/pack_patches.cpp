#include "cpu/pack_patches.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/resample.h"

namespace granvit {
namespace {

// Where one axis' weights lie in the storage that all crops of a call share.
struct AxisPlan {
    Axis axis;
    int64_t taps, weights, outputs;  // output i: weights + i * taps in the one, outputs + i in the other
};

struct Crop {
    AxisPlan rows, columns;
    int64_t first_patch;
};

struct Storage {
    std::vector<float> weights;
    std::vector<int32_t> first;
    int64_t num_weights = 0, num_outputs = 0;

    AxisPlan reserve(double a, double b, int64_t outputs) {
        AxisPlan plan{make_axis(a, b, outputs), 0, num_weights, num_outputs};
        if (plan.axis.copies()) return plan;
        plan.taps = plan.axis.taps();
        num_weights += plan.taps * outputs;
        num_outputs += outputs;
        return plan;
    }
    void allocate() {
        weights.resize(num_weights);
        first.resize(num_outputs);
    }
    void fill(const AxisPlan& plan) {
        if (plan.axis.copies()) return;
        for (int64_t i = 0; i < plan.axis.outputs; ++i) {
            const int64_t pixel = axis_weights(plan.axis, i, &weights[plan.weights + i * plan.taps]);
            first[plan.outputs + i] = int32_t(pixel - plan.axis.begin);
        }
    }
    Taps taps(const AxisPlan& plan) const {
        return {plan.axis.copies(), plan.taps, weights.data() + plan.weights, first.data() + plan.outputs};
    }
};

}  // namespace

void pack_patches(const PackPatches& job, int threads) {
    const int64_t p = job.patch_size, patch_bytes = 3 * p * p * size_of(job.dtype);

    Storage storage;
    std::vector<Crop> crops(job.num_crops);
    std::vector<std::pair<int64_t, int64_t>> items;  // (crop, row of patches)
    int64_t patches = 0, widest_row = 0, widest_line = 0;
    for (int64_t n = 0; n < job.num_crops; ++n) {
        const double* box = job.crops + 5 * n;
        const int64_t height = job.grids[2 * n], width = job.grids[2 * n + 1];
        crops[n] = {storage.reserve(box[2], box[4], height * p), storage.reserve(box[1], box[3], width * p), patches};
        for (int64_t y = 0; y < height; ++y) items.emplace_back(n, y);
        patches += height * width;
        widest_row = std::max(widest_row, 3 * (crops[n].columns.axis.end - crops[n].columns.axis.begin));
        widest_line = std::max(widest_line, 3 * width * p);
    }
    storage.allocate();
    parallel_for(job.num_crops, threads, [&](int64_t n, int) {
        storage.fill(crops[n].rows);
        storage.fill(crops[n].columns);
    });

    std::vector<float> scale(3 * p), bias(3 * p);
    for (int64_t k = 0; k < 3 * p; ++k) {
        const int64_t channel = job.channels_first ? k / p : k % 3;
        scale[k] = job.scale[channel];
        bias[k] = job.bias[channel];
    }

    const int64_t scratch_size = widest_row + widest_line + 3 * p + 3 * PADDING;
    std::vector<float> scratch(scratch_size * std::max(threads, 1));
    parallel_for(int64_t(items.size()), threads, [&](int64_t item, int thread) {
        const auto [n, y] = items[item];
        const Crop& crop = crops[n];
        const Axis &rows = crop.rows.axis, &columns = crop.columns.axis;
        const int64_t* image = job.images + 2 * int64_t(job.crops[5 * n]);
        const int64_t grid_width = job.grids[2 * n + 1];
        const Taps row_taps = storage.taps(crop.rows), column_taps = storage.taps(crop.columns);
        float* row = scratch.data() + scratch_size * thread;
        float* line = row + widest_row + PADDING;
        float* segment = line + widest_line + PADDING;
        const PatchRow patch_row{
            reinterpret_cast<const uint8_t*>(image[0]) + rows.begin * image[1] + columns.begin * 3, image[1],
            columns.end - columns.begin, &row_taps, &column_taps, y * p, grid_width, p, scale.data(), bias.data(),
            job.channels_first, job.dtype,
            static_cast<char*>(job.patches) + (crop.first_patch + y * grid_width) * patch_bytes, row, line, segment};
        GRANVIT_BY_ISA(pack_patch_row, patch_row);
    });
}

}  // namespace granvit

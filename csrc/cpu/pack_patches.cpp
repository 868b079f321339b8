#include "cpu/pack_patches.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace granvit {
namespace {

// Where one axis' weights lie in the storage that all crops of a call share.
struct AxisPlan {
    Axis axis;
    int64_t count;    // outputs
    int64_t sources;  // source pixels that are read
    int64_t weights, outputs;  // of the first output
};

// Weights of all axes of a call: floats, or with rounding fixed.
struct Storage {
    const Rounding rounding;
    std::vector<float> weights;
    std::vector<int16_t> fixed;
    std::vector<int32_t> first;
    int64_t num_weights = 0, num_outputs = 0, most_taps = 0;

    // Elements from output to output.
    int64_t pitch(const Axis& axis) const {
        return rounding == Rounding::none ? axis.taps() : 2 * fixed_taps(axis.taps());
    }
    AxisPlan reserve(const Axis& axis, int64_t count) {
        if (axis.copies()) return {axis, count, count, 0, 0};
        const int64_t sources = place(axis, count - 1).first + axis.taps() - place(axis, 0).first;
        const AxisPlan plan{axis, count, sources, num_weights, num_outputs};
        num_weights += pitch(axis) * count;
        num_outputs += count;
        most_taps = std::max(most_taps, axis.taps());
        return plan;
    }
    void allocate() {
        if (rounding == Rounding::none) weights.resize(num_weights);
        else fixed.resize(num_weights);
        first.resize(num_outputs);
    }
    // exact: scratch [most_taps].
    void fill(const AxisPlan& plan, double* exact) {
        if (plan.axis.copies()) return;
        const int64_t taps = plan.axis.taps(), low = place(plan.axis, 0).first;
        for (int64_t i = 0; i < plan.count; ++i) {
            first[plan.outputs + i] = int32_t(axis_weights(plan.axis, i, exact) - low);
            const int64_t at = plan.weights + i * pitch(plan.axis);
            if (rounding == Rounding::none) {
                for (int64_t t = 0; t < taps; ++t) weights[at + t] = float(exact[t]);
                continue;
            }
            for (int64_t t = 0; t < taps; ++t) {
                const int32_t weight = fixed_weight(exact[t]);
                fixed[at + t] = int16_t(weight >> LOW_BITS);
                fixed[at + fixed_taps(taps) + t] = int16_t(weight & ((1 << LOW_BITS) - 1));
            }
        }
    }
    Taps taps(const AxisPlan& plan) const {
        return {plan.axis.copies(), plan.axis.taps(), first.data() + plan.outputs, weights.data() + plan.weights,
                fixed.data() + plan.weights};
    }
};

struct Crop {
    AxisPlan rows, columns;
    int64_t first_patch;
};

// The first source pixel that an axis reads, in the image.
int64_t low(const Axis& axis) {
    return axis.begin + (axis.copies() ? axis.first : place(axis, 0).first);
}

// What a thread works in, as large as the largest crop needs; PatchRows says what each piece is.
struct Scratch {
    int64_t planes = 0, blended = 0, line = 0, ring = 0, ring_pitch = 0, copied_pitch = 0, pointers = 0;
    std::vector<char> storage;
    int64_t size = 0;

    static int64_t padded(int64_t bytes) { return (bytes + 2 * PADDING - 1) / PADDING * PADDING; }

    void include(const PackPatches& job, const Crop& crop) {
        const int64_t read = 3 * crop.columns.sources, made = 3 * crop.columns.count;
        planes = std::max(planes, padded(4 * made + 3 * PADDING));
        line = std::max(line, padded(4 * made));
        if (job.rounding == Rounding::none) {
            blended = std::max(blended, padded(4 * read));
            return;
        }
        const int64_t taps = crop.rows.axis.copies() ? 1 : crop.rows.axis.taps();
        ring_pitch = std::max(ring_pitch, padded(made));
        ring = std::max(ring, (taps + GROUP - 1) * padded(made));
        copied_pitch = std::max(copied_pitch, padded(read));
        pointers = std::max(pointers, padded(taps * int64_t(sizeof(void*))));
    }
    void allocate(int threads) {
        size = planes + line + blended + ring + GROUP * copied_pitch + pointers;
        storage.resize(size * std::max(threads, 1) + PADDING);
    }
    void lend(PatchRows& rows, const Crop& crop, int thread) {
        char* at = storage.data() + PADDING - reinterpret_cast<uintptr_t>(storage.data()) % PADDING + size * thread;
        const auto take = [&](int64_t bytes) { return (at += bytes) - bytes; };
        rows.planes = take(planes);
        rows.line = reinterpret_cast<float*>(take(line));
        rows.rounded = reinterpret_cast<uint8_t*>(rows.line);
        rows.blended = reinterpret_cast<float*>(take(blended));
        rows.pointers = reinterpret_cast<const uint8_t**>(take(pointers));
        rows.copied = reinterpret_cast<uint8_t*>(take(GROUP * copied_pitch));
        rows.copied_pitch = copied_pitch;
        rows.ring = reinterpret_cast<uint8_t*>(take(ring));
        rows.ring_pitch = padded(3 * crop.columns.count);
    }
};

// Some rows of patches of a crop: what a thread takes at once.
struct Item {
    int64_t crop, begin, end;
};

// With rounding, source rows at the border of two items are resampled twice: so an item is as high as leaves each thread
// several. Without it nothing is shared.
std::vector<Item> divide(const PackPatches& job, int threads) {
    int64_t most = 1, rows = 0;
    for (int64_t n = 0; n < job.num_crops; ++n) rows += job.grids[2 * n];
    if (job.rounding != Rounding::none) most = std::max<int64_t>(1, rows / (8 * std::max(threads, 1)));
    std::vector<Item> items;
    for (int64_t n = 0; n < job.num_crops; ++n) {
        const int64_t height = job.grids[2 * n], parts = (height + most - 1) / most;
        for (int64_t k = 0; k < parts; ++k) items.push_back({n, height * k / parts, height * (k + 1) / parts});
    }
    return items;
}

}  // namespace

void pack_patches(const PackPatches& job, int threads) {
    const int64_t p = job.patch_size;
    Storage storage{job.rounding, {}, {}, {}};
    Scratch scratch;
    std::vector<Crop> crops(job.num_crops);
    int64_t patches = 0;
    for (int64_t n = 0; n < job.num_crops; ++n) {
        const int64_t height = job.grids[2 * n], width = job.grids[2 * n + 1];
        crops[n] = {storage.reserve(job.rows(n), height * p), storage.reserve(job.columns(n), width * p), patches};
        patches += height * width;
        scratch.include(job, crops[n]);
    }
    storage.allocate();
    scratch.allocate(threads);
    std::vector<double> exact(storage.most_taps * std::max(threads, 1));
    parallel_for(job.num_crops, threads, [&](int64_t n, int thread) {
        storage.fill(crops[n].rows, exact.data() + storage.most_taps * thread);
        storage.fill(crops[n].columns, exact.data() + storage.most_taps * thread);
    });

    std::vector<float> scale(3 * p + PADDING / 4), bias(3 * p + PADDING / 4);
    for (int64_t k = 0; k < 3 * p; ++k) {
        const int64_t channel = job.channels_first ? k / p : k % 3;
        scale[k] = job.scale[channel];
        bias[k] = job.bias[channel];
    }

    const std::vector<Item> items = divide(job, threads);
    parallel_for(int64_t(items.size()), threads, [&](int64_t item, int thread) {
        const auto [n, begin, end] = items[item];
        const Crop& crop = crops[n];
        const Axis &rows = crop.rows.axis, &columns = crop.columns.axis;
        const int64_t *image = job.images + 2 * int64_t(job.crops[5 * n]), stride = image[1];
        const uint8_t* pixels = reinterpret_cast<const uint8_t*>(image[0]);
        const Taps row_taps = storage.taps(crop.rows), column_taps = storage.taps(crop.columns);
        PatchRows made{};
        made.source = pixels + low(rows) * stride + low(columns) * 3;
        made.image_end = pixels + (rows.end - 1) * stride + columns.end * 3;
        made.row_stride = stride;
        made.source_rows = crop.rows.sources, made.source_columns = crop.columns.sources;
        made.rows = &row_taps, made.columns = &column_taps;
        made.begin = begin, made.end = end;
        made.grid_width = job.grids[2 * n + 1], made.patch_size = p, made.merge = job.merge;
        made.scale = scale.data(), made.bias = bias.data();
        made.channels_first = job.channels_first, made.columns_first = job.columns_first(n);
        made.dtype = job.dtype;
        made.patches = static_cast<char*>(job.patches) + crop.first_patch * 3 * p * p * size_of(job.dtype);
        scratch.lend(made, crop, thread);
        if (job.rounding == Rounding::none) GRANVIT_BY_ISA(pack_exact, made);
        else GRANVIT_BY_ISA(pack_rounded, made);
    });
}

}  // namespace granvit

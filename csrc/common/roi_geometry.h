// Where RoIAlign's samples lie along one axis. float32, in torchvision's order of operations, one rounding each: compile
// without FMA contraction, or the number of adaptive samples and the cells they read flip. The specification is
// granvit_kernels/ops/roi_gather/reference.py.
#pragma once
#include <cmath>
#include <cstdint>

namespace granvit {

struct RoiAxis {
    float start;      // first bin's beginning, in cells: cell j's centre lies at j
    float bin;        // size of a bin; negative for an inverted box
    int64_t samples;  // a bin; 0 where there are none
    int size;         // cells of the image

    // low, high: the box's ends in patch units.
    RoiAxis(float low, float high, int bins, int64_t sampling_ratio, int cells) : size(cells) {
        start = low - 0.5f;
        bin = ((high - 0.5f) - start) / float(bins);
        samples = 0;
        if (!std::isfinite(bin)) return;  // the ends are so far apart that their distance overflows
        if (sampling_ratio > 0) samples = sampling_ratio;
        else if (bin > 0) samples = bin < 0x1p62f ? int64_t(std::ceil(bin)) : int64_t(1) << 62;
    }

    float position(int index, int64_t sample) const {
        return (start + float(index) * bin) + (float(sample) + 0.5f) * bin / float(samples);
    }

    // First sample in [0, samples) for which passes() holds, `samples` if none; passes() must stay true once it is.
    template <typename Predicate>
    int64_t first(const Predicate& passes) const {
        int64_t low = 0, high = samples;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (passes(middle)) high = middle;
            else low = middle + 1;
        }
        return low;
    }

    // Writes the cells that bin `index` reads, rising, and their shares of the bin; returns how many, at most capacity().
    // Samples outside [-1, size] have no cell and count all the same. Samples at one position are visited once: a huge
    // box has a great many.
    int taps(int index, struct RoiTap* out) const;
    int64_t capacity() const {
        const int64_t most = samples < size ? 2 * samples : size;
        return most < size ? most : size;
    }
};

struct RoiTap {
    int32_t cell;
    float weight;
};

inline int RoiAxis::taps(int index, RoiTap* out) const {
    if (samples <= 0) return 0;
    // Positions rise with the sample's number, or fall in an inverted box; `at` makes them rise.
    const bool rising = bin >= 0;
    const auto at = [&](int64_t i) { return position(index, rising ? i : samples - 1 - i); };
    const int64_t end = first([&](int64_t i) { return at(i) > float(size); });
    int64_t i = first([&](int64_t i) { return at(i) >= -1.0f; });
    int count = 0;
    const auto add = [&](int cell, float weight) {
        if (weight == 0.0f) return;
        for (int back = count - 1; back >= 0 && back >= count - 2; --back) {
            if (out[back].cell == cell) {
                out[back].weight += weight;
                return;
            }
        }
        out[count++] = {cell, weight};
    };
    while (i < end) {
        const float here = at(i);
        int64_t next = i + 1;
        if (next < end && at(next) == here) next = first([&](int64_t j) { return at(j) > here; });
        if (next > end) next = end;
        const float share = float(next - i) / float(samples);
        const float y = here > 0.0f ? here : 0.0f;
        int cell = int(y);
        if (cell >= size - 1) {
            add(size - 1, share);
        } else {
            const float upper = y - float(cell);
            add(cell, share * (1.0f - upper));
            add(cell + 1, share * upper);
        }
        i = next;
    }
    return count;
}

}  // namespace granvit

// Where RoIAlign's samples lie along one axis. Positions are float32, in torchvision's order of operations, one rounding
// each: include this only where FMA contraction is off (not from *_isa.cpp), or the number of adaptive samples and the cells
// they read flip. The specification is granvit_kernels/ops/roi_gather/reference.py.
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
    // box has a great many. Tap: {int32_t place; float weight}.
    template <typename Tap>
    int taps(int index, Tap* out) const;
    int64_t capacity() const {
        const int64_t most = samples < size ? 2 * samples : size;
        return most < size ? most : size;
    }
};

template <typename Tap>
int RoiAxis::taps(int index, Tap* out) const {
    if (samples <= 0) return 0;
    // Positions rise with the sample's number, or fall in an inverted box; `at` makes them rise.
    const bool rising = bin >= 0;
    const auto at = [&](int64_t i) { return position(index, rising ? i : samples - 1 - i); };
    const int64_t end = first([&](int64_t i) { return at(i) > float(size); });
    int64_t i = first([&](int64_t i) { return at(i) >= -1.0f; });
    int count = 0;
    // Samples rise, so that only the last two cells still grow: their sums stay in double, and are rounded once.
    double sums[2];
    const auto add = [&](int cell, double weight) {
        if (weight == 0.0) return;
        for (int back = count - 1; back >= 0 && back >= count - 2; --back) {
            if (out[back].place == cell) {
                out[back].weight = float(sums[back % 2] += weight);
                return;
            }
        }
        out[count] = {cell, float(weight)};
        sums[count++ % 2] = weight;
    };
    while (i < end) {
        const float here = at(i);
        int64_t next = i + 1;
        if (next < end && at(next) == here) next = first([&](int64_t j) { return at(j) > here; });
        if (next > end) next = end;
        const double share = double(next - i) / double(samples);
        const float y = here > 0.0f ? here : 0.0f;
        int cell = int(y);
        if (cell >= size - 1) {
            add(size - 1, share);
        } else {
            const double upper = y - float(cell);
            add(cell, share * (1.0 - upper));
            add(cell + 1, share * upper);
        }
        i = next;
    }
    return count;
}

}  // namespace granvit

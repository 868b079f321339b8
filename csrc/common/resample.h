// Antialiased bilinear resampling of one axis: the formula, shared by every pack_patches kernel.
//
// [a, b) in source pixels becomes n outputs. Output i is centred at c = a + (i + 1/2) s, s = (b - a) / n; source pixel
// j, floor(a) <= j < ceil(b), weighs max(0, 1 - |j + 1/2 - c| / max(s, 1)), divided by the sum over j. In double: the
// rounding of a float centre at pixel 4000 would move a weight by 2e-4.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GRANVIT_HOST_DEVICE __host__ __device__
#else
#define GRANVIT_HOST_DEVICE
#endif

namespace granvit {

struct Axis {
    double a, step;       // start of the crop, source pixels an output pixel
    double support;       // half the width of the triangle, in source pixels
    int64_t begin, end;   // source pixels that may count
    int64_t outputs;

    // Every output pixel is one source pixel: nothing to resample.
    GRANVIT_HOST_DEVICE bool copies() const { return step == 1.0 && a == double(begin); }
    // No output has more source pixels than this.
    GRANVIT_HOST_DEVICE int64_t max_taps() const {
        int64_t taps = int64_t(ceil(2.0 * support)) + 1;
        return taps < end - begin ? taps : end - begin;
    }
};

GRANVIT_HOST_DEVICE inline Axis make_axis(double a, double b, int64_t outputs) {
    double step = (b - a) / double(outputs);
    return {a, step, step > 1.0 ? step : 1.0, int64_t(floor(a)), int64_t(ceil(b)), outputs};
}

// Writes output i's weights, which sum to 1, and its first source pixel; returns how many there are.
GRANVIT_HOST_DEVICE inline int64_t axis_weights(const Axis& axis, int64_t i, float* weights, int64_t* first) {
    double centre = axis.a + (double(i) + 0.5) * axis.step;
    int64_t from = int64_t(floor(centre - axis.support - 0.5)) + 1;  // the first with |j + 1/2 - centre| < support
    int64_t to = int64_t(ceil(centre + axis.support - 0.5));         // one past the last
    from = from > axis.begin ? from : axis.begin;
    to = to < axis.end ? to : axis.end;
    const double slope = 1.0 / axis.support;
    double sum = 0.0;
    for (int64_t j = from; j < to; ++j) {
        const double weight = 1.0 - fabs(double(j) + 0.5 - centre) * slope;
        weights[j - from] = float(weight);
        sum += weight;
    }
    const double share = 1.0 / sum;
    for (int64_t j = from; j < to; ++j) weights[j - from] = float(weights[j - from] * share);
    *first = from;
    return to - from;
}

}  // namespace granvit

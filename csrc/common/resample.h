// Antialiased bilinear resampling of one axis: the formula, shared by every pack_patches kernel.
//
// [a, b) in source pixels becomes n outputs. Output i is centred at c = a + (i + 1/2) s, s = (b - a) / n; source pixel
// j, floor(a) <= j < ceil(b), weighs max(0, 1 - |j + 1/2 - c| / max(s, 1)), divided by the sum over j. In double: the
// rounding of a float centre at pixel 4000 would move a weight by 2e-4. From the first tap's offset on, a float will do.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/convert.h"

namespace granvit {

struct Axis {
    double a, step;       // start of the crop, source pixels an output pixel
    double support;       // half the width of the triangle, in source pixels
    int64_t begin, end;   // source pixels that may count
    int64_t outputs;

    // Every output pixel is one source pixel: nothing to resample.
    GRANVIT_HOST_DEVICE bool copies() const { return step == 1.0 && a == double(begin); }
    // Source pixels that get a weight, the same number for every output: an open interval of 2 * support holds no more.
    GRANVIT_HOST_DEVICE int64_t taps() const {
        const int64_t widest = int64_t(ceil(2.0 * support));
        return widest < end - begin ? widest : end - begin;
    }
};

GRANVIT_HOST_DEVICE inline Axis make_axis(double a, double b, int64_t outputs) {
    const double step = (b - a) / double(outputs);
    return {a, step, step > 1.0 ? step : 1.0, int64_t(floor(a)), int64_t(ceil(b)), outputs};
}

// The source pixels of output i: taps() of them from `first` on, and how far the first's centre lies from the output's.
struct Place {
    int64_t first;
    double offset;
};

GRANVIT_HOST_DEVICE inline Place place(const Axis& axis, int64_t i) {
    const double centre = axis.a + (double(i) + 0.5) * axis.step;
    const int64_t latest = axis.end - axis.taps();
    int64_t first = int64_t(floor(centre - axis.support - 0.5)) + 1;  // |first + 1/2 - centre| < support
    first = first > axis.begin ? first : axis.begin;
    first = first < latest ? first : latest;
    return {first, double(first) + 0.5 - centre};
}

// A pixel's weight before the division by their sum; slope is 1 / support.
template <typename Real>
GRANVIT_HOST_DEVICE inline Real triangle(Real offset, Real slope) {
    const Real weight = 1 - (offset < 0 ? -offset : offset) * slope;
    return weight > 0 ? weight : 0;
}

// Writes output i's weights [taps], which sum to 1, and returns the source pixel of the first.
inline int64_t axis_weights(const Axis& axis, int64_t i, float* weights) {
    const Place at = place(axis, i);
    const double slope = 1.0 / axis.support;
    const int64_t taps = axis.taps();
    double sum = 0.0;
    for (int64_t t = 0; t < taps; ++t) {
        const double weight = triangle(at.offset + double(t), slope);
        weights[t] = float(weight);
        sum += weight;
    }
    const double share = 1.0 / sum;
    for (int64_t t = 0; t < taps; ++t) weights[t] = float(weights[t] * share);
    return at.first;
}

}  // namespace granvit

// Antialiased resampling of one axis, bilinear or bicubic: the formula, shared by every pack_patches kernel.
//
// [a, b) in source pixels becomes n outputs. Output i is centred at c = a + (i + 1/2) s, s = (b - a) / n; source pixel
// j, floor(a) <= j < ceil(b), weighs f((j + 1/2 - c) / max(s, 1)), divided by the sum over j; f is the Filter's function.
// In double: the rounding of a float centre at pixel 4000 would move a weight by 2e-4. From the first tap's offset on, a
// float will do, except where values are rounded: those weights are Pillow's, bit for bit, because each operation here is rounded
// as there and in the same order. Source pixels are counted from the window's first, floor(a), as Pillow does in a crop.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/convert.h"

namespace granvit {

// Values shared with granvit_kernels/ops/patch_packing/arguments.py.
enum class Filter : int { bilinear = 0, bicubic = 1 };
// pil, pil13: along the rows and down the columns in two passes, each in integers and rounded to 8 bits (fixed_weight). pil
// has the rows first, as Pillow before version 13, pil13 the cheaper pass, as Pillow since (columns_first).
enum class Rounding : int { none = 0, pil = 1, pil13 = 2 };

// Where a Filter's function becomes zero.
GRANVIT_HOST_DEVICE static inline int radius(Filter filter) { return filter == Filter::bicubic ? 2 : 1; }

// A product that no compiler fuses with the sum it goes into. The host's files are compiled without fusing.
GRANVIT_HOST_DEVICE static inline double times(double x, double y) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(x, y);
#else
    return x * y;
#endif
}
GRANVIT_HOST_DEVICE static inline float times(float x, float y) { return x * y; }

// The Filter's function: a triangle, or Keys' cubic with a = -1/2, which gives back quadratic polynomials.
template <typename Real>
GRANVIT_HOST_DEVICE static inline Real filter_weight(Filter filter, Real x) {
    if (x < 0) x = -x;
    if (filter == Filter::bilinear) return x < 1 ? 1 - x : Real(0);
    if (x < 1) return times(times(times(Real(1.5), x) - Real(2.5), x), x) + 1;
    if (x < 2) return times(times(times(x - 5, x) + 8, x) - 4, Real(-0.5));
    return 0;
}

struct Axis {
    Filter filter;
    double start, step;    // the crop's, from the window's first pixel, in [0, 1); source pixels an output pixel
    double scale;          // of the filter: max(step, 1)
    int64_t begin, end;    // the window: source pixels that may count
    int64_t first;         // output that is wanted first: callers count outputs from there

    // Every output pixel is one source pixel, `first` later: nothing to resample.
    GRANVIT_HOST_DEVICE bool copies() const { return step == 1.0 && start == 0.0; }
    // Half the width of the filter, in source pixels.
    GRANVIT_HOST_DEVICE double support() const { return radius(filter) * scale; }
    // Source pixels that get a weight, the same number for every output: an interval of 2 * support holds no more, of
    // those at one of its ends, whose weight is zero.
    GRANVIT_HOST_DEVICE int64_t taps() const {
        const int64_t widest = int64_t(ceil(2.0 * support()));
        return widest < end - begin ? widest : end - begin;
    }
};

// [a, b) becomes n outputs, of which those from `first` on are wanted.
GRANVIT_HOST_DEVICE static inline Axis make_axis(Filter filter, double a, double b, int64_t n, int64_t first) {
    const double begin = floor(a), start = a - begin, step = (b - begin - start) / double(n);
    return {filter, start, step, step > 1.0 ? step : 1.0, int64_t(begin), int64_t(ceil(b)), first};
}

// The source pixels of output i: taps() of them from `first` on, counted from the window's first.
struct Place {
    int64_t first;
    double centre;

    // How far the centre of tap t lies from the output's.
    GRANVIT_HOST_DEVICE double offset(int64_t t) const { return double(first + t) - centre + 0.5; }
};

GRANVIT_HOST_DEVICE static inline Place place(const Axis& axis, int64_t i) {
    const double centre = axis.start + times(double(axis.first + i) + 0.5, axis.step);
    const double before = centre - axis.support() + 0.5;
    const int64_t latest = axis.end - axis.begin - axis.taps();
    const int64_t first = before > 0 ? int64_t(before) : 0;
    return {first < latest ? first : latest, centre};
}

// Writes output i's weights [taps()], which sum to 1, and returns its first source pixel, from the window's first.
GRANVIT_HOST_DEVICE static inline int64_t axis_weights(const Axis& axis, int64_t i, double* weights) {
    const Place at = place(axis, i);
    const double inverse = 1.0 / axis.scale;
    const int64_t taps = axis.taps();
    double sum = 0.0;
    for (int64_t t = 0; t < taps; ++t) {
        weights[t] = filter_weight(axis.filter, times(at.offset(t), inverse));
        sum += weights[t];
    }
    for (int64_t t = 0; t < taps; ++t) weights[t] /= sum;
    return at.first;
}

// ---- Rounding::pil, pil13: weights in steps of 2**-22, sums in int32, values 0-255 after each pass ----

constexpr int FIXED_BITS = 22;

// Half a step away from zero, as Pillow rounds.
GRANVIT_HOST_DEVICE static inline int32_t fixed_weight(double weight) {
    return int32_t(times(weight, double(1 << FIXED_BITS)) + (weight < 0 ? -0.5 : 0.5));
}

// The pixel of a sum of fixed_weight * pixel.
GRANVIT_HOST_DEVICE static inline uint8_t fixed_pixel(int32_t sum) {
    const int32_t pixel = (sum + (1 << (FIXED_BITS - 1))) >> FIXED_BITS;
    return uint8_t(pixel < 0 ? 0 : pixel > 255 ? 255 : pixel);
}

// Which pass comes first: only where both resample does it matter. From one size to another, in pixels.
GRANVIT_HOST_DEVICE static inline bool columns_first(Rounding rounding, int64_t from_height, int64_t from_width,
                                                     int64_t height, int64_t width) {
    return rounding == Rounding::pil13 && height < from_height && from_height - height > 2 * (from_width - width);
}

}  // namespace granvit

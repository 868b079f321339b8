// The weights of the crops that pack_patches resamples on the GPU, made once a call by a kernel of its own: in double
// precision and by csrc/common/resample.h, so that where values are rounded they are Pillow's. They lie in a workspace.
//
// Pixels are counted from the crop's window. Weights are whole numbers of 2**-22. Along a row they lie as the GPU takes them,
// four bytes at a time. Down the columns they lie as a walk down the source rows meets them, and with Rounding::none as
// floats: where rows shrink, each source row has the weights by which it counts for the first `taps` output rows that are
// not finished before it; where they grow, each output row has those of the last `taps` source rows that it is made from.
#pragma once
#include <cstdint>

#include "common/packing.h"
#include "cuda/pack_job.h"
#include "cuda/values.h"

namespace granvit {

constexpr int WEIGHTS_THREADS = 128;
constexpr int WORDS = 3;  // of four weights along a row, see pack_words

// An axis where output pixels are smaller than source pixels.
GRANVIT_HOST_DEVICE inline bool grows(const Axis& axis) { return axis.step < 1.0; }
// Output rows that a source row counts for at most, where rows shrink, and source rows that an output row is made from at
// most, where they grow.
GRANVIT_HOST_DEVICE inline int row_taps(Filter filter) { return 2 * radius(filter); }
// Weights of an output column, by fours.
GRANVIT_HOST_DEVICE inline int column_groups(const Axis& axis) { return int((axis.taps() + 3) / 4); }

// Where a crop's weights lie in the workspace, in words of 32 bits from its first on.
struct WeightsPlace {
    int64_t rows, columns, sources, weighted;  // output rows and columns; source rows; rows that have weights: one of these
    int32_t taps, groups;

    GRANVIT_HOST_DEVICE static WeightsPlace of(int64_t rows, int64_t columns, int64_t sources, bool grows, int taps, int groups) {
        return {rows, columns, sources, grows ? rows : sources, taps, groups};
    }
    // Weights of a source row, or of an output row.
    GRANVIT_HOST_DEVICE int64_t row(int64_t row) const { return row * taps; }
    // Output rows that are finished before a source row, which may be the one after the last.
    GRANVIT_HOST_DEVICE int64_t finished(int64_t source) const { return row(weighted) + source; }
    // The first and the last source pixel of an output row or column.
    GRANVIT_HOST_DEVICE int64_t row_span(int64_t row) const { return finished(sources + 1) + 2 * row; }
    GRANVIT_HOST_DEVICE int64_t column_span(int64_t column) const { return row_span(rows) + 2 * column; }
    // One of the words of a group of an output column's weights.
    GRANVIT_HOST_DEVICE int64_t word(int64_t group, int word, int64_t column) const {
        return column_span(columns) + (group * WORDS + word) * columns + column;
    }
    GRANVIT_HOST_DEVICE int64_t size() const { return word(groups, 0, 0); }
};

// A crop whose weights are made.
struct WeightsCrop {
    double box[4];            // x1, y1, x2, y2 in the image
    int32_t frame[4];         // as PackPatches'
    int32_t height, width;    // in pixels, of what is wanted
    int32_t first_block;
    uint32_t weights;         // as ResampledCropJob's
};

// The crops of one launch, at most N.
template <int N>
struct WeightsJob {
    WeightsCrop crop[N];
    int32_t crops;
    Filter filter;
    Rounding rounding;
    int32_t* workspace;
};

GRANVIT_HOST_DEVICE inline int64_t weights_blocks(int64_t height, int64_t width) {
    return (height + WEIGHTS_THREADS - 1) / WEIGHTS_THREADS + (width + WEIGHTS_THREADS - 1) / WEIGHTS_THREADS;
}

// What an output pixel is made from.
struct Blend {
    Axis axis;
    Place at;
    int64_t first, last;  // source pixels that may count: others' weights are zero by the formula
    double inverse, sum;

    GRANVIT_HOST_DEVICE Blend(const Axis& axis, int64_t i)
        : axis(axis), at(place(axis, i)), inverse(1.0 / axis.scale), sum(0) {
        const int64_t taps = axis.taps();
        GRANVIT_NOT_UNROLLED
        for (int64_t t = 0; t < taps; ++t) sum += unscaled(t);
        first = 0, last = taps - 1;
        while (first < last && at.offset(first) <= -axis.support()) ++first;
        while (last > first && at.offset(last) >= axis.support()) --last;
        first += at.first, last += at.first;
    }
    GRANVIT_HOST_DEVICE double unscaled(int64_t tap) const {
        return filter_weight(axis.filter, times(at.offset(tap), inverse));
    }
    GRANVIT_HOST_DEVICE int32_t weight(int64_t source) const {
        return source < first || source > last ? 0 : fixed_weight(unscaled(source - at.first) / sum);
    }
};

// The weights of output row i, and of the source rows after which it is the first to be finished.
GRANVIT_HOST_DEVICE inline void make_row_weights(const Axis& axis, const WeightsPlace& place, int64_t i, bool exact, int32_t* to) {
    const auto store = [&](int64_t at, int32_t weight) {
        to[at] = exact ? weight : int32_t(bits_of_float(float(weight)));
    };
    const Blend blend(axis, i);
    const int64_t begin = i == 0 ? 0 : Blend(axis, i - 1).last + 1;
    GRANVIT_NOT_UNROLLED
    for (int64_t source = begin; source <= blend.last; ++source) to[place.finished(source)] = int32_t(i);
    if (i == place.rows - 1)
        for (int64_t source = blend.last + 1; source <= place.sources; ++source) to[place.finished(source)] = int32_t(i + 1);
    to[place.row_span(i)] = int32_t(blend.first);
    to[place.row_span(i) + 1] = int32_t(blend.last);
    if (grows(axis)) {
        for (int k = 0; k < place.taps; ++k) store(place.row(i) + k, blend.weight(blend.last + 1 - place.taps + k));
        return;
    }
    GRANVIT_NOT_UNROLLED
    for (int k = 0; k < place.taps; ++k) {
        const bool inside = i + k < place.rows;
        const Blend later(axis, inside ? i + k : i);
        GRANVIT_NOT_UNROLLED
        for (int64_t source = begin; source <= blend.last; ++source)
            store(place.row(source) + k, inside ? later.weight(source) : 0);
    }
    if (i == place.rows - 1)
        for (int64_t at = place.row(blend.last + 1); at < place.row(place.sources); ++at) to[at] = 0;
}

// Four weights w as words for dot_halves and dot_bytes: the low 16 bits of w[0] and w[1], those of w[2] and w[3], and the
// signed bytes above.
GRANVIT_HOST_DEVICE inline void pack_words(const int32_t w[4], uint32_t words[WORDS]) {
    words[0] = (w[0] & 0xffff) | uint32_t(w[1]) << 16;
    words[1] = (w[2] & 0xffff) | uint32_t(w[3]) << 16;
    words[2] = 0;
    for (int k = 0; k < 4; ++k) words[2] |= (uint32_t(w[k]) >> 16 & 255) << 8 * k;
}

GRANVIT_HOST_DEVICE inline void make_column_weights(const Axis& axis, const WeightsPlace& place, int64_t i, int32_t* to) {
    const Blend blend(axis, i);
    const int64_t first = blend.at.first;
    GRANVIT_NOT_UNROLLED
    for (int group = 0; group < place.groups; ++group) {
        int32_t four[4];
        uint32_t words[WORDS];
        for (int k = 0; k < 4; ++k) four[k] = blend.weight(first + 4 * group + k);
        pack_words(four, words);
        for (int k = 0; k < WORDS; ++k) to[place.word(group, k, i)] = int32_t(words[k]);
    }
    to[place.column_span(i)] = int32_t(first);
    to[place.column_span(i) + 1] = int32_t(first + axis.taps() - 1);
}

// A block makes the weights of WEIGHTS_THREADS rows or columns of a crop. each: as load_rows'.
template <typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void weights_block(const Job& job, int block, const Each& each) {
    each(WEIGHTS_THREADS, [&](int thread) {
        const WeightsCrop& crop = job.crop[find_crop(job, block)];
        const Axis rows = make_axis(job.filter, crop.box[1], crop.box[3], crop.frame[0], crop.frame[2]);
        const Axis columns = make_axis(job.filter, crop.box[0], crop.box[2], crop.frame[1], crop.frame[3]);
        const WeightsPlace place = WeightsPlace::of(crop.height, crop.width, rows.end - rows.begin, grows(rows),
                                                    row_taps(job.filter), column_groups(columns));
        int32_t* to = job.workspace + int64_t(crop.weights) * 4;
        const int number = block - crop.first_block;
        const int row_blocks = (crop.height + WEIGHTS_THREADS - 1) / WEIGHTS_THREADS;
        const int64_t row = int64_t(number) * WEIGHTS_THREADS + thread;
        const int64_t column = int64_t(number - row_blocks) * WEIGHTS_THREADS + thread;
        if (number >= row_blocks && column < crop.width) make_column_weights(columns, place, column, to);
        if (number < row_blocks && row < crop.height) make_row_weights(rows, place, row, job.rounding != Rounding::none, to);
    });
}

}  // namespace granvit

// What a block of resample_block makes: a strip of a crop, band by band; and where the values of a band lie, in shared memory
// and in the output. A band is whole patches, some lines of them, or a part of a line of larger ones, or of one patch.
#pragma once
#include <cstdint>

#include "cuda/pack_job.h"
#include "cuda/pack_moves.h"
#include "cuda/pack_weights.h"

namespace granvit {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 64;  // of a band, at most
constexpr int RAW_BYTES = 8192;                   // of source rows at a time
constexpr int BAND_VALUES = 3456, BAND_RUNS = 192;

// Runs of the output are this many values apart in shared memory, so that each begins at a multiple of 16 bytes.
GRANVIT_HOST_DEVICE inline int padded_run(int values) { return (values + 7) / 8 * 8; }

// Of all bands of a launch, apart from those at an edge.
struct BandShape {
    bool whole;          // whole patches
    int lines, across;   // patches below one another and side by side
    int rows, columns;   // of a patch: a band's rows end where a patch does

    GRANVIT_HOST_DEVICE static BandShape of(int p) {
        if (p > TILE_COLUMNS) return {false, 1, 1, TILE_ROWS, TILE_COLUMNS};
        if (p > TILE_ROWS) return {false, 1, TILE_COLUMNS / p, TILE_ROWS, p};
        const int lines = TILE_ROWS / p, most = BAND_VALUES / padded_run(3 * p * p);
        const int across = (most < BAND_RUNS ? most : BAND_RUNS) / lines;
        return {true, lines, across < TILE_COLUMNS / p ? across : TILE_COLUMNS / p, p, p};
    }
    // Bands of a line of patches, and strips of a patch.
    GRANVIT_HOST_DEVICE int parts_down(int p) const { return (p + rows - 1) / rows; }
    GRANVIT_HOST_DEVICE int parts_across(int p) const { return (p + columns - 1) / columns; }
    // Bands of a crop, one below the other; and strips, side by side.
    GRANVIT_HOST_DEVICE int64_t down(int64_t height, int p) const { return (height + lines - 1) / lines * parts_down(p); }
    GRANVIT_HOST_DEVICE int64_t strips(int64_t width, int p) const { return (width + across - 1) / across * parts_across(p); }
};

struct Strip {
    ResampledCropJob crop;
    BandShape shape;
    int patch, x;                 // its first patch in a line, and where in that it begins
    int patches, columns;         // side by side; output columns of all
    int bands, line, begin;       // line: of patches, that the first band begins in; begin: its first output row
    int low, bytes;               // source columns that it reads: the first, and bytes of all
    int rows_at_once;             // source rows that fit into shared memory; 0: none does, and they are read in place

    // Of the crop's weights, as WeightsPlace says it, from the strip's first column on.
    const int32_t *row_weights, *finished, *row_spans, *column_spans, *words;
    int64_t words_pitch;

    // The bands' values lie in shared memory as in the output, run by run: a run is a patch, or a row of a part, or with the
    // channels first a row of each channel.
    int run_length, run_pitch;                                           // in values; from one to the next
    int planes;                                                          // runs of a row of a part
    Divide slots, across;                                                // of a run; patches side by side
    int patch_step, row_step, pixel_step, channel_step;                  // from value to value
    int line_step;                                                       // after a patch's rows, a step more

    GRANVIT_HOST_DEVICE const uint8_t* source(int row) const {
        return crop.image + int64_t(row) * crop.stride + 3 * int64_t(low);
    }
    // With Way::columns_first: a byte of an output row, blended down its columns.
    template <int TAPS>
    GRANVIT_HOST_DEVICE uint8_t blended(int row, int byte) const {
        int32_t sum = 0;
        GRANVIT_NOT_UNROLLED
        for (int from = row_spans[2 * row]; from <= row_spans[2 * row + 1]; ++from) {
            const int k = row - finished[from];
            if (k < TAPS) sum += row_weights[int64_t(from) * TAPS + k] * source(from)[byte];
        }
        return fixed_pixel(sum);
    }
    GRANVIT_HOST_DEVICE uint32_t word(int group, int k, int column) const {
        return uint32_t(load_global(words + (int64_t(group) * WORDS + k) * words_pitch + column));
    }
};

template <typename T, typename Job>
GRANVIT_HOST_DEVICE inline Strip make_strip(const Job& job, const ResampledCropJob& crop, uint32_t number, int taps) {
    const int p = job.patch_size;
    Strip strip;
    strip.crop = crop;
    BandShape& shape = strip.shape = BandShape::of(p);
    const uint32_t strips = shape.strips(crop.width, p), parts = shape.parts_across(p), part = number % strips;
    strip.patch = part / parts * shape.across;
    strip.x = part % parts * shape.columns;
    strip.patches = crop.width - strip.patch < shape.across ? crop.width - strip.patch : shape.across;
    if (p - strip.x < shape.columns) shape.columns = p - strip.x;
    strip.columns = strip.patches * shape.columns;
    const int bands = shape.down(crop.height, p);
    const int first = number / strips * job.bands;
    strip.bands = bands - first < job.bands ? bands - first : job.bands;
    strip.line = first / shape.parts_down(p) * shape.lines;
    strip.begin = strip.line * p + first % shape.parts_down(p) * shape.rows;

    const WeightsPlace place = WeightsPlace::of(int64_t(crop.height) * p, int64_t(crop.width) * p, crop.sources, crop.way == Way::grows,
                                                taps, crop.groups);
    const int32_t* weights = job.workspace + int64_t(crop.weights) * 4;
    const int64_t left = int64_t(strip.patch) * p + strip.x;
    strip.row_weights = weights + place.row(0);
    strip.finished = weights + place.finished(0);
    strip.row_spans = weights + place.row_span(0);
    strip.column_spans = weights + place.column_span(left);
    strip.words = weights + place.word(0, 0, left);
    strip.words_pitch = place.columns;
    strip.low = strip.column_spans[0];
    strip.bytes = 3 * (strip.column_spans[2 * strip.columns - 1] + 1 - strip.low);
    strip.rows_at_once = strip.bytes > RAW_BYTES ? 0 : RAW_BYTES / ImageRows::at(nullptr, 0, strip.bytes).pitch;

    strip.planes = job.channels_first ? 3 : 1;
    strip.pixel_step = job.channels_first ? 1 : 3;
    strip.run_length = shape.whole ? 3 * p * p : strip.pixel_step * shape.columns;
    strip.run_pitch = padded_run(strip.run_length);
    strip.slots = Divide::by(run_slots<T>(strip.run_length));
    strip.across = Divide::by(strip.patches);
    const int plane = shape.whole ? p * p : shape.rows * strip.run_pitch;
    strip.channel_step = job.channels_first ? plane : 1;
    strip.patch_step = shape.whole ? strip.run_pitch : plane * strip.planes;
    strip.row_step = shape.whole ? strip.pixel_step * p : strip.run_pitch;
    strip.line_step = shape.whole ? strip.patches * strip.run_pitch - p * strip.row_step : 0;
    return strip;
}

// The index in the output of the first value of a run of a band: which begins in this line of patches, with this output row.
template <typename Job>
GRANVIT_HOST_DEVICE inline int64_t run_to(const Job& job, const Strip& strip, int line, int begin, int run) {
    const int p = job.patch_size;
    if (strip.shape.whole) {
        const int below = strip.across(run);
        return patch_offset(job, strip.crop, line + below, strip.patch + run - below * strip.patches);
    }
    const int row = begin - line * p + run % TILE_ROWS, plane = run / TILE_ROWS % strip.planes;
    const int64_t patch = patch_offset(job, strip.crop, line, strip.patch + run / (TILE_ROWS * strip.planes));
    const int pixel = row * p + strip.x;
    return patch + (job.channels_first ? plane * p * p + pixel : 3 * pixel);
}

}  // namespace granvit

// pack_patches on the GPU where crops are resampled: what one block of threads does.
//
// A block makes a strip of its crop: some 64 output columns, one a thread, and `bands` of some 16 output rows, from the top
// down. The source rows that a band needs go into shared memory as they are. Each thread walks down them: it blends its
// column's pixels of a row, four pixels and their three channels at once, and adds the result to the output rows that the
// source row counts for, in registers. Shrinking, no more than TAPS of them are unfinished at a time; growing, an output row
// is blended from the last TAPS source rows. So no source row is blended twice, but for the first ones of a strip, and a crop
// that shrinks much only has more of them. Finished rows go into shared memory in the order in which patches lie, and from
// there out, a band at once.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cuda/pack_strip.h"

namespace granvit {

constexpr int RAW_PAD = 32;     // bytes that reading whole groups of pixels may touch after the source rows
constexpr int KEPT_GROUPS = 2;  // of four weights along the row: they stay in registers

template <Way WAY>
using By = std::integral_constant<Way, WAY>;

template <typename T>
struct ResampleShared {
    alignas(16) uint32_t raw[(RAW_BYTES + RAW_PAD) / 4];
    alignas(16) T values[BAND_VALUES];
    int64_t to[BAND_RUNS];  // where in the output each run begins
    Strip strip;
};

// The 12 bytes of four RGB pixels, as three words, to the four bytes of each channel.
GRANVIT_HOST_DEVICE inline void split_channels(const uint32_t rgb[3], uint32_t channel[3]) {
    channel[0] = permute(permute(rgb[0], rgb[1], 0x0630), rgb[2], 0x5210);
    channel[1] = permute(permute(rgb[0], rgb[1], 0x0741), rgb[2], 0x6210);
    channel[2] = permute(permute(rgb[0], rgb[1], 0x0052), rgb[2], 0x7410);
}

// Four pixels of a row that is not in shared memory, from a byte of the strip's on: the strip's last byte may come earlier.
// byte(at): a byte of the row.
template <typename Byte>
GRANVIT_HOST_DEVICE inline void read_in_place(const Strip& strip, int from, uint32_t rgb[3], const Byte& byte) {
    for (int k = 0; k < 3; ++k) {
        rgb[k] = 0;
        GRANVIT_NOT_UNROLLED
        for (int b = 0, at = from + 4 * k; b < 4; ++b, ++at)
            if (at < strip.bytes) rgb[k] |= uint32_t(byte(at)) << 8 * b;
    }
}

// What a thread keeps from source row to source row: a column of the output.
template <int TAPS, bool ROUNDED>
struct Walk {
    using Sum = std::conditional_t<ROUNDED, int32_t, float>;

    int x, column;                       // column: its first source pixel, in bytes from the strip's first
    uint32_t words[KEPT_GROUPS][WORDS];  // weights along the row
    int next;                            // output row: those before it are finished
    Sum sum[TAPS][3];                    // shrinking: of that row and the following ones; growing: the last source rows
    int top, to, y;                      // in shared memory, where its first value of a band goes, its next one; row of that

    GRANVIT_HOST_DEVICE void start(const Strip& strip, int x) {
        this->x = x;
        column = 3 * (strip.column_spans[2 * x] - strip.low);
        for (int g = 0; g < KEPT_GROUPS; ++g)
            for (int k = 0; k < WORDS; ++k) words[g][k] = g < strip.crop.groups ? strip.word(g, k, x) : 0;
        next = strip.finished[strip.row_spans[2 * strip.begin]];
        top = x / strip.shape.columns * strip.patch_step + x % strip.shape.columns * strip.pixel_step;
        for (int k = 0; k < TAPS; ++k)
            for (int c = 0; c < 3; ++c) sum[k][c] = 0;
    }

    GRANVIT_HOST_DEVICE void begin_band() {
        to = top;
        y = 0;
    }

    // Blends a source row along its length: in 2**-22 of a step, or rounded to whole ones. read(g, rgb): four pixels.
    template <typename Read>
    GRANVIT_HOST_DEVICE void blend(const Strip& strip, int groups, const Read& read, Sum pixel[3]) const {
        uint32_t low[3] = {0, 0, 0}, high[3] = {0, 0, 0}, rgb[3], bytes[3];
        const auto add = [&](int g, const auto& word) {
            read(g, rgb);
            split_channels(rgb, bytes);
            for (int c = 0; c < 3; ++c) {
                low[c] = dot_halves<true>(word(1), bytes[c], dot_halves<false>(word(0), bytes[c], low[c]));
                high[c] = dot_bytes(word(2), bytes[c], high[c]);
            }
        };
        add(0, [&](int k) { return words[0][k]; });
        if (groups > 1) {
            add(1, [&](int k) { return words[1][k]; });
            for (int g = KEPT_GROUPS; g < groups; ++g) add(g, [&](int k) { return strip.word(g, k, x); });
        }
        for (int c = 0; c < 3; ++c) {
            const int32_t total = int32_t(low[c] + (high[c] << 16));
            pixel[c] = ROUNDED ? Sum(fixed_pixel(total)) : Sum(total);
        }
    }

    // Adds a blended source row to the output rows. weights: of the source row.
    GRANVIT_HOST_DEVICE void add(const Vector<Sum, TAPS>& weights, const Sum pixel[3]) {
        for (int k = 0; k < TAPS; ++k)
            for (int c = 0; c < 3; ++c) sum[k][c] += weights.at[k] * pixel[c];
    }
    // Keeps a blended source row for the output rows.
    GRANVIT_HOST_DEVICE void keep(const Sum pixel[3]) {
        for (int c = 0; c < 3; ++c) {
            for (int k = 0; k + 1 < TAPS; ++k) sum[k][c] = sum[k + 1][c];
            sum[TAPS - 1][c] = pixel[c];
        }
    }
    // The next output row's value, from the last source rows and their weights, or as it is; the one after it is the next.
    GRANVIT_HOST_DEVICE void blend_down(const Vector<Sum, TAPS>& weights, Sum value[3]) {
        for (int c = 0; c < 3; ++c) {
            value[c] = 0;
            for (int k = 0; k < TAPS; ++k) value[c] += weights.at[k] * sum[k][c];
        }
        ++next;
    }
    GRANVIT_HOST_DEVICE void take(Sum value[3]) {
        for (int c = 0; c < 3; ++c) {
            value[c] = sum[0][c];
            for (int k = 0; k + 1 < TAPS; ++k) sum[k][c] = sum[k + 1][c];
            sum[TAPS - 1][c] = 0;
        }
        ++next;
    }
};

template <typename T, int TAPS, bool ROUNDED, typename Job, typename Each>
GRANVIT_HOST_DEVICE inline void resample_block(const Job& job, int block, ResampleShared<T>& shared, const Each& each) {
    using State = Walk<TAPS, ROUNDED>;
    using Sum = typename State::Sum;
    // What sums are in: weight times weight times pixel, or rounded pixels.
    constexpr float UNIT = ROUNDED ? 1 : 1 / float(1LL << 2 * FIXED_BITS);
    each(1, [&](int) {
        const ResampledCropJob& crop = job.crop[find_crop(job, block)];
        if (block == crop.first_block) write_layout(job, crop);
        shared.strip = make_strip<T>(job, crop, block - crop.first_block, TAPS);
    });
    const Strip& strip = shared.strip;
    const int groups = strip.crop.groups, rows_at_once = strip.rows_at_once;
    const auto* row_weights = reinterpret_cast<const Vector<Sum, TAPS>*>(strip.row_weights);
    const int32_t* finished = strip.finished;
    const int row_step = strip.row_step, channel_step = strip.channel_step;
    typename Each::template Kept<State> walks;
    each(strip.columns, [&](int x) { walks(x).start(strip, x); });

    const auto store = [&](State& walk, float value[3]) {
        for (int c = 0; c < 3; ++c)
            convert(value[c] * (job.scale[c] * UNIT) + job.bias[c], shared.values[walk.to + c * channel_step]);
        walk.to += row_step;
        if (++walk.y == job.patch_size) walk.y = 0, walk.to += strip.line_step;
    };
    // Rows [row, end), the first of which lies in shared memory as `rows` says, or in place: of the source, or where columns
    // come first of the output. Stores output rows before band_end that they finish, or that were finished while the band
    // before was made.
    const auto walk_rows = [&](auto way, State& walk, const ImageRows& rows, int row, int end, int band_end) {
        for (uint32_t r = 0;; ++row, ++r) {
            if (way.value != Way::columns_first) {
                for (const int goal = load_global(finished + row); walk.next < goal && walk.next < band_end;) {
                    Sum sum[3];
                    float value[3];
                    const bool inside = walk.next >= strip.begin;
                    if (way.value == Way::grows) walk.blend_down(load_global(row_weights + walk.next), sum);
                    else walk.take(sum);
                    for (int c = 0; c < 3; ++c) value[c] = ROUNDED ? float(fixed_pixel(int32_t(sum[c]))) : float(sum[c]);
                    if (inside) store(walk, value);
                }
            }
            if (row == end) return;
            const uint32_t at = r * rows.pitch + rows.lead(r) + walk.column;
            Sum pixel[3];
            walk.blend(strip, groups, [&](int g, uint32_t rgb[3]) {
                if (rows_at_once) {
                    const uint32_t* from = shared.raw + at / 4 + 3 * g;
                    for (int k = 0; k < 3; ++k) rgb[k] = funnel(from[k], from[k + 1], 8 * at);
                    return;
                }
                const uint8_t* source = strip.source(row);
                read_in_place(strip, walk.column + 12 * g, rgb, [&](int byte) {
                    return way.value == Way::columns_first ? strip.template blended<TAPS>(row, byte) : source[byte];
                });
            }, pixel);
            if (way.value == Way::columns_first) {
                float value[3] = {float(pixel[0]), float(pixel[1]), float(pixel[2])};
                store(walk, value);
            } else if (way.value == Way::grows) {
                walk.keep(pixel);
            } else {
                walk.add(load_global(row_weights + row), pixel);
            }
        }
    };

    T* patches = static_cast<T*>(job.patches);
    const int p = job.patch_size;
    const bool columns_first = ROUNDED && strip.crop.way == Way::columns_first;
    int row = columns_first ? strip.begin : strip.row_spans[2 * strip.begin];  // rows before it are added
    int line = strip.line, begin = strip.begin;                                // of patches; output row
    for (int band = 0; band < strip.bands; ++band) {
        const int left = strip.crop.height - line, lines = left < strip.shape.lines ? left : strip.shape.lines;
        const int line_end = (line + lines) * p;
        const int band_end = strip.shape.whole || line_end - begin < TILE_ROWS ? line_end : begin + TILE_ROWS;
        const int last = columns_first ? band_end - 1 : strip.row_spans[2 * band_end - 1];
        each(strip.columns, [&](int x) { walks(x).begin_band(); });
        do {
            int end = last + 1 > row ? last + 1 : row;
            if (rows_at_once && end - row > rows_at_once) end = row + rows_at_once;
            if (columns_first) {
                const ImageRows rows = ImageRows::at(nullptr, 0, strip.bytes);
                const int bytes = strip.bytes;
                each(rows_at_once ? (end - row) * bytes : 0, [&](int i) {
                    const int r = i / bytes, byte = i % bytes;
                    reinterpret_cast<uint8_t*>(shared.raw)[r * rows.pitch + byte] = strip.template blended<TAPS>(row + r, byte);
                });
                each(strip.columns, [&](int x) { walk_rows(By<Way::columns_first>{}, walks(x), rows, row, end, band_end); });
            } else {
                const ImageRows rows = ImageRows::at(strip.source(row), strip.crop.stride, strip.bytes);
                if (rows_at_once && end > row) load_rows(rows, end - row, shared.raw, each);
                if (strip.crop.way == Way::grows)
                    each(strip.columns, [&](int x) { walk_rows(By<Way::grows>{}, walks(x), rows, row, end, band_end); });
                else
                    each(strip.columns, [&](int x) { walk_rows(By<Way::shrinks>{}, walks(x), rows, row, end, band_end); });
            }
            row = end;
        } while (row <= last);

        const int runs = strip.patches * (strip.shape.whole ? lines : strip.planes * TILE_ROWS);
        const int missing = strip.shape.whole ? 0 : TILE_ROWS - (band_end - begin);  // runs of each TILE_ROWS, below the patch
        const int length = strip.run_length, pitch = strip.run_pitch;
        const Divide by_run = strip.slots;
        each(runs, [&](int run) { shared.to[run] = run_to(job, strip, line, begin, run); });
        each(runs * by_run.divisor, [&](uint32_t i) {
            const uint32_t run = by_run(i);
            if (missing && run % TILE_ROWS >= uint32_t(TILE_ROWS - missing)) return;
            store_slot(shared.values + run * pitch, length, patches + shared.to[run], i - run * by_run.divisor);
        });
        begin = band_end;
        if (begin == line_end) line += lines;
    }
}

}  // namespace granvit

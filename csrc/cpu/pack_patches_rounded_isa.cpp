// Rows of patches with Pillow's rounding: resample along the rows, then down the columns (or the other way round),
// normalise, store.
//
// Each pass sums in int32 and rounds to 8 bits, so the order of passes matters, that of the terms does not. A weight has 23
// bits and a sign, and the fast instruction multiplies pairs of 16 bits: so a weight's high and low parts are summed apart
// (Taps.fixed). Source rows are resampled when an output row first needs them, and kept in a ring while others do.
#include "cpu/pack_patches_store.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

// The pixel of N weights times bytes that lie `stride` apart: what vectors leave over. Wraps as they do.
template <typename Byte>
inline uint8_t weigh(const int16_t* high, const int16_t* low, int64_t taps, const Byte& byte) {
    uint32_t sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum += uint32_t(high[t] * (1 << LOW_BITS) + low[t]) * byte(t);
    return fixed_pixel(int32_t(sum));
}

#if defined(__AVX512BW__)
typedef __m512i Ints;
#define GRANVIT_INTS(operation) _mm512_##operation
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store_ints(uint8_t* to, Ints x) { _mm512_storeu_si512(to, x); }
#elif defined(__AVX2__)
typedef __m256i Ints;
#define GRANVIT_INTS(operation) _mm256_##operation
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Ints load_ints(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const Ints*>(from)); }
inline void store_ints(uint8_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<Ints*>(to), x); }
#elif defined(__SSE2__)
typedef __m128i Ints;
#define GRANVIT_INTS(operation) _mm_##operation
inline Ints no_ints() { return _mm_setzero_si128(); }
inline Ints load_ints(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const Ints*>(from)); }
inline void store_ints(uint8_t* to, Ints x) { _mm_storeu_si128(reinterpret_cast<Ints*>(to), x); }
#endif

// ---- down the columns: bytes k of `taps` rows ----
#if defined(GRANVIT_INTS)
inline int32_t pair(const int16_t* weights) {
    int32_t two;
    std::memcpy(&two, weights, 4);
    return two;
}

inline void blend_vector(const uint8_t* const* rows, const int16_t* high, const int16_t* low, int64_t taps, int64_t k,
                         uint8_t* out) {
    Ints highs[4], lows[4];
    for (int i = 0; i < 4; ++i) {
        highs[i] = no_ints();
        lows[i] = GRANVIT_INTS(set1_epi32)(1 << (FIXED_BITS - 1));  // a half
    }
    for (int64_t t = 0; t < taps; t += 2) {
        const Ints one = load_ints(rows[t] + k), two = load_ints(rows[t + 1 < taps ? t + 1 : t] + k);  // its weight is 0
        const Ints first = GRANVIT_INTS(unpacklo_epi8)(one, two), second = GRANVIT_INTS(unpackhi_epi8)(one, two);
        const Ints pixels[4] = {
            GRANVIT_INTS(unpacklo_epi8)(first, no_ints()), GRANVIT_INTS(unpackhi_epi8)(first, no_ints()),
            GRANVIT_INTS(unpacklo_epi8)(second, no_ints()), GRANVIT_INTS(unpackhi_epi8)(second, no_ints())};
        const Ints high_pair = GRANVIT_INTS(set1_epi32)(pair(high + t)), low_pair = GRANVIT_INTS(set1_epi32)(pair(low + t));
        for (int i = 0; i < 4; ++i) {
            highs[i] = GRANVIT_INTS(add_epi32)(highs[i], GRANVIT_INTS(madd_epi16)(pixels[i], high_pair));
            lows[i] = GRANVIT_INTS(add_epi32)(lows[i], GRANVIT_INTS(madd_epi16)(pixels[i], low_pair));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const Ints sum = GRANVIT_INTS(add_epi32)(GRANVIT_INTS(slli_epi32)(highs[i], LOW_BITS), lows[i]);
        highs[i] = GRANVIT_INTS(srai_epi32)(sum, FIXED_BITS);
    }
    // Packing saturates, and puts back the order that unpacking changed.
    store_ints(out + k, GRANVIT_INTS(packus_epi16)(GRANVIT_INTS(packs_epi32)(highs[0], highs[1]),
                                                   GRANVIT_INTS(packs_epi32)(highs[2], highs[3])));
}
#endif

inline void blend_down(const uint8_t* const* rows, const int16_t* high, const int16_t* low, int64_t taps, int64_t values,
                       uint8_t* out) {
    int64_t k = 0;
#if defined(GRANVIT_INTS)
    constexpr int64_t BYTES = sizeof(Ints);
    for (; k + BYTES <= values; k += BYTES) blend_vector(rows, high, low, taps, k, out);
    if (k < values && values >= BYTES) {
        blend_vector(rows, high, low, taps, values - BYTES, out);
        return;
    }
#endif
    for (; k < values; ++k) out[k] = weigh(high, low, taps, [&](int64_t t) { return rows[t][k]; });
}

// ---- along R rows at once ----
// Reads up to 13 bytes past the last source pixel, and writes one past the last output.
template <int R>
inline void blend_along(const uint8_t* const* sources, const Taps& columns, int64_t outputs, uint8_t* const* out) {
    const int64_t taps = fixed_taps(columns.taps);
#if defined(__AVX2__)
    // Pixels 0 and 1 of 16 bytes in the low half, 2 and 3 in the high one: a channel of both a 32-bit lane, the last idle.
    const __m256i pixel_pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                                 6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i weight_pairs = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
                                                  4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
    const auto four_weights = [&](const int16_t* weights) {
        int64_t four;
        std::memcpy(&four, weights, 8);
        return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), weight_pairs);
    };
    for (int64_t x = 0; x < outputs; ++x) {
        const int16_t *high = columns.fixed + 2 * x * taps, *low = high + taps;
        const int64_t from = 3 * int64_t(columns.first[x]);
        __m256i highs[R], lows[R];
        for (int r = 0; r < R; ++r) {
            highs[r] = _mm256_setzero_si256();
            lows[r] = _mm256_set1_epi32(1 << (FIXED_BITS - 2));  // a half, together with the other 128 bits
        }
        for (int64_t t = 0; t < taps; t += 4) {
            const __m256i high_weights = four_weights(high + t), low_weights = four_weights(low + t);
            for (int r = 0; r < R; ++r) {
                const __m128i* bytes = reinterpret_cast<const __m128i*>(sources[r] + from + 3 * t);
                const __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(bytes)), pixel_pairs);
                highs[r] = _mm256_add_epi32(highs[r], _mm256_madd_epi16(pixels, high_weights));
                lows[r] = _mm256_add_epi32(lows[r], _mm256_madd_epi16(pixels, low_weights));
            }
        }
        for (int r = 0; r < R; ++r) lows[r] = _mm256_add_epi32(_mm256_slli_epi32(highs[r], LOW_BITS), lows[r]);
        for (int r = 0; r < R; r += 2) {  // two rows at once: each half added to the other, a row in each half
            const __m256i one = lows[r], two = lows[r + 1 < R ? r + 1 : r];
            const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(one, two, 0x20),
                                                  _mm256_permute2x128_si256(one, two, 0x31));
            const __m256i words = _mm256_srai_epi32(sums, FIXED_BITS);
            const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(words, words), words);
            const int32_t pixels[2] = {_mm256_extract_epi32(packed, 0), _mm256_extract_epi32(packed, 4)};
            for (int k = 0; k < 2 && r + k < R; ++k) std::memcpy(out[r + k] + 3 * x, &pixels[k], 4);
        }
    }
#else
    for (int64_t x = 0; x < outputs; ++x) {
        const int16_t *high = columns.fixed + 2 * x * taps, *low = high + taps;
        for (int r = 0; r < R; ++r) {
            const uint8_t* source = sources[r] + 3 * int64_t(columns.first[x]);
            for (int c = 0; c < 3; ++c)
                out[r][3 * x + c] = weigh(high, low, columns.taps, [&](int64_t t) { return source[3 * t + c]; });
        }
    }
#endif
}

inline void blend_along(const uint8_t* const* sources, const Taps& columns, int64_t outputs, uint8_t* const* out,
                        int64_t count) {
    if (count == GROUP) return blend_along<GROUP>(sources, columns, outputs, out);
    for (int64_t r = 0; r < count; ++r) blend_along<1>(sources + r, columns, outputs, out + r);
}

// Source rows from `row` on, `count` of them, into the ring.
void fill_ring(const PatchRows& job, int64_t row, int64_t count, int64_t capacity) {
    const uint8_t* sources[GROUP];
    uint8_t* out[GROUP];
    const int64_t bytes = 3 * job.source_columns;
    for (int64_t r = 0; r < count; ++r) {
        sources[r] = job.source + (row + r) * job.row_stride;
        if (job.image_end - sources[r] < bytes + 16) {
            uint8_t* copy = job.copied + r * job.copied_pitch;
            std::memcpy(copy, sources[r], bytes);
            sources[r] = copy;
        }
        out[r] = job.ring + (row + r) % capacity * job.ring_pitch;
    }
    blend_along(sources, *job.columns, job.grid_width * job.patch_size, out, count);
}

// Down the columns, then along the rows, GROUP output rows at a time.
template <typename T>
void pack_columns_first(const PatchRows& job) {
    const Taps& rows = *job.rows;
    const int64_t taps = rows.taps, beyond = job.end * job.patch_size;
    for (int64_t y = job.begin * job.patch_size; y < beyond; y += GROUP) {
        const int64_t count = beyond - y < GROUP ? beyond - y : GROUP;
        const uint8_t* sources[GROUP];
        uint8_t* out[GROUP];
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t t = 0; t < taps; ++t) job.pointers[t] = job.source + (rows.first[y + r] + t) * job.row_stride;
            const int16_t* high = rows.fixed + 2 * (y + r) * fixed_taps(taps);
            uint8_t* blended = job.copied + r * job.copied_pitch;
            blend_down(job.pointers, high, high + fixed_taps(taps), taps, 3 * job.source_columns, blended);
            sources[r] = blended;
            out[r] = job.ring + r * job.ring_pitch;
        }
        blend_along(sources, *job.columns, job.grid_width * job.patch_size, out, count);
        for (int64_t r = 0; r < count; ++r) store_line<uint8_t, T>(job, out[r], y + r, true);
    }
}

// Along the rows, then down the columns, or what of it there is to do.
template <typename T>
void pack(const PatchRows& job) {
    const Taps &rows = *job.rows, &columns = *job.columns;
    if (job.columns_first && !rows.copies && !columns.copies) return pack_columns_first<T>(job);
    const int64_t values = 3 * job.grid_width * job.patch_size, taps = rows.copies ? 1 : rows.taps;
    const int64_t capacity = taps + GROUP - 1;
    int64_t next = -1;  // the first source row that is not in the ring
    for (int64_t y = job.begin * job.patch_size; y < job.end * job.patch_size; ++y) {
        const int64_t first = rows.copies ? y : rows.first[y];
        if (columns.copies) {
            for (int64_t t = 0; t < taps; ++t) job.pointers[t] = job.source + (first + t) * job.row_stride;
        } else {
            if (next < 0) next = first;
            while (next < first + taps) {
                const int64_t left = job.source_rows - next, count = left < GROUP ? left : GROUP;
                fill_ring(job, next, count, capacity);
                next += count;
            }
            for (int64_t t = 0, slot = first % capacity; t < taps; ++t, slot = slot + 1 < capacity ? slot + 1 : 0)
                job.pointers[t] = job.ring + slot * job.ring_pitch;
        }
        if (!rows.copies) {
            const int16_t* high = rows.fixed + 2 * y * fixed_taps(taps);
            blend_down(job.pointers, high, high + fixed_taps(taps), taps, values, job.rounded);
        }
        const bool in_place = rows.copies && columns.copies;
        store_line<uint8_t, T>(job, rows.copies ? job.pointers[0] : job.rounded, y, !in_place);
    }
}

}  // namespace

void pack_rounded(const PatchRows& job) {
    GRANVIT_BY_DTYPE(job.dtype, pack<T>(job))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

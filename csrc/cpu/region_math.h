// Arithmetic of the region operators: rows as float32, products of rows and weights, softmax. For *_isa.cpp files only.
//
// Queries are taken four at a time, tokens TOKENS = WIDTH / 4 at a time: the 4 * TOKENS dot products of such a block
// accumulate in as many registers and are folded into one Vec, lane 4 * token + query. Softmax and its gradient run on
// those Vecs; the outer products read single lanes back as broadcasts. So weights of four queries and n tokens lie in
// memory as [n][4], n a multiple of TOKENS, and those of the next four queries WEIGHTS floats further on.
#pragma once
#include <cmath>

#include "common/simd.h"

namespace granvit {
namespace GRANVIT_ISA {

constexpr int64_t QUERIES = 4;
constexpr int64_t TOKENS = WIDTH / QUERIES;
constexpr int64_t TILE = 64;  // tokens at a time, at most
constexpr int64_t WEIGHTS = QUERIES * TILE;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

#if defined(__clang__)
#define GRANVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GRANVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// ---- folding ----
// Two Vecs' 128-bit lanes: first half a's, second half b's, each folded by adding the halves of its source.
#if defined(__AVX512F__)
inline Vec add_halves(Vec a, Vec b) {
    return GRANVIT_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           GRANVIT_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline Vec add_quarters(Vec a, Vec b) {
    return GRANVIT_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           GRANVIT_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
// Adjacent pairs inside each 128-bit lane: (a01, a23, b01, b23).
inline Vec add_pairs(Vec a, Vec b) {
    return GRANVIT_SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           GRANVIT_SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
inline Vec lanes(const Vec* v) { return add_quarters(add_halves(v[0], v[1]), add_halves(v[2], v[3])); }
inline Vec rotate_tokens(Vec x, int step) {
    return step == 1 ? GRANVIT_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
                     : GRANVIT_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline Vec repeat_queries(const float* p) { return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline Vec repeat_tokens(const float* p) {
    const Vec x = (Vec)_mm512_castps128_ps512(_mm_loadu_ps(p));
    return GRANVIT_SHUFFLE(x, x, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}
#elif defined(__AVX2__)
inline Vec add_pairs(Vec a, Vec b) {
    return GRANVIT_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + GRANVIT_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
inline Vec lanes(const Vec* v) {
    return GRANVIT_SHUFFLE(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + GRANVIT_SHUFFLE(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
inline Vec rotate_tokens(Vec x, int) { return GRANVIT_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3); }
inline Vec repeat_queries(const float* p) { return Vec{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]}; }
inline Vec repeat_tokens(const float* p) { return Vec{p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1]}; }
#else
inline Vec add_pairs(Vec a, Vec b) { return GRANVIT_SHUFFLE(a, b, 0, 2, 4, 6) + GRANVIT_SHUFFLE(a, b, 1, 3, 5, 7); }
inline Vec lanes(const Vec* v) { return v[0]; }
inline Vec rotate_tokens(Vec x, int) { return x; }
inline Vec repeat_queries(const float* p) { return load(p); }
inline Vec repeat_tokens(const float* p) { return splat(p[0]); }
#endif

inline Vec largest(Vec a, Vec b) { return a > b ? a : b; }

// Over the tokens of a block, the result in every token's place.
inline Vec largest_of_tokens(Vec x) {
    for (int step = 1; step < TOKENS; step *= 2) x = largest(x, rotate_tokens(x, step));
    return x;
}
inline Vec sum_of_tokens(Vec x) {
    for (int step = 1; step < TOKENS; step *= 2) x = x + rotate_tokens(x, step);
    return x;
}

// e^x for x <= 88, to 2 ulp; 0 below -87.3 (and for -inf), NaN for NaN. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
inline Vec exponential(Vec x) {
    const Vec low = splat(-87.3f), high = splat(88.0f), magic = splat(0x1.8p23f);
    const Vec clamped = x < low ? low : (x > high ? high : x);
    const Vec shifted = clamped * splat(1.44269504f) + magic;  // its low bits are the rounded integer
    const Vec n = shifted - magic;
    const Vec r = (clamped - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    Vec y = splat(1.9875691500e-4f);
    y = y * r + splat(1.3981999507e-3f);
    y = y * r + splat(8.3334519073e-3f);
    y = y * r + splat(4.1665795894e-2f);
    y = y * r + splat(1.6666665459e-1f);
    y = y * r + splat(5.0000001201e-1f);
    y = (y * r) * r + r + splat(1.0f);
    y = y * (Vec)(((VecI)shifted + 127u) << 23);
    return x < low ? Vec{} : y;
}

// ---- rows ----
// A row of `size` elements as float32, zeros up to `padded`.
template <typename T>
inline void read_row(const T* from, float* to, int64_t size, int64_t padded) {
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) store(to + d, load(from + d));
    for (; d < size; ++d) to[d] = to_float(from[d]);
    for (; d < padded; ++d) to[d] = 0.0f;
}

template <typename T>
inline void write_row(const float* from, T* to, int64_t size, float factor) {
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) store(to + d, load(from + d) * splat(factor));
    for (; d < size; ++d) from_float(from[d] * factor, to[d]);
}

// write_row past the caches where it can, for rows that nobody reads soon: saves reading the line first.
template <typename T>
inline void stream_row(const float* from, T* to, int64_t size) {
    if (!streamable(to) || size % WIDTH != 0) return write_row(from, to, size, 1.0f);
    for (int64_t d = 0; d < size; d += WIDTH) stream(to + d, load(from + d));
}

template <typename T>
inline void prefetch_row(const T* row, int64_t size) {
    for (int64_t d = 0; d < size; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Rows the kernels can use where they lie need no copy.
inline bool in_place(const float*, int64_t size) { return size % WIDTH == 0; }
template <typename T>
inline bool in_place(const T*, int64_t) { return false; }
inline const float* where(const float* row) { return row; }
template <typename T>
inline const float* where(const T*) { return nullptr; }

// ---- products ----
// What adds to rows sums up on its own first: long sums have less rounding so.
// Dot products of four rows, `stride` apart, with TOKENS rows: lane 4 * token + query.
inline Vec dots(const float* queries, int64_t stride, const float* const* rows, int64_t padded) {
    Vec sums[QUERIES * TOKENS] = {};
    for (int64_t d = 0; d < padded; d += WIDTH) {
        Vec query[QUERIES];
#pragma GCC unroll 4
        for (int k = 0; k < QUERIES; ++k) query[k] = load(queries + k * stride + d);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            const Vec row = load(rows[t] + d);
#pragma GCC unroll 4
            for (int k = 0; k < QUERIES; ++k) sums[k * TOKENS + t] += query[k] * row;
        }
    }
    return add_pairs(add_pairs(lanes(sums), lanes(sums + TOKENS)),
                     add_pairs(lanes(sums + 2 * TOKENS), lanes(sums + 3 * TOKENS)));
}

// VECS * WIDTH channels of four rows into[query], `stride` apart, += sum over tokens of weights[token][query] * rows[token].
template <int VECS>
inline void add_to_queries(float* into, int64_t stride, const float* weights, const float* const* rows, int64_t tokens,
                           int64_t d) {
    Vec sums[QUERIES][VECS] = {};
    for (int64_t t = 0; t < tokens; ++t) {
        Vec row[VECS];
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) row[j] = load(rows[t] + d + j * WIDTH);
#pragma GCC unroll 4
        for (int k = 0; k < QUERIES; ++k) {
            const Vec weight = splat(weights[QUERIES * t + k]);
#pragma GCC unroll 4
            for (int j = 0; j < VECS; ++j) sums[k][j] += weight * row[j];
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < QUERIES; ++k)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) {
            float* const to = into + k * stride + d + j * WIDTH;
            store(to, load(to) + sums[k][j]);
        }
}

// The same for all channels and `queries` rows, a multiple of four. Channels outermost: the tokens' stay in the L1 cache.
inline void add_to_queries(float* into, int64_t stride, int64_t queries, const float* weights, const float* const* rows,
                           int64_t tokens, int64_t padded) {
    constexpr int VECS = WIDTH == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + VECS * WIDTH <= padded; d += VECS * WIDTH)
        for (int64_t k = 0; k < queries; k += QUERIES)
            add_to_queries<VECS>(into + k * stride, stride, weights + k * TILE, rows, tokens, d);
    for (; d < padded; d += WIDTH)
        for (int64_t k = 0; k < queries; k += QUERIES)
            add_to_queries<1>(into + k * stride, stride, weights + k * TILE, rows, tokens, d);
}

// VECS * WIDTH channels of TOKENS rows into[token] += sum over queries of weights[token][query] * rows[query].
template <int VECS>
inline void add_to_tokens(float* const* into, const float* weights, const float* rows, int64_t stride, int64_t queries,
                          int64_t d) {
    Vec sums[TOKENS][VECS] = {};
    for (int64_t block = 0; block < queries; block += QUERIES, weights += WEIGHTS) {
#pragma GCC unroll 4
        for (int k = 0; k < QUERIES; ++k, rows += stride) {
            Vec row[VECS];
#pragma GCC unroll 4
            for (int j = 0; j < VECS; ++j) row[j] = load(rows + d + j * WIDTH);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                const Vec weight = splat(weights[QUERIES * t + k]);
#pragma GCC unroll 4
                for (int j = 0; j < VECS; ++j) sums[t][j] += weight * row[j];
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) {
            float* const to = into[t] + d + j * WIDTH;
            store(to, load(to) + sums[t][j]);
        }
}

// The same for all channels and `tokens` rows, a multiple of TOKENS. Rows of queries lie `stride` apart.
inline void add_to_tokens(float* const* into, int64_t tokens, const float* weights, const float* rows, int64_t stride,
                          int64_t queries, int64_t padded) {
    constexpr int VECS = 4;
    int64_t d = 0;
    for (; d + VECS * WIDTH <= padded; d += VECS * WIDTH)
        for (int64_t t = 0; t < tokens; t += TOKENS)
            add_to_tokens<VECS>(into + t, weights + QUERIES * t, rows, stride, queries, d);
    for (; d < padded; d += WIDTH)
        for (int64_t t = 0; t < tokens; t += TOKENS)
            add_to_tokens<1>(into + t, weights + QUERIES * t, rows, stride, queries, d);
}

// ---- softmax ----
// Running softmax of four queries, every token's place alike (Milakov and Gimelshein 2018): takes in the logits of `tokens`
// tokens, a multiple of TOKENS, in `weights`, and leaves the tokens' weights there, relative to the new largest logit. share:
// [tokens], of the weights; 0 for padding. sums: four rows, `stride` apart, of weighted values so far, which it scales to that.
inline void take_in(float* weights, const float* share, int64_t tokens, float* largest_so_far, float* total, float* sums,
                    int64_t stride, int64_t padded) {
    Vec most = splat(-INFINITY);
    for (int64_t t = 0; t < tokens; t += TOKENS) most = largest(load(weights + QUERIES * t), most);
    const Vec before = load(largest_so_far), now = largest(before, largest_of_tokens(most));
    // Where every logit so far is -inf, so is `now`, and -inf - -inf would be NaN: from 0, they weigh 0. NaN stays NaN.
    const Vec safe = now == splat(-INFINITY) ? Vec{} : now;
    const Vec decay = exponential(before - safe);
    store(largest_so_far, now);
    for (int q = 0; q < QUERIES; ++q) {
        if (decay[q] == 1.0f) continue;
        float* const row = sums + q * stride;
        for (int64_t d = 0; d < padded; d += WIDTH) store(row + d, load(row + d) * splat(decay[q]));
    }
    Vec sum = load(total) * decay;
    for (int64_t t = 0; t < tokens; t += TOKENS) {
        const Vec weight = exponential(load(weights + QUERIES * t) - safe) * repeat_tokens(share + t);
        store(weights + QUERIES * t, weight);
        sum = sum + weight;
    }
    store(total, sum);
}

// The weights again from logits and lse. log_unit: of the region's relative shares (regions.h), added as it was to lse, so
// that a token that is alone weighs 1 exactly.
inline Vec weights_of(Vec logits, float log_unit, Vec lse) { return exponential(logits + splat(log_unit) - lse); }

}  // namespace GRANVIT_ISA
}  // namespace granvit

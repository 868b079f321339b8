// Inner loops of region_attention. Compiled once an ISA.
//
// Queries are taken four at a time, tokens TOKENS = WIDTH / 4 at a time: the 4 * TOKENS dot products of such a block
// accumulate in as many registers and are folded into one Vec, lane 4 * token + query. Softmax and its gradient run on
// those Vecs; the outer products read single lanes back as broadcasts. Queries are padded to a multiple of four with zero
// rows, tokens with a repeated one of weight 0, the head size to a multiple of WIDTH with zeros.
//
// Both directions walk an image in square tiles, a tile head by head, and a head through the regions that meet the tile,
// in order. So keys and values come from memory once however many regions overlap, the next head's rows (they lie beside
// this one's) can be fetched meanwhile, and a row of the gradients is written once, by one thread. Forward keeps a running
// maximum a query (Milakov and Gimelshein 2018); backward recomputes the weights from lse, as flash attention does.
#include <cmath>

#include "common/simd.h"
#include "cpu/region_attention.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

constexpr int64_t QUERIES = 4;
constexpr int64_t TOKENS = WIDTH / QUERIES;
constexpr int64_t SIDE = 8;  // of a tile; a tile's cells are the bits of a uint64_t
constexpr int64_t TILE = SIDE * SIDE;

#if defined(__clang__)
#define GRANVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GRANVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

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
// Dot products of four rows of queries with TOKENS rows: lane 4 * token + query.
inline Vec dots(const float* queries, const float* const* rows, int64_t padded) {
    Vec sums[QUERIES * TOKENS] = {};
    for (int64_t d = 0; d < padded; d += WIDTH) {
        Vec query[QUERIES];
#pragma GCC unroll 4
        for (int k = 0; k < QUERIES; ++k) query[k] = load(queries + k * padded + d);
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

// into[query] += sum over tokens of weights[4 * token + query] * rows[token], for four queries.
template <int VECS>
inline void add_to_queries(float* into, const float* weights, const float* const* rows, int64_t tokens, int64_t padded,
                           int64_t d) {
    Vec sums[QUERIES][VECS];
#pragma GCC unroll 4
    for (int k = 0; k < QUERIES; ++k)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) sums[k][j] = load(into + k * padded + d + j * WIDTH);
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
        for (int j = 0; j < VECS; ++j) store(into + k * padded + d + j * WIDTH, sums[k][j]);
}

inline void add_to_queries(float* into, const float* weights, const float* const* rows, int64_t tokens, int64_t padded) {
    constexpr int VECS = WIDTH == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + VECS * WIDTH <= padded; d += VECS * WIDTH)
        add_to_queries<VECS>(into, weights, rows, tokens, padded, d);
    for (; d < padded; d += WIDTH) add_to_queries<1>(into, weights, rows, tokens, padded, d);
}

// into[token] += sum over queries of weights[query's block][4 * token + query] * rows[query], for TOKENS tokens. Blocks of
// four queries lie `stride` apart.
template <int VECS>
inline void add_to_tokens(float* const* into, const float* weights, int64_t stride, const float* rows, int64_t queries,
                          int64_t padded, int64_t d) {
    Vec sums[TOKENS][VECS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) sums[t][j] = load(into[t] + d + j * WIDTH);
    for (int64_t block = 0; block < queries; block += QUERIES, weights += stride) {
#pragma GCC unroll 4
        for (int k = 0; k < QUERIES; ++k, rows += padded) {
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
        for (int j = 0; j < VECS; ++j) store(into[t] + d + j * WIDTH, sums[t][j]);
}

inline void add_to_tokens(float* const* into, const float* weights, int64_t stride, const float* rows, int64_t queries,
                          int64_t padded) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= padded; d += 4 * WIDTH) add_to_tokens<4>(into, weights, stride, rows, queries, padded, d);
    for (; d < padded; d += WIDTH) add_to_tokens<1>(into, weights, stride, rows, queries, padded, d);
}

// ---- what both directions share ----
struct Shape {
    int64_t padded;   // head size in memory
    int64_t queries;  // padded count
    int64_t block;    // floats of a region's queries in one head
    explicit Shape(const RegionAttention& p)
        : padded(round_up(p.size, WIDTH)), queries(round_up(p.queries, QUERIES)), block(padded * queries) {}
};

// One image and the heads [head0, head1) of it: what a thread works on at a time.
struct Item {
    const RegionAttention& p;
    const Shape shape;
    const int64_t image, head0, head1;
    const int64_t begin, regions;  // p.order[begin + slot] is the region in slot [0, regions)

    Item(const RegionAttention& problem, int64_t image_, int64_t head0_, int64_t head1_)
        : p(problem), shape(problem), image(image_), head0(head0_), head1(head1_), begin(p.first[image]),
          regions(p.first[image + 1] - begin) {}
    int64_t region(int64_t slot) const { return p.order[begin + slot]; }
    // Where a head's region keeps its state.
    int64_t state(int64_t head, int64_t slot) const { return (head - head0) * regions + slot; }
    // Row of [R, K, H].
    int64_t row(int64_t slot, int64_t k, int64_t head) const { return (region(slot) * p.queries + k) * p.heads + head; }
};

// Rows of a region's queries in one head as float32, padding rows zero. region_stride 0: shared by all regions.
template <typename T>
void read_queries(const Item& item, const void* base, int64_t region_stride, int64_t slot, int64_t head, float* to) {
    const T* from = static_cast<const T*>(base) + item.region(slot) * region_stride + head * item.p.size;
    for (int64_t k = 0; k < item.p.queries; ++k, from += item.p.heads * item.p.size)
        read_row(from, to + k * item.shape.padded, item.p.size, item.shape.padded);
    for (int64_t i = item.p.queries * item.shape.padded; i < item.shape.block; ++i) to[i] = 0.0f;
}

// The cells of a tile that one region meets: their places in the tile (row * SIDE + column), and their log coverage.
struct Part {
    int64_t slot, count, padded;  // padded: count rounded up to TOKENS
    uint8_t at[TILE];
    float bias[TILE];  // -inf in the padding
};

// Rows [row0, row1) and columns [column0, column1) of an image, and what of it is in use.
struct Tile {
    int64_t row0, row1, column0, column1, parts;
    uint64_t met;  // bit `place`: some region meets the cell

    int64_t token(const Item& item, int64_t place) const {
        return item.p.cu_seqlens[item.image] + (row0 + place / SIDE) * item.p.grids[2 * item.image + 1] + column0 + place % SIDE;
    }
    bool has(int64_t place) const { return row0 + place / SIDE < row1 && column0 + place % SIDE < column1; }
};

// Fills in the parts and the bits of a tile.
void find_parts(const Item& item, Tile& tile, Part* parts) {
    tile.parts = 0, tile.met = 0;
    for (int64_t slot = 0; slot < item.regions; ++slot) {
        const RegionCells& c = item.p.cells[item.region(slot)];
        const int64_t row0 = c.row0 > tile.row0 ? c.row0 : tile.row0, row1 = c.row1 < tile.row1 ? c.row1 : tile.row1;
        const int64_t column0 = c.column0 > tile.column0 ? c.column0 : tile.column0;
        const int64_t column1 = c.column1 < tile.column1 ? c.column1 : tile.column1;
        if (row0 >= row1 || column0 >= column1) continue;
        Part& part = parts[tile.parts++];
        part.slot = slot, part.count = 0;
        for (int64_t row = row0; row < row1; ++row)
            for (int64_t column = column0; column < column1; ++column, ++part.count) {
                const int64_t place = (row - tile.row0) * SIDE + column - tile.column0;
                part.at[part.count] = uint8_t(place);
                part.bias[part.count] = c.row_bias ? c.row_bias[row - c.row0] + c.column_bias[column - c.column0] : 0.0f;
                tile.met |= uint64_t(1) << place;
            }
        for (part.padded = part.count; part.padded % TOKENS != 0; ++part.padded) {
            part.at[part.padded] = part.at[part.count - 1];
            part.bias[part.padded] = -INFINITY;
        }
    }
}

// Where one head's keys and values of a tile lie, by place; of met cells only.
struct Rows {
    const float *key[TILE], *value[TILE];
};

template <typename T>
void find_rows(const Item& item, const Tile& tile, int64_t head, float* key_copy, float* value_copy, Rows& rows) {
    const RegionAttention& p = item.p;
    const T* const keys = static_cast<const T*>(p.key) + head * p.key_head_stride;
    const T* const values = static_cast<const T*>(p.value) + head * p.value_head_stride;
    const bool copy = !in_place(keys, p.size), more = head + 1 < item.head1;
    for (int64_t place = 0; place < TILE; ++place) {
        if (!(tile.met >> place & 1)) continue;
        const int64_t token = tile.token(item, place);
        const T *key = keys + token * p.key_token_stride, *value = values + token * p.value_token_stride;
        if (copy) {
            read_row(key, key_copy + place * item.shape.padded, p.size, item.shape.padded);
            read_row(value, value_copy + place * item.shape.padded, p.size, item.shape.padded);
            rows.key[place] = key_copy + place * item.shape.padded, rows.value[place] = value_copy + place * item.shape.padded;
        } else {
            rows.key[place] = where(key), rows.value[place] = where(value);
        }
        if (head == item.head0) prefetch_row(key, p.size), prefetch_row(value, p.size);
        if (more) prefetch_row(key + p.key_head_stride, p.size), prefetch_row(value + p.value_head_stride, p.size);
    }
}

// Calls body(tile, rows, head) for every tile of the image and each of its heads; `outside(tile)` for a tile without regions.
template <typename T, typename Body, typename Outside>
void walk(const Item& item, Part* parts, float* key_copy, float* value_copy, const Body& body, const Outside& outside) {
    const int64_t height = item.p.grids[2 * item.image], width = item.p.grids[2 * item.image + 1];
    Rows rows;
    for (int64_t row = 0; row < height; row += SIDE)
        for (int64_t column = 0; column < width; column += SIDE) {
            Tile tile{row, row + SIDE < height ? row + SIDE : height, column, column + SIDE < width ? column + SIDE : width, 0, 0};
            find_parts(item, tile, parts);
            if (tile.parts == 0) {
                outside(tile);
                continue;
            }
            for (int64_t head = item.head0; head < item.head1; ++head) {
                find_rows<T>(item, tile, head, key_copy, value_copy, rows);
                body(tile, rows, head);
            }
        }
}

// Hands out slices of the scratch memory.
struct Arena {
    float* next;
    float* take(int64_t floats) {
        float* slice = next;
        next += round_up(floats, 16);
        return slice;
    }
    Part* take_parts(int64_t count) { return reinterpret_cast<Part*>(take(count * int64_t(sizeof(Part) / sizeof(float)))); }
};

// ---- forward ----
struct ForwardScratch {
    Part* parts;
    float *keys, *values, *weights;             // of one tile
    float *queries, *sums, *largest, *total;    // of every head and region
    int64_t floats;
    ForwardScratch(const Shape& shape, int64_t states, int64_t regions, float* base) {
        Arena arena{base};
        parts = arena.take_parts(regions);
        keys = arena.take(TILE * shape.padded);
        values = arena.take(TILE * shape.padded);
        weights = arena.take(QUERIES * TILE);
        queries = arena.take(states * shape.block);
        sums = arena.take(states * shape.block);
        largest = arena.take(states * shape.queries * TOKENS);
        total = arena.take(states * shape.queries * TOKENS);
        floats = arena.next - base;
    }
};

void forward_part(const Item& item, const ForwardScratch& s, const Part& part, const Rows& rows, int64_t head) {
    const Shape& shape = item.shape;
    const int64_t state = item.state(head, part.slot);
    const float *keys[TILE], *values[TILE];
    for (int64_t t = 0; t < part.padded; ++t) keys[t] = rows.key[part.at[t]], values[t] = rows.value[part.at[t]];
    const Vec scale = splat(item.p.scale);
    for (int64_t k = 0; k < shape.queries; k += QUERIES) {
        const float* const queries = s.queries + state * shape.block + k * shape.padded;
        float* const sums = s.sums + state * shape.block + k * shape.padded;
        float* const largest_so_far = s.largest + (state * shape.queries + k) * TOKENS;
        float* const total = s.total + (state * shape.queries + k) * TOKENS;
        Vec part_largest = splat(-INFINITY);
        for (int64_t t = 0; t < part.padded; t += TOKENS) {
            const Vec logits = dots(queries, keys + t, shape.padded) * scale + repeat_tokens(part.bias + t);
            store(s.weights + QUERIES * t, logits);
            part_largest = largest(logits, part_largest);
        }
        const Vec before = load(largest_so_far), now = largest(before, largest_of_tokens(part_largest));
        // Where every logit so far is -inf, so is `now`, and -inf - -inf would be NaN: from 0, they weigh 0. NaN stays NaN.
        const Vec safe = now == splat(-INFINITY) ? Vec{} : now;
        const Vec decay = exponential(before - safe);
        store(largest_so_far, now);
        for (int q = 0; q < QUERIES; ++q) {
            if (decay[q] == 1.0f) continue;
            float* const row = sums + q * shape.padded;
            for (int64_t d = 0; d < shape.padded; d += WIDTH) store(row + d, load(row + d) * splat(decay[q]));
        }
        Vec sum = load(total) * decay;
        for (int64_t t = 0; t < part.padded; t += TOKENS) {
            const Vec weights = exponential(load(s.weights + QUERIES * t) - safe);
            store(s.weights + QUERIES * t, weights);
            sum = sum + weights;
        }
        store(total, sum);
        add_to_queries(sums, s.weights, values, part.count, shape.padded);
    }
}

template <typename T>
void forward(const Item& item, float* scratch) {
    const RegionAttention& p = item.p;
    const Shape& shape = item.shape;
    const int64_t states = (item.head1 - item.head0) * item.regions;
    const ForwardScratch s(shape, states, item.regions, scratch);
    for (int64_t head = item.head0; head < item.head1; ++head)
        for (int64_t slot = 0; slot < item.regions; ++slot)
            read_queries<T>(item, p.query, p.query_region_stride, slot, head, s.queries + item.state(head, slot) * shape.block);
    for (int64_t i = 0; i < states * shape.block; ++i) s.sums[i] = 0.0f;
    for (int64_t i = 0; i < states * shape.queries * TOKENS; ++i) s.largest[i] = -INFINITY, s.total[i] = 0.0f;
    walk<T>(
        item, s.parts, s.keys, s.values,
        [&](const Tile& tile, const Rows& rows, int64_t head) {
            for (int64_t i = 0; i < tile.parts; ++i) forward_part(item, s, s.parts[i], rows, head);
        },
        [](const Tile&) {});
    for (int64_t head = item.head0; head < item.head1; ++head)
        for (int64_t slot = 0; slot < item.regions; ++slot) {
            const RegionCells& cells = p.cells[item.region(slot)];
            const bool none = cells.row0 == cells.row1;
            for (int64_t k = 0; k < p.queries; ++k) {
                const int64_t at = item.row(slot, k, head), state = item.state(head, slot), lane = k % QUERIES;
                const int64_t block = (state * shape.queries + k - lane) * TOKENS;
                const float total = sum_of_tokens(load(s.total + block))[lane];
                write_row(s.sums + state * shape.block + k * shape.padded, static_cast<T*>(p.output) + at * p.size, p.size,
                          none ? 0.0f : 1.0f / total);
                p.lse[at] = none ? -INFINITY : s.largest[block + lane] + std::log(total);
            }
        }
}

// ---- backward ----
struct BackwardScratch {
    Part* parts;
    float *keys, *values, *grad_keys, *grad_values, *nowhere, *weights, *grad_logits;  // of one tile
    float *queries, *gradients, *grad_queries, *lse, *shift;                           // of every head and region
    int64_t floats;
    BackwardScratch(const Shape& shape, int64_t states, int64_t regions, float* base) {
        Arena arena{base};
        parts = arena.take_parts(regions);
        keys = arena.take(TILE * shape.padded);
        values = arena.take(TILE * shape.padded);
        grad_keys = arena.take(TILE * shape.padded);
        grad_values = arena.take(TILE * shape.padded);
        nowhere = arena.take(shape.padded);
        weights = arena.take(shape.queries * TILE);
        grad_logits = arena.take(shape.queries * TILE);
        queries = arena.take(states * shape.block);
        gradients = arena.take(states * shape.block);
        grad_queries = arena.take(states * shape.block);
        lse = arena.take(states * shape.queries);
        shift = arena.take(states * shape.queries);
        floats = arena.next - base;
    }
};

// Queries, gradients, lse and shift = output . gradient - gradient of lse, of one region in one head.
template <typename T>
void start_backward(const Item& item, const BackwardScratch& s, int64_t slot, int64_t head) {
    const RegionAttention& p = item.p;
    const Shape& shape = item.shape;
    const int64_t state = item.state(head, slot);
    float* const gradients = s.gradients + state * shape.block;
    read_queries<T>(item, p.query, p.query_region_stride, slot, head, s.queries + state * shape.block);
    read_queries<T>(item, p.grad_output, p.queries * p.heads * p.size, slot, head, gradients);
    // Padding repeats the last query, whose logits are no worse than its own; the zeros of read_queries times an infinite
    // key would be NaN, and reach that key's gradient.
    float* const queries = s.queries + state * shape.block;
    for (int64_t i = p.queries * shape.padded; i < shape.block; ++i) queries[i] = queries[i - shape.padded];
    for (int64_t i = 0; i < shape.block; ++i) s.grad_queries[state * shape.block + i] = 0.0f;
    for (int64_t k = 0; k < shape.queries; ++k) {
        float lse = INFINITY, shift = 0.0f;  // of a padding row: every weight is 0
        if (k < p.queries) {
            const int64_t at = item.row(slot, k, head), lane = k % QUERIES;
            read_row(static_cast<const T*>(p.output) + at * p.size, s.keys, p.size, shape.padded);
            const float* rows[TOKENS];
            for (int64_t t = 0; t < TOKENS; ++t) rows[t] = s.keys;
            // By the same additions as gradient . value: where one token has all the weight, they cancel exactly.
            shift = dots(gradients + (k - lane) * shape.padded, rows, shape.padded)[lane] - p.grad_lse[at];
            lse = p.lse[at];
        }
        s.lse[state * shape.queries + k] = lse;
        s.shift[state * shape.queries + k] = shift;
    }
}

// Adds a part's share of its region's query gradients and of its tile's key and value gradients.
void backward_part(const Item& item, const BackwardScratch& s, const Part& part, const Rows& rows, int64_t head) {
    const Shape& shape = item.shape;
    const int64_t state = item.state(head, part.slot), stride = QUERIES * TILE;
    const float *keys[TILE], *values[TILE];
    float *grad_keys[TILE], *grad_values[TILE];
    for (int64_t t = 0; t < part.padded; ++t) {
        const int64_t place = part.at[t];
        keys[t] = rows.key[place], values[t] = rows.value[place];
        grad_keys[t] = t < part.count ? s.grad_keys + place * shape.padded : s.nowhere;
        grad_values[t] = t < part.count ? s.grad_values + place * shape.padded : s.nowhere;
    }
    const float *const queries = s.queries + state * shape.block, *const gradients = s.gradients + state * shape.block;
    const Vec scale = splat(item.p.scale);
    for (int64_t k = 0; k < shape.queries; k += QUERIES) {
        float *const weights = s.weights + k * TILE, *const grad_logits = s.grad_logits + k * TILE;
        const Vec lse = repeat_queries(s.lse + state * shape.queries + k);
        const Vec shift = repeat_queries(s.shift + state * shape.queries + k);
        for (int64_t t = 0; t < part.padded; t += TOKENS) {
            const Vec logits = dots(queries + k * shape.padded, keys + t, shape.padded) * scale + repeat_tokens(part.bias + t);
            const Vec weight = exponential(logits - lse);
            store(weights + QUERIES * t, weight);
            const Vec through_value = dots(gradients + k * shape.padded, values + t, shape.padded);
            store(grad_logits + QUERIES * t, weight * (through_value - shift) * scale);
        }
        add_to_queries(s.grad_queries + state * shape.block + k * shape.padded, grad_logits, keys, part.count, shape.padded);
    }
    for (int64_t t = 0; t < part.padded; t += TOKENS) {
        add_to_tokens(grad_keys + t, s.grad_logits + QUERIES * t, stride, queries, shape.queries, shape.padded);
        add_to_tokens(grad_values + t, s.weights + QUERIES * t, stride, gradients, shape.queries, shape.padded);
    }
}

template <typename T>
void backward(const Item& item, float* scratch) {
    const RegionAttention& p = item.p;
    const Shape& shape = item.shape;
    const BackwardScratch s(shape, (item.head1 - item.head0) * item.regions, item.regions, scratch);
    for (int64_t head = item.head0; head < item.head1; ++head)
        for (int64_t slot = 0; slot < item.regions; ++slot) start_backward<T>(item, s, slot, head);

    const auto clear = [&] {
        for (int64_t i = 0; i < TILE * shape.padded; i += WIDTH) store(s.grad_keys + i, Vec{}), store(s.grad_values + i, Vec{});
    };
    const auto write = [&](const Tile& tile, int64_t head) {
        for (int64_t place = 0; place < TILE; ++place) {
            if (!tile.has(place)) continue;
            const int64_t to = (tile.token(item, place) * p.heads + head) * p.size;
            stream_row(s.grad_keys + place * shape.padded, static_cast<T*>(p.grad_key) + to, p.size);
            stream_row(s.grad_values + place * shape.padded, static_cast<T*>(p.grad_value) + to, p.size);
        }
    };
    walk<T>(
        item, s.parts, s.keys, s.values,
        [&](const Tile& tile, const Rows& rows, int64_t head) {
            clear();
            for (int64_t i = 0; i < tile.parts; ++i) backward_part(item, s, s.parts[i], rows, head);
            write(tile, head);
        },
        [&](const Tile& tile) {
            clear();
            for (int64_t head = item.head0; head < item.head1; ++head) write(tile, head);
        });
    stream_fence();

    for (int64_t head = item.head0; head < item.head1; ++head)
        for (int64_t slot = 0; slot < item.regions; ++slot)
            for (int64_t k = 0; k < p.queries; ++k)
                write_row(s.grad_queries + item.state(head, slot) * shape.block + k * shape.padded,
                          p.grad_query + item.row(slot, k, head) * p.size, p.size, 1.0f);
}

}  // namespace

int64_t region_attention_forward_scratch(const RegionAttention& p, int64_t heads) {
    return ForwardScratch(Shape(p), heads * p.most_regions, p.most_regions, nullptr).floats;
}

int64_t region_attention_backward_scratch(const RegionAttention& p, int64_t heads) {
    return BackwardScratch(Shape(p), heads * p.most_regions, p.most_regions, nullptr).floats;
}

void region_attention_forward(const RegionAttention& p, int64_t image, int64_t head0, int64_t head1, float* scratch) {
    const Item item(p, image, head0, head1);
    GRANVIT_BY_DTYPE(p.dtype, forward<T>(item, scratch))
}

void region_attention_backward(const RegionAttention& p, int64_t image, int64_t head0, int64_t head1, float* scratch) {
    const Item item(p, image, head0, head1);
    GRANVIT_BY_DTYPE(p.dtype, backward<T>(item, scratch))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

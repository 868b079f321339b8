// Inner loops of region_pool. Compiled once an ISA.
//
// Forward takes a region's cells TILE at a time and keeps its weighted sums in scratch memory. Backward takes a square tile
// of tokens, for which all regions that meet it add up in their order: gradients are written once, by one thread. Queries
// are padded to a multiple of four (their weights repeat the last one's, and go nowhere), tokens with a repeated one of
// weight 0, the head size to a multiple of WIDTH with zeros.
#include "cpu/region_pool.h"
#include "cpu/region_tiles.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

struct Shape {
    int64_t queries, size;  // padded
    explicit Shape(const RegionPool& p) : queries(round_up(p.queries, QUERIES)), size(round_up(p.size, WIDTH)) {}
};

// One head of the packed values [T, H, D], as float32 rows of the padded size.
template <typename T>
struct Values {
    const RegionPool& p;
    const Shape shape;
    const T* const base;
    const bool copy;
    Values(const RegionPool& problem, int64_t head)
        : p(problem), shape(problem), base(static_cast<const T*>(p.value) + head * p.value_head_stride),
          copy(!in_place(base, p.size)) {}

    // Where the row of a token is, or, where the kernels can't use it there, its copy.
    const float* row(int64_t token, float* copied) const {
        const T* const from = base + token * p.value_token_stride;
        if (!copy) return where(from);
        read_row(from, copied, p.size, shape.size);
        return copied;
    }
    void prefetch(int64_t token) const { prefetch_row(base + token * p.value_token_stride, p.size); }
};

// Logits of one head of `tokens` tokens, as region_math.h has weights.
void read_logits(const RegionPool& p, int64_t head, const int64_t* tokens, int64_t count, float* weights) {
    const int64_t padded = round_up(p.queries, QUERIES);
    for (int64_t t = 0; t < count; ++t) {
        const float* const from = p.logits + tokens[t] * p.queries * p.heads + head;
        for (int64_t k = 0; k < padded; ++k)
            weights[k / QUERIES * WEIGHTS + QUERIES * t + k % QUERIES] = from[(k < p.queries ? k : p.queries - 1) * p.heads];
    }
}

// Hands the cells of a region on, TILE at a time: their tokens and shares, and how many; padded to a multiple of TOKENS by
// the last one, with a share of 0.
template <typename Function>
void each_tile(const RegionPool& p, const RegionCells& cells, const Function& take) {
    const int64_t width = cells.column1 - cells.column0, count = (cells.row1 - cells.row0) * width;
    const int64_t image_width = p.grids[2 * cells.image + 1];
    const int64_t first = p.cu_seqlens[cells.image] + cells.row0 * image_width + cells.column0;
    for (int64_t begin = 0; begin < count; begin += TILE) {
        const int64_t here = count - begin < TILE ? count - begin : TILE, padded = round_up(here, TOKENS);
        int64_t tokens[TILE];
        float share[TILE];
        for (int64_t t = 0; t < padded; ++t) {
            const int64_t cell = begin + (t < here ? t : here - 1), row = cell / width, column = cell % width;
            tokens[t] = first + row * image_width + column;
            share[t] = t < here ? cells.row_share[row] * cells.column_share[column] : 0.0f;
        }
        take(tokens, share, here, padded);
    }
}

// ---- forward ----
struct ForwardScratch {
    float *values, *weights;         // of TILE tokens
    float *sums, *largest, *total;   // of the region; the latter two of backward's regions, too
    int64_t floats;
    ForwardScratch(const Shape& shape, float* base) {
        Arena arena{base};
        values = arena.take(TILE * shape.size);
        weights = arena.take(shape.queries * TILE);
        sums = arena.take(shape.queries * shape.size);
        largest = arena.take(shape.queries * TOKENS);
        total = arena.take(shape.queries * TOKENS);
        floats = arena.next - base;
    }
};

template <typename T>
void forward(const RegionPool& p, int64_t region, int64_t head, float* scratch) {
    const Shape shape(p);
    const ForwardScratch s(shape, scratch);
    const Values<T> values(p, head);
    const RegionCells& cells = p.table.cells[region];
    for (int64_t i = 0; i < shape.queries * shape.size; ++i) s.sums[i] = 0.0f;
    for (int64_t i = 0; i < shape.queries * TOKENS; ++i) s.largest[i] = -INFINITY, s.total[i] = 0.0f;

    each_tile(p, cells, [&](const int64_t* tokens, const float* share, int64_t here, int64_t padded) {
        const float* rows[TILE];
        for (int64_t t = 0; t < here; ++t) values.prefetch(tokens[t]);
        read_logits(p, head, tokens, padded, s.weights);
        for (int64_t k = 0; k < shape.queries; k += QUERIES)
            take_in(s.weights + k * TILE, share, padded, s.largest + k * TOKENS, s.total + k * TOKENS,
                    s.sums + k * shape.size, shape.size, shape.size);
        for (int64_t t = 0; t < here; ++t) rows[t] = values.row(tokens[t], s.values + t * shape.size);
        add_to_queries(s.sums, shape.size, shape.queries, s.weights, rows, here, shape.size);
    });

    const bool met = cells.row0 < cells.row1;
    for (int64_t k = 0; k < p.queries; ++k) {
        const int64_t at = (region * p.queries + k) * p.heads + head, lane = k % QUERIES, block = (k - lane) * TOKENS;
        const float total = sum_of_tokens(load(s.total + block))[lane];
        write_row(s.sums + k * shape.size, static_cast<T*>(p.output) + at * p.size, p.size, met ? 1.0f / total : 0.0f);
        p.lse[at] = met ? s.largest[block + lane] + std::log(total) + cells.log_unit : -INFINITY;
    }
}

// ---- backward ----
template <typename T>
void prepare(const RegionPool& p, int64_t region, int64_t head, float* floats, float* scratch) {
    const Shape shape(p);
    // Anew, not from lse: its rounding, 3e-5 where logits are near 1000, would be in every weight.
    const ForwardScratch s(shape, scratch);
    for (int64_t i = 0; i < shape.queries * TOKENS; ++i) s.largest[i] = -INFINITY, s.total[i] = 0.0f;
    each_tile(p, p.table.cells[region], [&](const int64_t* tokens, const float* share, int64_t, int64_t padded) {
        read_logits(p, head, tokens, padded, s.weights);
        for (int64_t k = 0; k < shape.queries; k += QUERIES)
            take_in(s.weights + k * TILE, share, padded, s.largest + k * TOKENS, s.total + k * TOKENS, nullptr, 0, 0);
    });
    RegionPoolUpstream& up = p.upstream[region * p.heads + head];
    Arena arena{floats};
    up.largest = arena.take(shape.queries);
    up.factor = arena.take(shape.queries);
    up.shift = arena.take(shape.queries);
    float* const outputs = arena.take(QUERIES * shape.size);
    const int64_t first = region * p.queries * p.heads + head;
    const T* const gradient = static_cast<const T*>(p.grad_output) + first * p.size;
    if (in_place(gradient, p.size) && shape.queries == p.queries) {
        up.gradient = where(gradient);
        up.stride = p.heads * p.size;
    } else {
        float* const copy = arena.take(shape.queries * shape.size);
        for (int64_t k = 0; k < p.queries; ++k)
            read_row(gradient + k * p.heads * p.size, copy + k * shape.size, p.size, shape.size);
        for (int64_t i = p.queries * shape.size; i < shape.queries * shape.size; ++i) copy[i] = 0.0f;
        up.gradient = copy;
        up.stride = shape.size;
    }
    for (int64_t k = 0; k < shape.queries; ++k) {
        up.largest[k] = INFINITY, up.factor[k] = up.shift[k] = 0.0f;  // of a padding row: every weight is 0
        if (k >= p.queries) continue;
        const int64_t at = first + k * p.heads, lane = k % QUERIES, block = (k - lane) * TOKENS;
        read_row(static_cast<const T*>(p.output) + at * p.size, outputs, p.size, shape.size);
        const float* rows[TOKENS];
        for (int64_t t = 0; t < TOKENS; ++t) rows[t] = outputs;
        // By the same additions as gradient . value: where one token has all the weight, they cancel exactly.
        up.shift[k] = dots(up.gradient + (k - lane) * up.stride, up.stride, rows, shape.size)[lane] - p.grad_lse[at];
        up.largest[k] = s.largest[block + lane];
        up.factor[k] = 1.0f / sum_of_tokens(load(s.total + block))[lane];
    }
}

struct BackwardScratch {
    Part* parts;
    float *values, *grad_values, *nowhere, *weights, *grad_logits;
    int64_t floats;
    BackwardScratch(const Shape& shape, int64_t regions, float* base) {
        Arena arena{base};
        parts = arena.take_parts(regions);
        values = arena.take(TILE * shape.size);
        grad_values = arena.take(TILE * shape.size);
        nowhere = arena.take(shape.size);
        weights = arena.take(shape.queries * TILE);
        grad_logits = arena.take(shape.queries * TILE);
        floats = arena.next - base;
    }
};

// Adds one region's share of a tile's gradients. values: the tile's rows, by place.
void backward_part(const RegionPool& p, const BackwardScratch& s, const Tile& tile, const Part& part, int64_t head,
                   const RegionPoolUpstream& up, const float* const* values) {
    const Shape shape(p);
    const float* rows[TILE];
    float* grads[TILE];
    int64_t tokens[TILE];
    for (int64_t t = 0; t < part.padded; ++t) {
        tokens[t] = tile.token(part.at[t]);
        rows[t] = values[part.at[t]];
        grads[t] = t < part.count ? s.grad_values + part.at[t] * shape.size : s.nowhere;
    }
    read_logits(p, head, tokens, part.padded, s.weights);
    for (int64_t t = 0; t < part.padded; t += TOKENS) {
        const Vec share = repeat_tokens(part.share + t);
        for (int64_t k = 0; k < shape.queries; k += QUERIES) {
            float* const weights = s.weights + k * TILE + QUERIES * t;
            const Vec weight = exponential(load(weights) - repeat_queries(up.largest + k)) * repeat_queries(up.factor + k) * share;
            const Vec through_value = dots(up.gradient + k * up.stride, up.stride, rows + t, shape.size);
            store(weights, weight);
            store(s.grad_logits + k * TILE + QUERIES * t, weight * (through_value - repeat_queries(up.shift + k)));
        }
    }
    add_to_tokens(grads, part.padded, s.weights, up.gradient, up.stride, shape.queries, shape.size);
    for (int64_t t = 0; t < part.count; ++t) {
        float* const to = p.grad_logits + tokens[t] * p.queries * p.heads + head;
        for (int64_t k = 0; k < p.queries; ++k)
            to[k * p.heads] += s.grad_logits[k / QUERIES * WEIGHTS + QUERIES * t + k % QUERIES];
    }
}

template <typename T>
void backward(const RegionPool& p, int64_t image, int64_t row, int64_t column, float* scratch) {
    const Shape shape(p);
    const int64_t* const order = p.table.order + p.table.first[image];
    const BackwardScratch s(shape, p.table.most, scratch);
    Tile tile(row, column, image, p.grids, p.cu_seqlens);
    find_parts(p.table.cells, order, p.table.first[image + 1] - p.table.first[image], tile, s.parts);

    const int64_t logits = p.queries * p.heads;
    for (int64_t place = 0; place < TILE; ++place)
        if (tile.has(place))
            for (int64_t i = 0; i < logits; ++i) p.grad_logits[tile.token(place) * logits + i] = 0.0f;
    for (int64_t head = 0; head < p.heads; ++head) {
        const Values<T> values(p, head);
        const float* rows[TILE];
        for (int64_t place = 0; place < TILE; ++place)
            if (tile.meets(place)) rows[place] = values.row(tile.token(place), s.values + place * shape.size);
        for (int64_t i = 0; i < TILE * shape.size; i += WIDTH) store(s.grad_values + i, Vec{});
        for (int64_t i = 0; i < tile.parts; ++i) {
            const Part& part = s.parts[i];
            backward_part(p, s, tile, part, head, p.upstream[order[part.slot] * p.heads + head], rows);
        }
        for (int64_t place = 0; place < TILE; ++place)
            if (tile.has(place))
                stream_row(s.grad_values + place * shape.size,
                           static_cast<T*>(p.grad_value) + (tile.token(place) * p.heads + head) * p.size, p.size);
    }
    stream_fence();
}

}  // namespace

int64_t region_pool_tile_side() { return SIDE; }

int64_t region_pool_forward_scratch(const RegionPool& p) { return ForwardScratch(Shape(p), nullptr).floats; }

int64_t region_pool_backward_scratch(const RegionPool& p) {
    return BackwardScratch(Shape(p), p.table.most, nullptr).floats;
}

int64_t region_pool_upstream_floats(const RegionPool& p) {
    const Shape shape(p);
    return 3 * round_up(shape.queries, 16) + (QUERIES + shape.queries) * round_up(shape.size, 16);
}

void region_pool_forward(const RegionPool& p, int64_t region, int64_t head, float* scratch) {
    GRANVIT_BY_DTYPE(p.dtype, forward<T>(p, region, head, scratch))
}

void region_pool_prepare(const RegionPool& p, int64_t region, int64_t head, float* floats, float* scratch) {
    GRANVIT_BY_DTYPE(p.dtype, prepare<T>(p, region, head, floats, scratch))
}

void region_pool_backward(const RegionPool& p, int64_t image, int64_t row, int64_t column, float* scratch) {
    GRANVIT_BY_DTYPE(p.dtype, backward<T>(p, image, row, column, scratch))
}

}  // namespace GRANVIT_ISA
}  // namespace granvit

// Inner loops of region_attention. Compiled once an ISA.
//
// Both directions walk an image in square tiles, a tile head by head, and a head through the regions that meet the tile,
// in order. So keys and values come from memory once however many regions overlap, the next head's rows (they lie beside
// this one's) can be fetched meanwhile, and a row of the gradients is written once, by one thread. Forward keeps a running
// maximum a query; backward recomputes the weights from lse, as flash attention does. Queries are padded to a multiple of
// four with zero rows, tokens with a repeated one of weight 0, the head size to a multiple of WIDTH with zeros.
#include "cpu/region_attention.h"
#include "cpu/region_tiles.h"

namespace granvit {
namespace GRANVIT_ISA {
namespace {

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
    const int64_t begin, regions;  // p.table.order[begin + slot] is the region in slot [0, regions)

    Item(const RegionAttention& problem, int64_t image_, int64_t head0_, int64_t head1_)
        : p(problem), shape(problem), image(image_), head0(head0_), head1(head1_), begin(p.table.first[image]),
          regions(p.table.first[image + 1] - begin) {}
    int64_t region(int64_t slot) const { return p.table.order[begin + slot]; }
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
        if (!tile.meets(place)) continue;
        const int64_t token = tile.token(place);
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
            Tile tile(row, column, item.image, item.p.grids, item.p.cu_seqlens);
            find_parts(item.p.table.cells, item.p.table.order + item.begin, item.regions, tile, parts);
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
        weights = arena.take(shape.queries * TILE);
        queries = arena.take(states * shape.block);
        sums = arena.take(states * shape.block);
        largest = arena.take(states * shape.queries * TOKENS);
        total = arena.take(states * shape.queries * TOKENS);
        floats = arena.next - base;
    }
};

// Logits of four queries and TOKENS tokens. The addition rounds the product here, in both directions alike: fused with what
// backward takes off, a large logit would differ from forward's by more than 1.
inline Vec logits_of(const float* queries, const float* const* keys, int64_t padded, float scale) {
    return dots(queries, padded, keys, padded) * splat(scale) + Vec{};
}

void forward_part(const Item& item, const ForwardScratch& s, const Part& part, const Rows& rows, int64_t head) {
    const Shape& shape = item.shape;
    const int64_t state = item.state(head, part.slot);
    const float *keys[TILE], *values[TILE];
    for (int64_t t = 0; t < part.padded; ++t) keys[t] = rows.key[part.at[t]], values[t] = rows.value[part.at[t]];
    float* const sums = s.sums + state * shape.block;
    for (int64_t k = 0; k < shape.queries; k += QUERIES) {
        const float* const queries = s.queries + state * shape.block + k * shape.padded;
        float* const weights = s.weights + k * TILE;
        for (int64_t t = 0; t < part.padded; t += TOKENS)
            store(weights + QUERIES * t, logits_of(queries, keys + t, shape.padded, item.p.scale));
        const int64_t at = (state * shape.queries + k) * TOKENS;
        take_in(weights, part.share, part.padded, s.largest + at, s.total + at, sums + k * shape.padded, shape.padded,
                shape.padded);
    }
    add_to_queries(sums, shape.padded, shape.queries, s.weights, values, part.count, shape.padded);
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
            const RegionCells& cells = p.table.cells[item.region(slot)];
            const bool none = cells.row0 == cells.row1;
            for (int64_t k = 0; k < p.queries; ++k) {
                const int64_t at = item.row(slot, k, head), state = item.state(head, slot), lane = k % QUERIES;
                const int64_t block = (state * shape.queries + k - lane) * TOKENS;
                const float total = sum_of_tokens(load(s.total + block))[lane];
                write_row(s.sums + state * shape.block + k * shape.padded, static_cast<T*>(p.output) + at * p.size, p.size,
                          none ? 0.0f : 1.0f / total);
                p.lse[at] = none ? -INFINITY : s.largest[block + lane] + std::log(total) + cells.log_unit;
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
            shift = dots(gradients + (k - lane) * shape.padded, shape.padded, rows, shape.padded)[lane] - p.grad_lse[at];
            lse = p.lse[at];
        }
        s.lse[state * shape.queries + k] = lse;
        s.shift[state * shape.queries + k] = shift;
    }
}

// Adds a part's share of its region's query gradients and of its tile's key and value gradients.
void backward_part(const Item& item, const BackwardScratch& s, const Part& part, const Rows& rows, int64_t head) {
    const Shape& shape = item.shape;
    const int64_t state = item.state(head, part.slot);
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
    const float log_unit = item.p.table.cells[item.region(part.slot)].log_unit;
    for (int64_t k = 0; k < shape.queries; k += QUERIES) {
        float *const weights = s.weights + k * TILE, *const grad_logits = s.grad_logits + k * TILE;
        const Vec lse = repeat_queries(s.lse + state * shape.queries + k);
        const Vec shift = repeat_queries(s.shift + state * shape.queries + k);
        for (int64_t t = 0; t < part.padded; t += TOKENS) {
            const Vec logits = logits_of(queries + k * shape.padded, keys + t, shape.padded, item.p.scale);
            const Vec weight = weights_of(logits, log_unit, lse) * repeat_tokens(part.share + t);
            store(weights + QUERIES * t, weight);
            const Vec through_value = dots(gradients + k * shape.padded, shape.padded, values + t, shape.padded);
            store(grad_logits + QUERIES * t, weight * (through_value - shift) * scale);
        }
    }
    add_to_queries(s.grad_queries + state * shape.block, shape.padded, shape.queries, s.grad_logits, keys, part.count,
                   shape.padded);
    add_to_tokens(grad_keys, part.padded, s.grad_logits, queries, shape.padded, shape.queries, shape.padded);
    add_to_tokens(grad_values, part.padded, s.weights, gradients, shape.padded, shape.queries, shape.padded);
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
            const int64_t to = (tile.token(place) * p.heads + head) * p.size;
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
    return ForwardScratch(Shape(p), heads * p.table.most, p.table.most, nullptr).floats;
}

int64_t region_attention_backward_scratch(const RegionAttention& p, int64_t heads) {
    return BackwardScratch(Shape(p), heads * p.table.most, p.table.most, nullptr).floats;
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

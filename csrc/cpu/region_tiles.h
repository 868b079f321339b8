// Square tiles of an image, and the cells that regions meet in them. For *_isa.cpp files only.
#pragma once
#include "cpu/region_math.h"
#include "cpu/regions.h"

namespace granvit {
namespace GRANVIT_ISA {

constexpr int64_t SIDE = 8;  // of a tile; a tile's cells are the bits of a uint64_t
static_assert(SIDE * SIDE == TILE);

// The cells of a tile that one region meets: their places in the tile (row * SIDE + column), and their covered share,
// relative as in RegionCells.
struct Part {
    int64_t slot, count, padded;  // padded: count rounded up to TOKENS, by repeating the last cell
    uint8_t at[TILE];
    float share[TILE];  // 0 in the padding
};

// Rows [row0, row1) and columns [column0, column1) of an image, and what of it is in use.
struct Tile {
    int64_t row0, row1, column0, column1, first_token, width;
    int64_t parts;
    uint64_t met;  // bit `place`: some region meets the cell

    Tile(int64_t row, int64_t column, int64_t image, const int32_t* grids, const int32_t* cu_seqlens)
        : row0(row), row1(row + SIDE), column0(column), column1(column + SIDE), first_token(cu_seqlens[image]),
          width(grids[2 * image + 1]), parts(0), met(0) {
        if (row1 > grids[2 * image]) row1 = grids[2 * image];
        if (column1 > width) column1 = width;
    }
    int64_t token(int64_t place) const { return first_token + (row0 + place / SIDE) * width + column0 + place % SIDE; }
    bool has(int64_t place) const { return row0 + place / SIDE < row1 && column0 + place % SIDE < column1; }
    bool meets(int64_t place) const { return met >> place & 1; }
};

// Fills in a tile's parts and bits: one for each of the `count` regions order[slot] that meets it. parts: room for all.
inline void find_parts(const RegionCells* cells, const int64_t* order, int64_t count, Tile& tile, Part* parts) {
    for (int64_t slot = 0; slot < count; ++slot) {
        const RegionCells& c = cells[order[slot]];
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
                part.share[part.count] = c.row_share[row - c.row0] * c.column_share[column - c.column0];
                tile.met |= uint64_t(1) << place;
            }
        for (part.padded = part.count; part.padded % TOKENS != 0; ++part.padded) {
            part.at[part.padded] = part.at[part.count - 1];
            part.share[part.padded] = 0.0f;
        }
    }
}

// Hands out slices of scratch memory; from a null base, it counts them.
struct Arena {
    float* next;
    float* take(int64_t floats) {
        float* slice = next;
        next += round_up(floats, 16);
        return slice;
    }
    Part* take_parts(int64_t count) { return reinterpret_cast<Part*>(take(count * int64_t(sizeof(Part) / sizeof(float)))); }
};

}  // namespace GRANVIT_ISA
}  // namespace granvit

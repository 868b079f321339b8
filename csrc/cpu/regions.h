// Which cells each region meets, and how much of each its box covers: for every operator that takes regions.
#pragma once
#include <cstdint>
#include <vector>

namespace granvit {

// A region's cells: rows [row0, row1) and columns [column0, column1) of its image; none when row0 == row1.
// A cell's covered share is row_share[row - row0] * column_share[column - column0] * exp(log_unit): relative to unit, the
// box's extent within the image or 1 where that is less, an axis. So the largest relative share of an axis is at least 1/2
// and none below 2^-24, however small the box, and weights multiplied by them neither vanish nor need a logarithm. Without
// coverage the shares are 1.
struct RegionCells {
    int64_t image, row0, row1, column0, column1;
    const float *row_share, *column_share;
    float log_unit;
};

struct Regions {
    const RegionCells* cells;      // [R]
    const int64_t *order, *first;  // regions of image i: order[first[i]:first[i + 1]], ascending
    int64_t most;                  // regions of any image
};

// The regions of a call; `table` points into this. boxes float32 [R, 4]; image_index int64 [R]; grids [B, 2] (h, w), B at
// least 1. A region whose box or index is invalid meets no cell.
class RegionTable {
  public:
    RegionTable(int64_t regions, const float* boxes, const int64_t* image_index, int64_t images, const int32_t* grids,
                bool coverage);
    RegionTable(const RegionTable&) = delete;
    Regions table() const { return {cells_.data(), order_.data(), first_.data(), most_}; }

  private:
    void add_shares(const float* boxes, const int32_t* grids, bool coverage);

    std::vector<RegionCells> cells_;
    std::vector<int64_t> order_, first_;
    std::vector<float> shares_;
    int64_t most_ = 0;
};

}  // namespace granvit

// Which cells each region meets.
#include "cpu/regions.h"

#include <algorithm>
#include <cmath>

namespace granvit {
namespace {

RegionCells cells_of(const float* box, int64_t image, int64_t images, const int32_t* grids) {
    RegionCells none{std::clamp<int64_t>(image, 0, images - 1), 0, 0, 0, 0, nullptr, nullptr, 0.0f};
    if (image != none.image) return none;
    const float height = float(grids[2 * image]), width = float(grids[2 * image + 1]);
    const float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
    // An infinite box reads nothing, as one with a NaN does: it is no box.
    if (!(std::isfinite(x1) && std::isfinite(y1) && std::isfinite(x2) && std::isfinite(y2))) return none;
    if (!(x1 < x2 && y1 < y2 && x1 < width && y1 < height && x2 > 0.0f && y2 > 0.0f)) return none;
    // Clip before rounding: a box may be larger than any integer.
    return {image,
            int64_t(std::max(y1, 0.0f)), int64_t(std::ceil(std::min(y2, height))),
            int64_t(std::max(x1, 0.0f)), int64_t(std::ceil(std::min(x2, width))),
            nullptr, nullptr, 0.0f};
}

}  // namespace

RegionTable::RegionTable(int64_t regions, const float* boxes, const int64_t* image_index, int64_t images,
                         const int32_t* grids, bool coverage)
    : cells_(regions), order_(regions), first_(images + 1, 0) {
    for (int64_t region = 0; region < regions; ++region)
        cells_[region] = cells_of(boxes + 4 * region, image_index[region], images, grids);
    add_shares(boxes, grids, coverage);
    // Counting sort by image. A region whose index names no image meets nothing; it goes with the first or last image's.
    for (const RegionCells& cells : cells_) ++first_[cells.image + 1];
    for (int64_t image = 0; image < images; ++image) {
        most_ = std::max(most_, first_[image + 1]);
        first_[image + 1] += first_[image];
    }
    std::vector<int64_t> next(first_.begin(), first_.end());
    for (int64_t region = 0; region < regions; ++region) order_[next[cells_[region].image]++] = region;
}

void RegionTable::add_shares(const float* boxes, const int32_t* grids, bool coverage) {
    int64_t total = 0;
    for (const RegionCells& c : cells_) total += c.row1 - c.row0 + c.column1 - c.column0;
    shares_.assign(total, 1.0f);
    float* next = shares_.data();
    // Shares of one axis; adds the logarithm of their unit to log_unit.
    const auto write = [&](float low, float high, int32_t size, int64_t begin, int64_t end, float& log_unit) {
        float* const shares = next;
        next += end - begin;
        if (coverage && begin < end) {
            const float unit = std::min(std::min(high, float(size)) - std::max(low, 0.0f), 1.0f);
            log_unit += std::log(unit);
            for (int64_t cell = begin; cell < end; ++cell)
                shares[cell - begin] = (std::min(high, float(cell + 1)) - std::max(low, float(cell))) / unit;
        }
        return shares;
    };
    for (size_t region = 0; region < cells_.size(); ++region) {
        RegionCells& c = cells_[region];
        const float* const box = boxes + 4 * region;
        c.row_share = write(box[1], box[3], grids[2 * c.image], c.row0, c.row1, c.log_unit);
        c.column_share = write(box[0], box[2], grids[2 * c.image + 1], c.column0, c.column1, c.log_unit);
    }
}

}  // namespace granvit

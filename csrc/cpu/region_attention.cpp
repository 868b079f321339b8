// region_attention on the CPU: which cells each region meets, and who works on what.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/layout.h"
#include "common/parallel.h"
#include "cpu/region_attention.h"

namespace granvit {
namespace {

// Cells, coverage and order of a call's regions; fills in the problem's pointers to them, which live as long as this does.
class Regions {
  public:
    Regions(RegionAttention& problem, const float* boxes, const int64_t* image_index, bool coverage)
        : cells_(problem.regions), order_(problem.regions), first_(problem.images + 1, 0) {
        for (int64_t region = 0; region < problem.regions; ++region)
            cells_[region] = cells(problem, boxes + 4 * region, image_index[region]);
        if (coverage) add_coverage(boxes);
        // Counting sort by image. A region whose index names no image meets nothing; it goes with the last image's.
        for (const RegionCells& cells : cells_) ++first_[cells.image + 1];
        for (int64_t image = 0; image < problem.images; ++image) first_[image + 1] += first_[image];
        std::vector<int64_t> next(first_.begin(), first_.end());
        for (int64_t region = 0; region < problem.regions; ++region) order_[next[cells_[region].image]++] = region;
        problem.cells = cells_.data();
        problem.order = order_.data();
        problem.first = first_.data();
        problem.most_regions = 0;
        for (int64_t image = 0; image < problem.images; ++image)
            problem.most_regions = std::max(problem.most_regions, first_[image + 1] - first_[image]);
    }

  private:
    static RegionCells cells(const RegionAttention& problem, const float* box, int64_t image) {
        RegionCells none{std::clamp<int64_t>(image, 0, problem.images - 1), 0, 0, 0, 0, nullptr, nullptr};
        if (image != none.image) return none;
        const int32_t height = problem.grids[2 * image], width = problem.grids[2 * image + 1];
        const float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
        // An infinite box reads nothing, as one with a NaN does: it is no box.
        if (!(std::isfinite(x1) && std::isfinite(y1) && std::isfinite(x2) && std::isfinite(y2))) return none;
        if (!(x1 < x2 && y1 < y2 && x1 < float(width) && y1 < float(height) && x2 > 0.0f && y2 > 0.0f)) return none;
        // Clip before rounding: a box may be larger than any integer.
        return {image,
                int64_t(std::max(y1, 0.0f)), int64_t(std::ceil(std::min(y2, float(height)))),
                int64_t(std::max(x1, 0.0f)), int64_t(std::ceil(std::min(x2, float(width)))),
                nullptr, nullptr};
    }

    // Log of the covered share of every row and column of every region.
    void add_coverage(const float* boxes) {
        int64_t total = 0;
        for (const RegionCells& c : cells_) total += c.row1 - c.row0 + c.column1 - c.column0;
        bias_.resize(total);
        float* next = bias_.data();
        const auto write = [&next](float low, float high, int64_t begin, int64_t end) {
            const float* const start = next;
            for (int64_t cell = begin; cell < end; ++cell)
                *next++ = std::log(std::min(high, float(cell + 1)) - std::max(low, float(cell)));
            return start;
        };
        for (size_t region = 0; region < cells_.size(); ++region) {
            RegionCells& c = cells_[region];
            const float* const box = boxes + 4 * region;
            c.row_bias = write(box[1], box[3], c.row0, c.row1);
            c.column_bias = write(box[0], box[2], c.column0, c.column1);
        }
    }

    std::vector<RegionCells> cells_;
    std::vector<int64_t> order_, first_;
    std::vector<float> bias_;
};

// `floats` floats for each thread, 64-byte aligned.
class Scratch {
  public:
    Scratch(int64_t floats, int threads) : floats_((floats + 15) / 16 * 16) {
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(floats_, 16) * threads * sizeof(float))));
        if (!memory_) throw std::bad_alloc();
    }
    float* of(int thread) const { return memory_.get() + thread * floats_; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    int64_t floats_;
    std::unique_ptr<float, Free> memory_;
};

// Heads that a thread takes at a time: several, because they lie side by side in memory, but enough pieces for all threads,
// and a state that stays in the cache near the core. Results don't depend on it.
template <typename ScratchFloats>
int64_t heads_at_a_time(const RegionAttention& problem, int threads, const ScratchFloats& scratch_floats) {
    constexpr int64_t PIECES = 16, NEAR = 1 << 17;
    int64_t heads = std::clamp<int64_t>(problem.images * problem.heads / (PIECES * threads), 1, problem.heads);
    while (heads > 1 && scratch_floats(heads) > NEAR) heads /= 2;
    return heads;
}

// Calls body(image, head0, head1, thread) for every image and all of its heads, `heads` at a time.
template <typename Body>
void for_each_piece(const RegionAttention& problem, int64_t heads, int threads, const Body& body) {
    const int64_t pieces = (problem.heads + heads - 1) / heads;
    parallel_for(problem.images * pieces, threads, [&](int64_t item, int thread) {
        const int64_t head0 = item % pieces * heads;
        body(item / pieces, head0, std::min(head0 + heads, problem.heads), thread);
    });
}

}  // namespace

void region_attention_forward(RegionAttention problem, const float* boxes, const int64_t* image_index, bool coverage,
                              int threads) {
    check_layout("key", problem.tokens, problem.grids, problem.cu_seqlens, problem.images);
    if (problem.regions == 0) return;
    const Regions regions(problem, boxes, image_index, coverage);
    const auto floats = [&](int64_t heads) { return GRANVIT_BY_ISA(region_attention_forward_scratch, problem, heads); };
    const int64_t heads = heads_at_a_time(problem, threads, floats);
    const Scratch scratch(floats(heads), threads);
    for_each_piece(problem, heads, threads, [&](int64_t image, int64_t head0, int64_t head1, int thread) {
        if (problem.first[image] == problem.first[image + 1]) return;
        GRANVIT_BY_ISA(region_attention_forward, problem, image, head0, head1, scratch.of(thread));
    });
}

void region_attention_backward(RegionAttention problem, const float* boxes, const int64_t* image_index, bool coverage,
                               int threads) {
    check_layout("key", problem.tokens, problem.grids, problem.cu_seqlens, problem.images);
    const int64_t row = problem.queries * problem.heads * problem.size;
    const bool shared = problem.query_region_stride == 0;
    float* const grad_query = problem.grad_query;
    std::vector<float> each;  // a shared query's gradient, region by region
    if (shared) {
        each.resize(problem.regions * row);
        problem.grad_query = each.data();
    }
    if (problem.images > 0) {
        const Regions regions(problem, boxes, image_index, coverage);
        const auto floats = [&](int64_t heads) { return GRANVIT_BY_ISA(region_attention_backward_scratch, problem, heads); };
        const int64_t heads = heads_at_a_time(problem, threads, floats);
        const Scratch scratch(floats(heads), threads);
        for_each_piece(problem, heads, threads, [&](int64_t image, int64_t head0, int64_t head1, int thread) {
            GRANVIT_BY_ISA(region_attention_backward, problem, image, head0, head1, scratch.of(thread));
        });
    }
    if (!shared) return;
    constexpr int64_t CHUNK = 1024;
    parallel_for((row + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk, int) {
        const int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, row);
        std::fill(grad_query + begin, grad_query + end, 0.0f);
        for (int64_t region = 0; region < problem.regions; ++region)
            for (int64_t i = begin; i < end; ++i) grad_query[i] += each[region * row + i];
    });
}

}  // namespace granvit

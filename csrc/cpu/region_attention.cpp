// region_attention on the CPU: who works on what.
#include <algorithm>
#include <vector>

#include "common/layout.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/region_attention.h"

namespace granvit {
namespace {

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
    const RegionTable table(problem.regions, boxes, image_index, problem.images, problem.grids, coverage);
    problem.table = table.table();
    const auto floats = [&](int64_t heads) { return GRANVIT_BY_ISA(region_attention_forward_scratch, problem, heads); };
    const int64_t heads = heads_at_a_time(problem, threads, floats);
    const Scratch scratch(floats(heads), threads);
    for_each_piece(problem, heads, threads, [&](int64_t image, int64_t head0, int64_t head1, int thread) {
        if (problem.table.first[image] == problem.table.first[image + 1]) return;
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
        const RegionTable table(problem.regions, boxes, image_index, problem.images, problem.grids, coverage);
        problem.table = table.table();
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

// region_pool on the CPU: who works on what. Forward by regions, backward by tiles of tokens.
#include "cpu/region_pool.h"

#include <algorithm>
#include <vector>

#include "common/layout.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace granvit {

void region_pool_forward(RegionPool problem, const float* boxes, const int64_t* image_index, bool coverage, int threads) {
    check_layout("value", problem.tokens, problem.grids, problem.cu_seqlens, problem.images);
    if (problem.regions == 0) return;
    const RegionTable table(problem.regions, boxes, image_index, problem.images, problem.grids, coverage);
    problem.table = table.table();
    const Scratch scratch(GRANVIT_BY_ISA(region_pool_forward_scratch, problem), threads);
    // In the images' order, whose values stay in the cache from region to region.
    parallel_for(problem.regions * problem.heads, threads, [&](int64_t item, int thread) {
        const int64_t region = problem.table.order[item / problem.heads];
        GRANVIT_BY_ISA(region_pool_forward, problem, region, item % problem.heads, scratch.of(thread));
    });
}

void region_pool_backward(RegionPool problem, const float* boxes, const int64_t* image_index, bool coverage, int threads) {
    check_layout("value", problem.tokens, problem.grids, problem.cu_seqlens, problem.images);
    if (problem.images == 0) return;
    const RegionTable table(problem.regions, boxes, image_index, problem.images, problem.grids, coverage);
    problem.table = table.table();

    const int64_t pairs = problem.regions * problem.heads;
    std::vector<RegionPoolUpstream> upstream(pairs);
    problem.upstream = upstream.data();
    const int64_t floats = GRANVIT_BY_ISA(region_pool_upstream_floats, problem);
    const Scratch kept(pairs * floats, 1);
    {
        const Scratch scratch(GRANVIT_BY_ISA(region_pool_forward_scratch, problem), threads);
        parallel_for(pairs, threads, [&](int64_t pair, int thread) {
            GRANVIT_BY_ISA(region_pool_prepare, problem, pair / problem.heads, pair % problem.heads,
                           kept.of(0) + pair * floats, scratch.of(thread));
        });
    }

    struct Item {
        int64_t image, row, column;
    };
    std::vector<Item> tiles;
    const int64_t side = GRANVIT_BY_ISA(region_pool_tile_side);
    for (int64_t image = 0; image < problem.images; ++image)
        for (int64_t row = 0; row < problem.grids[2 * image]; row += side)
            for (int64_t column = 0; column < problem.grids[2 * image + 1]; column += side)
                tiles.push_back({image, row, column});
    const Scratch scratch(GRANVIT_BY_ISA(region_pool_backward_scratch, problem), threads);
    parallel_for(int64_t(tiles.size()), threads, [&](int64_t item, int thread) {
        const Item& tile = tiles[item];
        GRANVIT_BY_ISA(region_pool_backward, problem, tile.image, tile.row, tile.column, scratch.of(thread));
    });
}

}  // namespace granvit

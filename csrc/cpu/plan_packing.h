// Best-fit decreasing bin packing; granvit_kernels/ops/patch_packing/planning/reference.py specifies it.
#pragma once
#include <cstdint>

namespace granvit {

// lengths [count], each in 0..capacity. Writes the indices list after list to `indices` [count], and where each list ends to
// `ends` [lists; count at most]. Returns the number of lists.
int64_t plan_packing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* indices, int64_t* ends);

}  // namespace granvit

// Threads, shared with torch: import torch before the module, and both use one OpenMP runtime.
#pragma once
#include <cstdint>
#include <omp.h>

namespace granvit {

// Calls body(item, thread) for every item in [0, items) on at most `threads` threads (thread in [0, threads)), items handed
// out as threads get free. What an item computes must not depend on its thread: that makes results equal for any number.
// body must not throw; allocate before.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
    if (threads <= 1 || items <= 1) {
        for (int64_t item = 0; item < items; ++item) body(item, 0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < items; ++item) body(item, omp_get_thread_num());
}

}  // namespace granvit

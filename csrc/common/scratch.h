// Memory that threads work in. Allocate it before the threads start: they must not throw.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace granvit {

// `floats` floats for each thread, 64-byte aligned, not initialised.
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

}  // namespace granvit

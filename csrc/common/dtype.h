// The storage types that kernels read and write; arithmetic is float32.
#pragma once
#include <cstdint>

namespace granvit {

// Values shared with granvit_kernels/native.py.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Bytes of one element.
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace granvit

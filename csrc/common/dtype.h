// The storage types that kernels read and write; arithmetic is float32.
#pragma once

namespace granvit {

// Values shared with granvit_kernels/native.py.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace granvit

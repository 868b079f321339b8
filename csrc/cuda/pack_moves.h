// How the blocks of pack_patches move memory: in pieces of 16 bytes, contiguous across a warp, however the rows of an image
// and the runs of the output are aligned.
//
// In all of these, each(count, f) calls f(0) to f(count - 1), in any order and by any thread, and returns when all are done.
#pragma once
#include <cstdint>

#include "cuda/values.h"

namespace granvit {

// Division by a number that many threads divide by: exact while n * divisor stays under 2**32.
struct Divide {
    uint32_t divisor, inverse;

    GRANVIT_HOST_DEVICE static Divide by(uint32_t divisor) { return {divisor, 0xffffffffu / divisor + 1}; }
    GRANVIT_HOST_DEVICE uint32_t operator()(uint32_t n) const {
        return divisor == 1 ? n : uint32_t((uint64_t(n) * inverse) >> 32);
    }
};

// Rows of an image on their way into shared memory. Each starts there as far past a multiple of 16 bytes as it does in the
// image (its lead), so that pieces of 16 bytes go over as they are.
struct ImageRows {
    const uint8_t* source;
    int64_t stride;
    int bytes;        // of a row
    uint32_t pitch;   // from row to row in shared memory
    Divide chunks;    // by the pieces of a row

    GRANVIT_HOST_DEVICE static ImageRows at(const uint8_t* source, int64_t stride, int bytes) {
        const uint32_t pitch = (15 + bytes + 4 + 15) / 16 * 16;  // who reads words may read one more
        return {source, stride, bytes, pitch, Divide::by(pitch / 16)};
    }
    GRANVIT_HOST_DEVICE uint32_t lead(uint32_t row) const {
        return (uint32_t(reinterpret_cast<uintptr_t>(source)) + row * uint32_t(stride)) & 15;
    }
};

template <typename Each>
GRANVIT_HOST_DEVICE inline void load_rows(const ImageRows& rows, int count, uint32_t* raw, const Each& each) {
    // Between the first row's first byte and the last row's last, all is the image's own storage; outside it may not be.
    const uintptr_t low = reinterpret_cast<uintptr_t>(rows.source);
    const uintptr_t high = low + (count - 1) * rows.stride + rows.bytes;
    each.loading(count * rows.chunks.divisor, [&](uint32_t i) {
        const uint32_t r = rows.chunks(i), c = i - r * rows.chunks.divisor, lead = rows.lead(r);
        if (16 * c >= lead + rows.bytes) return;
        const uintptr_t from = low + r * rows.stride - lead + 16 * c;
        uint32_t* to = raw + 4 * i;
        if (from >= low && from + 16 <= high) {
            load_shared(to, reinterpret_cast<const void*>(from));
            return;
        }
        for (int k = 0; k < 16; ++k)
            if (from + k >= low && from + k < high)
                reinterpret_cast<uint8_t*>(to)[k] = *reinterpret_cast<const uint8_t*>(from + k);
    });
}

// 16 bytes of values, at any value's address.
GRANVIT_HOST_DEVICE inline Chunk gather(const float* from) {
    return {{bits_of_float(from[0]), bits_of_float(from[1]), bits_of_float(from[2]), bits_of_float(from[3])}};
}
template <typename T>
GRANVIT_HOST_DEVICE inline Chunk gather(const T* from) {
    Chunk out;
    for (int k = 0; k < 4; ++k) out.at[k] = uint32_t(from[2 * k + 1].bits) << 16 | from[2 * k].bits;
    return out;
}

// A run of `length` values in shared memory goes to `to` in pieces that start at multiples of 16 bytes there. This stores
// piece `slot`: where the run covers 16 bytes wholly at once, at its ends value by value. aligned: the run begins at a
// multiple of 16 bytes.
template <typename T>
GRANVIT_HOST_DEVICE inline void store_slot(const T* run, int length, T* to, int slot, bool aligned = true) {
    constexpr int V = 16 / sizeof(T);
    const int lead = int(uint32_t(reinterpret_cast<uintptr_t>(to)) % 16 / sizeof(T)), first = slot * V - lead;
    run += first;
    to += first;
    if (first >= 0 && first + V <= length) {
        store_global(to, aligned && lead == 0 ? *reinterpret_cast<const Chunk*>(run) : gather(run));
        return;
    }
    for (int k = 0; k < V; ++k)
        if (first + k >= 0 && first + k < length) to[k] = run[k];
}

// Pieces that a run of `length` values may touch, wherever it starts.
template <typename T>
GRANVIT_HOST_DEVICE inline int run_slots(int length) {
    constexpr int V = 16 / sizeof(T);
    return (length + 2 * V - 2) / V;
}

}  // namespace granvit

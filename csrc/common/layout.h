// What a layout promises and a caller of the raw operators can break: then a kernel would touch memory past a tensor's end.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace granvit {

// Throws std::invalid_argument, in Python a ValueError, where an image's tokens are not its grid's, or where a packed
// tensor has not the layout's number of tokens.
inline void check_layout(const char* name, int64_t rows, const int32_t* grids, const int32_t* cu_seqlens, int64_t images) {
    int64_t tokens = 0;
    for (int64_t image = 0; image < images; ++image) {
        const int64_t height = grids[2 * image], width = grids[2 * image + 1];
        const int64_t begin = tokens;
        if (height >= 1 && width >= 1) tokens += height * width;
        if (begin != cu_seqlens[image] || tokens != cu_seqlens[image + 1] || tokens == begin)
            throw std::invalid_argument(
                "the layout's image " + std::to_string(image) + " has a grid of " + std::to_string(height) + " x " +
                std::to_string(width) + " and the tokens from " + std::to_string(cu_seqlens[image]) + " to " +
                std::to_string(cu_seqlens[image + 1]) + "; it takes height * width of them, from " + std::to_string(begin));
    }
    if (rows == tokens) return;
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(rows) + " rows; it takes " +
                                std::to_string(tokens) + ", the layout's tokens");
}

}  // namespace granvit

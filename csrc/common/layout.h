// The packed layout's one promise that a caller of the raw operators can break, and that would read past a tensor's end.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace granvit {

// Throws std::invalid_argument, in Python a ValueError, where a packed tensor has not the layout's number of tokens.
inline void check_tokens(const char* name, int64_t rows, const int32_t* cu_seqlens, int64_t images) {
    const int64_t tokens = cu_seqlens[images];
    if (rows == tokens) return;
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(rows) + " rows; it takes " +
                                std::to_string(tokens) + ", the layout's tokens");
}

}  // namespace granvit

// Transposes of 32-bit elements, block by block in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace cnm::CNM_ISA {

// Y = X^T for X of `rows` rows and `columns` columns: read(row, column, count) gives up to W elements of a row of X,
// write(column, row, v, count) takes up to W elements of a row of Y.
template <class Read, class Write>
inline void transpose_blocks(int64_t rows, int64_t columns, const Read& read, const Write& write) {
    for (int64_t row = 0; row < rows; row += W) {
        const int height = static_cast<int>(std::min<int64_t>(W, rows - row));
        for (int64_t column = 0; column < columns; column += W) {
            const int width = static_cast<int>(std::min<int64_t>(W, columns - column));
            Vec block[W];
            if (height == W && width == W) {  // constants, so that all stays in registers
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) block[i] = read(row + i, column, W);
                transpose(block);
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) write(column + i, row, block[i], W);
                continue;
            }
            for (int i = 0; i < W; ++i) block[i] = i < height ? read(row + i, column, width) : set1(0);
            transpose(block);
            for (int i = 0; i < width; ++i) write(column + i, row, block[i], height);
        }
    }
}

}  // namespace cnm::CNM_ISA

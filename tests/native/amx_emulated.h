// The AMX instructions that csrc/cpu/gemm_amx.h uses, in plain C++, so that its path runs on machines without them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Tile {
    int rows = 0, bytes = 0;
    unsigned char data[16][64];
};

inline Tile tiles[8];
inline bool configured = false;

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX fault: %s\n", what);
    std::exit(1);
}

inline Tile& tile(int index) {
    require(configured && tiles[index].rows > 0 && tiles[index].bytes > 0, "a tile that is not configured");
    return tiles[index];
}

inline void load_config(const void* from) {
    const auto* bytes = static_cast<const unsigned char*>(from);
    require(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0");
    for (int i = 0; i < 8; ++i) {
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * i, 2);
        require(width <= 64 && bytes[48 + i] <= 16, "a tile is 16 rows of 64 bytes at most");
        require((width == 0) == (bytes[48 + i] == 0), "rows without columns or the reverse");
        tiles[i].bytes = width;
        tiles[i].rows = bytes[48 + i];
        std::memset(tiles[i].data, 0, sizeof tiles[i].data);
    }
    configured = true;
}

inline void release() { configured = false; }
inline void zero(int index) { std::memset(tile(index).data, 0, sizeof tiles[index].data); }

inline void load(int index, const void* from, size_t stride) {
    Tile& t = tile(index);
    std::memset(t.data, 0, sizeof t.data);
    for (int row = 0; row < t.rows; ++row) {
        std::memcpy(t.data[row], static_cast<const char*>(from) + static_cast<size_t>(row) * stride, t.bytes);
    }
}

inline void store(int index, void* to, size_t stride) {
    const Tile& t = tile(index);
    for (int row = 0; row < t.rows; ++row) {
        std::memcpy(static_cast<char*>(to) + static_cast<size_t>(row) * stride, t.data[row], t.bytes);
    }
}

inline float half_of(const unsigned char* pair, int which) {
    uint16_t bits;
    std::memcpy(&bits, pair + 2 * which, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline void dot_product(int c_index, int a_index, int b_index) {
    Tile &c = tile(c_index), &a = tile(a_index), &b = tile(b_index);
    require(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows, "tiles that do not fit together");
    for (int m = 0; m < c.rows; ++m) {
        for (int n = 0; n < c.bytes / 4; ++n) {
            float sum;
            std::memcpy(&sum, c.data[m] + 4 * n, 4);
            for (int k = 0; k < a.bytes / 4; ++k) {
                for (int which = 0; which < 2; ++which) {
                    sum += half_of(a.data[m] + 4 * k, which) * half_of(b.data[k] + 4 * n, which);
                }
            }
            std::memcpy(c.data[m] + 4 * n, &sum, 4);
        }
    }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) amx_emulated::load_config(from)
#define _tile_release() amx_emulated::release()
#define _tile_zero(t) amx_emulated::zero(t)
#define _tile_loadd(t, from, stride) amx_emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulated::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulated::dot_product(c, a, b)

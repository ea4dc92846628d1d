// The product of linear_nll on wgmma: two groups of four warps, 64 rows each, and four tiles of keys in flight.
#pragma once

#include "groups.cuh"
#include "linear_nll.cuh"

namespace cnm::cuda {

// What host and kernel agree on. Rows of up to 256 aligned 16-bit numbers.
struct GroupTiles {
    static constexpr int COLUMNS = 256, KEYS = 64, STAGES = 4, WARPS = 2 * GROUP_WARPS, ROWS = 2 * GROUP_ROWS;
    static constexpr int64_t BLOCKS = 132, MAX_PARTS = 16;  // a block has a processor to itself: one wave

    static constexpr size_t bytes() {
        return PATTERN_BYTES + Swizzled<ROWS>::bytes(COLUMNS) + STAGES * Swizzled<KEYS>::bytes(COLUMNS);
    }
};

#if defined(CNM_GROUPS)

// As Products. While a tile's products are used, those of the next tile and the weighted sum of the tile before are
// computed.
template <class T>
struct GroupProducts : GroupTiles {
    static constexpr int N = KEYS / 8, own_chunk = 0;

    int columns;
    char *rows, *keys;
    char* rest;  // unused shared memory

    __device__ GroupProducts(int64_t columns, int /*stages*/, bool /*aligned*/) : columns(static_cast<int>(columns)) {
        char* const shared = dynamic_shared<char>();
        rows = shared + (PATTERN_BYTES - shared_address(shared) % PATTERN_BYTES) % PATTERN_BYTES;
        keys = rows + Swizzled<ROWS>::bytes(COLUMNS);
        rest = keys + STAGES * Swizzled<KEYS>::bytes(COLUMNS);
    }

    template <class IndexOf>
    __device__ void copy_keys(int tile, const T* from, IndexOf index_of) const {
        copy_swizzled<KEYS>(keys + tile % STAGES * Swizzled<KEYS>::bytes(COLUMNS), from, columns,
                            [&](int r) { return index_of(tile, r); });
    }

    __device__ void start_products(float (&z)[N][4], uint32_t own, uint32_t tile) const {
        settle(own);  // or sixteen sums would be kept from tile to tile, in registers that are not there
        fence_group();
        multiply_group<T, false>(z, whole(own), whole(tile));
#pragma unroll
        for (int k = 16; k < COLUMNS; k += 16) {
            multiply_group<T, true>(z, whole(own + Swizzled<ROWS>::along(k)), whole(tile + Swizzled<KEYS>::along(k)));
        }
        commit_group();
    }

    // As Products::walk with `weighted`.
    template <class RowIndex, class KeyIndex, class Fetch, class Keep, class Use, class Rescale>
    __device__ void walk(int tiles, const void* rows_from, RowIndex row_index, const void* keys_from,
                         KeyIndex key_index, Fetch fetch, Keep keep, Use use, bool /*weighted*/, Rescale rescale,
                         float (&out)[COLUMNS / 8][4]) const {
        const T* const from = static_cast<const T*>(keys_from);
        copy_swizzled<ROWS>(rows, static_cast<const T*>(rows_from), columns, row_index);
        for (int tile = 0; tile < 2; ++tile) {
            if (tile < tiles) {
                copy_keys(tile, from, key_index);
                keep(fetch(tile), tile);
            }
            commit_async();
        }
        const uint32_t own = Swizzled<ROWS>::rows(shared_address(rows), warp() / GROUP_WARPS * GROUP_ROWS);
        const auto address = [&](int tile) {
            return shared_address(keys) + static_cast<uint32_t>(tile % STAGES * Swizzled<KEYS>::bytes(COLUMNS));
        };
        float next[N][4];
        uint32_t weights[KEYS / 16][4] = {};
        wait_async<1>();
        fence_async_proxy();
        sync_block();
        start_products(next, own, Swizzled<KEYS>::rows(address(0), 0));
        wait_group<0>();
        settle(next);
        const auto step = [&](int tile, auto more) {
            constexpr bool MORE = decltype(more)::value;  // whether there is another tile
            float z[N][4];
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) z[n][i] = next[n][i];
            }
            settle(z);
            const bool later = MORE && tile + 2 < tiles;
            if constexpr (MORE) {
                wait_async<0>();
                fence_async_proxy();
                sync_block();  // tile + 1 has arrived, and nobody reads tile - 2 any more
                if (later) copy_keys(tile + 2, from, key_index);
                commit_async();
            }
            if constexpr (MORE) start_products(next, own, Swizzled<KEYS>::rows(address(tile + 1), 0));
            const auto changed = use(tile, tile % STAGES, z);
            wait_group<0>();  // the sum of the tile before reads `weights` until it is done
            settle(out);
            settle(weights);
            if constexpr (MORE) settle(next);
            if constexpr (!std::is_same_v<decltype(changed), const std::false_type>) {
                if (any_lane(changed)) rescale();
            }
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                RowsOperand<T> narrowed;
                narrow(narrowed, z[2 * k], z[2 * k + 1]);
#pragma unroll
                for (int i = 0; i < 4; ++i) weights[k][i] = narrowed.r[i];
            }
            settle(out);
            settle(weights);
            fence_group();
            const uint32_t values = Swizzled<KEYS>::columns(address(tile));
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                multiply_group<T>(out, weights[k], whole(values + Swizzled<KEYS>::across(16 * k)));
            }
            commit_group();
            if (later) keep(fetch(tile + 2), (tile + 2) % STAGES);  // the wait for memory is the sum's time
        };
        for (int tile = 0; tile + 1 < tiles; ++tile) step(tile, std::true_type());
        step(tiles - 1, std::false_type());
        wait_group<0>();
        settle(out);
        settle(weights);
    }
};

#endif

// Whether the kernel was compiled with its products: what was not is empty, while accumulators alone take 160.
template <class... Params>
bool has_groups(void (*kernel)(Params...)) {
#if defined(CNM_EMULATED)
    return kernel != nullptr && emulator::machine().has_groups;
#else
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "a kernel is not known");
    return attributes.numRegs >= 160;
#endif
}

// The kernel with groups, made by of(std::true_type), where it can run; else null.
template <class T, int D, class Of>
auto kernel_of_groups(int64_t columns, bool aligned, Of of) -> decltype(of(std::false_type())) {
    if constexpr (sizeof(T) == 2 && D == GroupTiles::COLUMNS) {
        const auto kernel = of(std::true_type());
        if (aligned && columns <= D && has_groups(kernel)) return kernel;
    }
    return nullptr;
}

// Launch settings of a kernel that loops over keys: as many warps and stages as shared memory allows. rest_per_row and
// rest_per_key: bytes next to the tiles.
struct Plan {
    int warps, stages, keys;
    size_t bytes;
    int64_t blocks, most_parts;  // that the keys are divided into

    int64_t parts(int64_t tiles, int64_t most) const {
        return std::max<int64_t>(1, std::min({blocks / std::max<int64_t>(tiles, 1), most_parts, most}));
    }
};
template <class T, int D>
Plan plan(int most_warps, bool groups, int64_t columns, size_t rest_per_row, size_t rest_per_key) {
    if (groups) {
        constexpr size_t KEYS = GroupTiles::STAGES * GroupTiles::KEYS;
        return {GroupTiles::WARPS,  GroupTiles::STAGES,
                GroupTiles::KEYS,   GroupTiles::bytes() + rest_per_row * GroupTiles::ROWS + rest_per_key * KEYS,
                GroupTiles::BLOCKS, GroupTiles::MAX_PARTS};
    }
    const size_t limit = static_cast<size_t>(most_shared_bytes());
    Plan found{};
    for (const auto& [warps, stages] :
         {std::pair{MAX_WARPS, 2}, {MAX_WARPS, 1}, {MAX_WARPS / 2, 2}, {MAX_WARPS / 2, 1}}) {
        const size_t tiles = Products<T, D, false>::bytes(warps, columns, stages);
        found = {warps,      stages,
                 KEYS<T, D>, tiles + rest_per_row * static_cast<size_t>(warps * 16) + rest_per_key * KEYS<T, D>,
                 BLOCKS,     MAX_PARTS};
        if (warps <= most_warps && found.bytes <= limit) return found;
    }
    return found;  // too large: the launch reports the error
}

// GroupProducts where `GROUPS`, else Products: a type that need not be complete where it is not used.
template <class T>
struct GroupProducts;
template <class T, int D, bool KEYS_FIRST, bool GROUPS>
using ProductsOf = std::conditional_t<GROUPS, GroupProducts<T>, Products<T, D, KEYS_FIRST>>;
template <bool GROUPS>
#if defined(CNM_GROUPS)
constexpr bool COMPILED = true;
#else
constexpr bool COMPILED = !GROUPS;
#endif

}  // namespace cnm::cuda

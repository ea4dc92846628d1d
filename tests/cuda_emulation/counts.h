// A launch's use of a GPU, counted while the emulator runs some of its blocks.
//
// Products, ldmatrix and shuffles are counted once a warp. What lanes do by themselves (loads, stores, copies,
// exponentials) counts as often for a warp as for its busiest lane. Shared memory has 32 banks of four bytes: sixteen
// bytes a lane go eight lanes at a time, and lanes that want different words of a bank wait for each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace emulator {

constexpr int64_t SECTOR = 32;  // bytes that global memory moves at least
constexpr size_t LITTLE_SHARED =
    8 << 10;  // kernels with more are sampled; others may be read by later kernels' control flow
constexpr unsigned FEW_BLOCKS = 2000, SAMPLED_X = 3, SAMPLED_Y = 4;

constexpr int64_t NOWHERE = -1;  // a lane that takes no part

// Passes that sixteen bytes for each lane take.
inline int64_t wavefronts(const std::vector<int64_t>& offsets) {
    int64_t passes = 0;
    for (size_t first = 0; first < offsets.size(); first += 8) {
        std::unordered_set<int64_t> words[32];
        size_t most = 0;
        for (size_t lane = first; lane < std::min(first + 8, offsets.size()); ++lane) {
            if (offsets[lane] == NOWHERE) continue;
            for (int64_t word = offsets[lane] / 4; word < offsets[lane] / 4 + 4; ++word) {
                auto& bank = words[word % 32];
                bank.insert(word);
                most = std::max(most, bank.size());
            }
        }
        passes += static_cast<int64_t>(most);
    }
    return passes;
}

struct LaneCounts {
    int64_t loads = 0, stores = 0, copies = 0, exponentials = 0, shuffles = 0, barriers = 0;
};

struct LaunchCounts {
    const void* kernel;
    unsigned grid[3];
    std::vector<std::string> arguments;  // as they lie in memory
    std::vector<uint64_t> pointers;      // words of them that point into global memory
    int threads;
    size_t shared_bytes;
    int64_t blocks, memory;  // memory: bytes of all tensors that the launch knows
    int64_t blocks_run = 0, products = 0, tf32_products = 0, matrix_loads = 0, matrix_wavefronts = 0;
    int64_t copy_wavefronts = 0, bytes = 0, block_sectors = 0;
    int64_t group_products = 0, group_columns = 0, group_bytes = 0;  // of wgmma, once for each of a group's warps
    LaneCounts warps;  // summed over warps
    std::unordered_set<int64_t> sectors, of_block;
    std::map<std::pair<int, int64_t>, std::vector<int64_t>> copies;  // of a warp's n-th cp.async: where to

    template <class Index>
    LaunchCounts(const void* kernel, Index grid, std::vector<std::string> arguments, int threads, size_t shared_bytes,
                 int64_t memory)
        : kernel(kernel),
          grid{grid.x, grid.y, grid.z},
          arguments(std::move(arguments)),
          threads(threads),
          shared_bytes(shared_bytes),
          blocks(int64_t{grid.x} * grid.y * grid.z),
          memory(memory) {}

    void touch(const void* address, size_t size) {
        bytes += static_cast<int64_t>(size);
        const auto first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
        for (int64_t s = first / SECTOR; s <= (first + static_cast<int64_t>(size) - 1) / SECTOR; ++s)
            of_block.insert(s);
    }
    void copy_to(int thread, int64_t number, int64_t offset) {
        auto& lanes = copies[{thread / 32, number}];
        lanes.resize(32, NOWHERE);
        lanes[static_cast<size_t>(thread % 32)] = offset;
    }

    void end_block(const std::vector<LaneCounts*>& lanes) {
        ++blocks_run;
        for (size_t first = 0; first < lanes.size(); first += 32) {
            for (const auto count : {&LaneCounts::loads, &LaneCounts::stores, &LaneCounts::copies,
                                     &LaneCounts::exponentials, &LaneCounts::shuffles, &LaneCounts::barriers}) {
                int64_t most = 0;
                for (size_t i = first; i < std::min(first + 32, lanes.size()); ++i)
                    most = std::max(most, lanes[i]->*count);
                warps.*count += most;
            }
        }
        for (const auto& copy : copies) copy_wavefronts += wavefronts(copy.second);
        copies.clear();
        block_sectors += static_cast<int64_t>(of_block.size());
        sectors.insert(of_block.begin(), of_block.end());
        of_block.clear();
    }

    // In the order of tools/gpu_model.py's Counts.
    void numbers(double* out) const {
        const int64_t all[] = {threads,
                               static_cast<int64_t>(shared_bytes),
                               blocks,
                               memory,
                               blocks_run,
                               products,
                               tf32_products,
                               matrix_loads,
                               matrix_wavefronts,
                               copy_wavefronts,
                               group_products,
                               group_columns,
                               group_bytes,
                               bytes,
                               block_sectors * SECTOR,
                               static_cast<int64_t>(sectors.size()) * SECTOR,
                               warps.loads,
                               warps.stores,
                               warps.copies,
                               warps.exponentials,
                               warps.shuffles,
                               warps.barriers};
        std::transform(std::begin(all), std::end(all), out, [](int64_t n) { return static_cast<double>(n); });
    }
};

struct Ledger {
    bool on = false;
    std::vector<LaunchCounts> launches;

    // Evenly spaced places along x and y, all along z.
    static std::vector<unsigned> places(unsigned size, unsigned most) {
        std::vector<unsigned> found;
        for (unsigned i = 0; i < std::min(size, most); ++i) {
            found.push_back(size <= most ? i : static_cast<unsigned>((uint64_t{i} * 2 + 1) * size / (2 * most)));
        }
        return found;
    }
    template <class Index>
    static std::vector<uint32_t> sample(Index grid, size_t shared_bytes) {
        const bool whole = shared_bytes <= LITTLE_SHARED && grid.x * grid.y * grid.z <= FEW_BLOCKS;
        std::vector<uint32_t> blocks;
        for (unsigned z = 0; z < grid.z; ++z) {
            for (const unsigned y : places(grid.y, whole ? grid.y : SAMPLED_Y)) {
                for (const unsigned x : places(grid.x, whole ? grid.x : SAMPLED_X)) {
                    blocks.push_back((z * grid.y + y) * grid.x + x);
                }
            }
        }
        return blocks;
    }
};

}  // namespace emulator

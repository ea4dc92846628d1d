// GPUs in miniature: runs the kernels of csrc/cuda, compiled as C++, on one CPU thread.
//
// Every thread of a block is a fiber, and the order in which fibers run is drawn at random, in bursts that let one warp
// get far ahead of the others: between two barriers any interleaving may happen, as on the real thing, so that a
// barrier left out shows in the results. Warp instructions wait for their 32 lanes and check that all of them came to
// the same instruction. An asynchronous copy lands at once or when it is waited for, as the dice fall. Shared memory is
// poisoned with NaNs before each block and ends in a guard; global memory is what the binding made known, and any other
// access is an error.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "counts.h"

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t GUARD_BYTES = 1 << 10;   // behind a block's shared memory
constexpr uint32_t LONGEST_BURST = 4096;  // steps of one warp before another is preferred
constexpr unsigned char POISON = 0xFF;    // a NaN in every floating type

struct Index {
    unsigned x = 1, y = 1, z = 1;
};

// ------------------------------------------------------------------------------------------------ global memory

struct Memory {
    const char *begin, *end;
};
inline std::vector<Memory> known;

inline void forget_memory() { known.clear(); }
inline void know_memory(const void* data, int64_t bytes) {
    known.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
}
inline void poison(void* data, int64_t bytes) { std::memset(data, POISON, static_cast<size_t>(bytes)); }

inline void note_global(const void* address, size_t bytes, const char* what);

inline void check_global(const void* address, size_t bytes, const char* what) {
    note_global(address, bytes, what);
    const char* const first = static_cast<const char*>(address);
    for (const Memory& memory : known) {
        if (first >= memory.begin && first + bytes <= memory.end) {
            if (reinterpret_cast<uintptr_t>(first) % bytes == 0) return;
            throw std::runtime_error(std::string("misaligned global ") + what + " of " + std::to_string(bytes) +
                                     " bytes");
        }
    }
    throw std::runtime_error(std::string("out-of-bounds global ") + what + " of " + std::to_string(bytes) + " bytes");
}

// ------------------------------------------------------------------------------------------------ fibers

struct Copy {  // asynchronous: what will land where
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    bool landed = false;
};

// Sixteen bytes of shared memory, as wgmma sees what cp.async wrote there.
enum class PieceState { UNKNOWN, ARRIVED, FENCED, VISIBLE };
struct Piece {
    PieceState state = PieceState::UNKNOWN;
    int reading = 0;                // products in flight
    int64_t readers_wait[8] = {0};  // of each group: the barrier behind which others may write
};

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    bool begun = false, finished = true, waiting = false;
    int index = 0;  // in the block
    Index thread;
    std::vector<std::vector<Copy>> copies;  // committed groups, oldest first; the last is still open
    std::vector<size_t> arrived_pieces, fenced_pieces;  // of shared memory, that this thread copied
    LaneCounts counts;
};

struct Warp {
    int arrived = 0;
    const char* instruction = nullptr;
    const void* in[WARP];
    void* out[WARP];
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<std::vector<int>> runnable;  // of each warp
    int runnable_count = 0;
    std::vector<char> shared;
    std::vector<Piece> pieces;
    int64_t barriers_passed = 0;
    std::function<void()> block_starts = [] {};
    std::function<std::string()> block_ends = [] { return std::string(); };
    std::vector<std::pair<char*, size_t>> static_shared;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    std::function<void()> kernel;
    Index block, grid, threads;
    size_t shared_bytes = 0, most_shared_bytes = 227 << 10;
    bool has_groups = true;  // wgmma, as GPUs of 9.0 have
    int count = 0, at_barrier = 0;
    uint64_t random = 1;
    std::string error;
    int64_t blocks_run = 0;
    Ledger ledger;

    uint32_t draw(uint32_t below) {  // splitmix64
        uint64_t z = random += 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * below >> 32);
    }
};

inline Machine& machine() {
    static Machine the;
    return the;
}

// The launch being counted, or null.
inline LaunchCounts* counting() {
    Ledger& ledger = machine().ledger;
    return ledger.on && !ledger.launches.empty() ? &ledger.launches.back() : nullptr;
}

inline void note_global(const void* address, size_t bytes, const char* what) {
    LaunchCounts* const counts = counting();
    if (counts == nullptr) return;
    LaneCounts& lane = machine().current->counts;
    (what[0] == 'r' ? lane.loads : what[0] == 'w' ? lane.stores : lane.copies) += 1;
    counts->touch(address, bytes);
}

inline void note_exponential() {
    if (counting() != nullptr) ++machine().current->counts.exponentials;
}

inline void set_seed(uint64_t seed) { machine().random = seed; }

// Back to the scheduler, which comes back here some time.
inline void pause() {
    Fiber* const self = machine().current;
    if (_setjmp(self->here) == 0) _longjmp(machine().scheduler, 1);
}

inline void wait() {
    machine().current->waiting = true;
    pause();
}

inline void wake(int fiber) {
    machine().fibers[static_cast<size_t>(fiber)]->waiting = false;
    machine().runnable[static_cast<size_t>(fiber / WARP)].push_back(fiber);
    ++machine().runnable_count;
}

inline void fiber_main() {
    for (;;) {
        try {
            machine().kernel();
        } catch (const std::exception& error) {
            if (machine().error.empty()) {
                const Index t = machine().current->thread, b = machine().block;
                machine().error = std::string(error.what()) + " in thread " + std::to_string(t.x) + " of block (" +
                                  std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
            }
        }
        machine().current->finished = true;
        pause();
    }
}

inline Fiber& fiber(int index) {
    Machine& m = machine();
    while (static_cast<int>(m.fibers.size()) <= index) {
        auto made = std::make_unique<Fiber>();
        getcontext(&made->start);
        made->start.uc_stack.ss_sp =
            mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        made->start.uc_stack.ss_size = STACK_BYTES;
        made->start.uc_link = nullptr;
        made->index = static_cast<int>(m.fibers.size());
        makecontext(&made->start, fiber_main, 0);
        m.fibers.push_back(std::move(made));
    }
    return *m.fibers[static_cast<size_t>(index)];
}

inline void run_block() {
    Machine& m = machine();
    std::memset(m.shared.data(), POISON, m.shared.size());
    for (auto [data, bytes] : m.static_shared) std::memset(data, POISON, bytes);
    m.pieces.assign(m.shared.size() / 16 + 1, Piece{});
    m.barriers_passed = 0;
    m.block_starts();
    m.at_barrier = 0;
    m.warps.assign(static_cast<size_t>((m.count + WARP - 1) / WARP), Warp{});
    m.runnable.assign(m.warps.size(), {});
    m.runnable_count = 0;
    for (int i = 0; i < m.count; ++i) {
        Fiber& f = fiber(i);
        f.finished = f.waiting = false;
        const unsigned x = static_cast<unsigned>(i);
        f.thread = {x % m.threads.x, x / m.threads.x % m.threads.y, x / m.threads.x / m.threads.y};
        f.copies.assign(1, {});
        f.arrived_pieces.clear();
        f.fenced_pieces.clear();
        f.counts = {};
        wake(i);
    }
    volatile int left = m.count;
    volatile size_t favourite = 0;
    volatile uint32_t burst = 0;
    while (left > 0) {
        if (m.runnable_count == 0) {
            m.error = "deadlock: threads wait for others that have ended or wait elsewhere";
            break;
        }
        if (burst == 0) {
            favourite = m.draw(static_cast<uint32_t>(m.warps.size()));
            burst = 1 + m.draw(LONGEST_BURST);
        }
        burst = burst - 1;
        size_t warp = favourite;
        while (m.runnable[warp].empty()) warp = m.draw(static_cast<uint32_t>(m.warps.size()));
        const auto& ready = m.runnable[warp];
        Fiber& next = fiber(ready[m.draw(static_cast<uint32_t>(ready.size()))]);
        m.current = &next;
        if (_setjmp(m.scheduler) == 0) {
            if (!next.begun) {
                next.begun = true;
                setcontext(&next.start);
            }
            _longjmp(next.here, 1);
        }
        Fiber& ran = *m.current;  // locals may be stale after the jump
        if (!m.error.empty()) break;
        if (ran.finished) left = left - 1;
        if (ran.finished || ran.waiting) {
            auto& list = m.runnable[static_cast<size_t>(ran.index / WARP)];
            const auto place = std::find(list.begin(), list.end(), ran.index);
            *place = list.back();
            list.pop_back();
            --m.runnable_count;
        }
    }
    m.current = nullptr;
    if (!m.error.empty()) {
        m.fibers.clear();  // their stacks are in the middle of something
        return;
    }
    for (size_t i = m.shared_bytes; i < m.shared.size(); ++i) {
        if (static_cast<unsigned char>(m.shared[i]) != POISON) m.error = "a write behind the block's shared memory";
    }
    if (m.error.empty()) m.error = m.block_ends();
    ++m.blocks_run;
    if (LaunchCounts* const counts = counting()) {
        std::vector<LaneCounts*> lanes;
        for (int i = 0; i < m.count; ++i) lanes.push_back(&fiber(i).counts);
        counts->end_block(lanes);
    }
}

template <class... T>
std::vector<std::string> bytes_of(const std::tuple<T...>& values) {
    return std::apply(
        [](const auto&... value) {
            return std::vector<std::string>{std::string(reinterpret_cast<const char*>(&value), sizeof(value))...};
        },
        values);
}

// The words of the arguments that are addresses in what is known.
inline std::vector<uint64_t> pointers_among(const std::vector<std::string>& arguments) {
    std::vector<uint64_t> found;
    for (const std::string& argument : arguments) {
        for (size_t at = 0; at + sizeof(uint64_t) <= argument.size(); at += sizeof(uint64_t)) {
            uint64_t word;
            std::memcpy(&word, argument.data() + at, sizeof(word));
            const auto holds = [&](const Memory& one) {
                return reinterpret_cast<uintptr_t>(one.begin) <= word && word < reinterpret_cast<uintptr_t>(one.end);
            };
            if (std::any_of(known.begin(), known.end(), holds)) found.push_back(word);
        }
    }
    return found;
}

inline void launch(const void* address, Index grid, Index threads, size_t shared_bytes, std::function<void()> kernel,
                   std::vector<std::string> arguments = {}) {
    Machine& m = machine();
    if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("a grid's y and z go up to 65535");
    if (shared_bytes > m.most_shared_bytes) throw std::runtime_error("more shared memory than a block can have");
    m.count = static_cast<int>(threads.x * threads.y * threads.z);
    if (m.count == 0 || m.count > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
    m.grid = grid;
    m.threads = threads;
    m.kernel = std::move(kernel);
    m.shared_bytes = shared_bytes;
    m.shared.resize(shared_bytes + GUARD_BYTES);
    m.error.clear();
    std::vector<uint32_t> blocks(size_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (m.ledger.on) {
        blocks = m.ledger.sample(grid, shared_bytes);
        int64_t memory = 0;
        for (const Memory& one : known) memory += one.end - one.begin;
        m.ledger.launches.emplace_back(address, grid, std::move(arguments), m.count, shared_bytes, memory);
        LaunchCounts& added = m.ledger.launches.back();
        added.pointers = pointers_among(added.arguments);
    }
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[m.draw(static_cast<uint32_t>(i))]);
    for (const uint32_t block : blocks) {
        m.block = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block();
        if (!m.error.empty()) throw std::runtime_error(m.error);
    }
}

// ------------------------------------------------------------------------------------------------ instructions

inline void sync_block() {
    Machine& m = machine();
    if (counting() != nullptr) ++m.current->counts.barriers;
    if (++m.at_barrier == m.count) {
        m.at_barrier = 0;
        ++m.barriers_passed;
        for (int i = 0; i < m.count; ++i) {
            for (const size_t piece : fiber(i).fenced_pieces) {
                if (m.pieces[piece].state == PieceState::FENCED) m.pieces[piece].state = PieceState::VISIBLE;
            }
            fiber(i).fenced_pieces.clear();
            if (i != m.current->index) wake(i);
        }
        pause();
    } else {
        wait();
    }
}

// Waits for the lanes of the warp; the last to come computes what all of them get.
template <class In, class Out, class Compute>
Out warp_instruction(const char* name, const In& in, Compute compute) {
    Machine& m = machine();
    const int index = m.current->index, first = index / WARP * WARP;
    const int lanes = std::min(WARP, m.count - first);
    Warp& warp = m.warps[static_cast<size_t>(index / WARP)];
    if (warp.arrived > 0 && std::strcmp(warp.instruction, name) != 0) {
        throw std::runtime_error(std::string("a warp diverges: lanes at ") + warp.instruction + " and at " + name);
    }
    Out out{};
    warp.instruction = name;
    warp.in[index - first] = &in;
    warp.out[index - first] = &out;
    if (++warp.arrived == lanes) {
        warp.arrived = 0;
        const In* ins[WARP];
        Out* outs[WARP];
        for (int lane = 0; lane < WARP; ++lane) {
            ins[lane] = static_cast<const In*>(warp.in[std::min(lane, lanes - 1)]);
            outs[lane] = static_cast<Out*>(warp.out[std::min(lane, lanes - 1)]);
        }
        compute(ins, outs);
        for (int lane = 0; lane < lanes; ++lane) {
            if (first + lane != index) wake(first + lane);
        }
        pause();
    } else {
        wait();
    }
    return out;
}

inline void sync_warp() {
    warp_instruction<int, int>("__syncwarp", 0, [](const int**, int**) {});
}

inline float shuffle_xor(float value, int mask) {
    if (counting() != nullptr) ++machine().current->counts.shuffles;
    return warp_instruction<float, float>("__shfl_xor_sync", value, [mask](const float** in, float** out) {
        for (int lane = 0; lane < WARP; ++lane) *out[lane] = *in[lane ^ mask];
    });
}

inline bool any_lane(bool value) {
    return warp_instruction<bool, bool>("__any_sync", value, [](const bool** in, bool** out) {
        const bool any = std::any_of(in, in + WARP, [](const bool* one) { return *one; });
        for (int lane = 0; lane < WARP; ++lane) *out[lane] = any;
    });
}

inline void check_shared(const void* address, size_t bytes, const char* what) {
    Machine& m = machine();
    const char* const first = static_cast<const char*>(address);
    const bool inside = first >= m.shared.data() && first + bytes <= m.shared.data() + m.shared_bytes;
    if (!inside) throw std::runtime_error(std::string("out-of-bounds shared ") + what);
    if (reinterpret_cast<uintptr_t>(first) % bytes != 0) {
        throw std::runtime_error(std::string("misaligned shared ") + what);
    }
}

inline size_t piece_of(const void* shared) {
    return static_cast<size_t>(static_cast<const char*>(shared) - machine().shared.data()) / 16;
}

inline void land(const Copy& copy) {
    if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
}

inline void copy_async(void* to, const void* from, bool inside, size_t bytes) {
    check_shared(to, bytes, "cp.async");
    if (inside) check_global(from, bytes, "cp.async");
    if (counting() != nullptr) {
        Fiber& self = *machine().current;
        self.counts.copies += inside ? 0 : 1;  // the others were noted above
        counting()->copy_to(self.index, self.counts.copies, static_cast<const char*>(to) - machine().shared.data());
    }
    Machine& m = machine();
    Piece& piece = m.pieces[piece_of(to)];
    if (piece.reading > 0) throw std::runtime_error("cp.async over what wgmma still reads");
    const int own_group = m.current->index / (4 * WARP);
    for (int group = 0; group < 8; ++group) {
        if (group != own_group && m.barriers_passed < piece.readers_wait[group]) {
            throw std::runtime_error("cp.async over what wgmma of another group may still read: no barrier since");
        }
    }
    piece.state = PieceState::UNKNOWN;
    Copy copy{to, inside ? from : nullptr, bytes};
    if (m.draw(2) == 0) {
        land(copy);
        copy.landed = true;
    }
    m.current->copies.back().push_back(copy);
}
inline void commit_async() { machine().current->copies.emplace_back(); }
inline void wait_async(size_t pending) {
    auto& groups = machine().current->copies;
    while (groups.size() > pending + 1) {  // the open one is not committed
        for (const Copy& copy : groups.front()) {
            if (!copy.landed) land(copy);
            machine().pieces[piece_of(copy.to)].state = PieceState::ARRIVED;
            machine().current->arrived_pieces.push_back(piece_of(copy.to));
        }
        groups.erase(groups.begin());
    }
}

struct Words4 {
    uint32_t word[4];
};

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8; lane l gets of each matrix the pair at row l / 4, columns
// 2 (l % 4), or of its transpose.
inline Words4 load_matrix(const void* row, bool transposed) {
    check_shared(row, 16, "ldmatrix");
    return warp_instruction<const void*, Words4>(
        transposed ? "ldmatrix.trans" : "ldmatrix", row, [transposed](const void* const** rows, Words4** out) {
            if (LaunchCounts* const counts = counting()) {
                std::vector<int64_t> offsets;
                for (int lane = 0; lane < WARP; ++lane) {
                    offsets.push_back(static_cast<const char*>(*rows[lane]) - machine().shared.data());
                }
                counts->matrix_loads += 1;
                counts->matrix_wavefronts += wavefronts(offsets);
            }
            for (int lane = 0; lane < WARP; ++lane) {
                for (int matrix = 0; matrix < 4; ++matrix) {
                    uint16_t pair[2];
                    for (int i = 0; i < 2; ++i) {
                        const int r = transposed ? 2 * (lane % 4) + i : lane / 4;
                        const int c = transposed ? lane / 4 : 2 * (lane % 4) + i;
                        std::memcpy(&pair[i], static_cast<const char*>(*rows[8 * matrix + r]) + 2 * c, 2);
                    }
                    std::memcpy(&out[lane]->word[matrix], pair, 4);
                }
            }
        });
}

template <class A, class B>
struct MmaIn {
    A a;
    B b;
    float c[4];
};
struct Floats4 {
    float value[4];
};

// mma.sync.m16n8k<K>: element(word, i) gives the i-th number of a register.
template <int K, class Element>
void multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Element element) {
    struct In {
        uint32_t a[4], b[2];
        float c[4];
    };
    In in;
    std::memcpy(in.a, a, sizeof a);
    std::memcpy(in.b, b, sizeof b);
    std::memcpy(in.c, c, sizeof c);
    constexpr int PER = K / 8;  // numbers in a register: 2 of 16 bits, 1 of tf32
    const Floats4 out = warp_instruction<In, Floats4>(name, in, [element](const In** ins, Floats4** outs) {
        if (LaunchCounts* const counts = counting()) (K == 16 ? counts->products : counts->tf32_products) += 1;
        float A[16][K], B[K][8];
        for (int lane = 0; lane < WARP; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) {
                for (int i = 0; i < PER; ++i) {
                    A[g + 8 * (r % 2)][(r / 2) * 4 * PER + t * PER + i] = element(ins[lane]->a[r], i);
                }
            }
            for (int r = 0; r < 2; ++r) {
                for (int i = 0; i < PER; ++i) B[r * 4 * PER + t * PER + i][g] = element(ins[lane]->b[r], i);
            }
        }
        for (int lane = 0; lane < WARP; ++lane) {
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
                float sum = ins[lane]->c[r];
                for (int k = 0; k < K; ++k) sum += A[row][k] * B[k][column];
                outs[lane]->value[r] = sum;
            }
        }
    });
    std::memcpy(c, out.value, sizeof c);
}

}  // namespace emulator

// wgmma on the emulator, by the PTX documentation: asynchronous products of a group of four warps.
//
// A product is carried out when it is started or when it is waited for, as the dice fall, in order; until then its
// accumulators hold NaN. Strictly:
// - shared memory that a product reads was brought by copies that were waited for, fenced by the copying threads
//   (fence.proxy.async) and then met at a barrier; nobody copies over it before the readers waited and, where the
//   copying thread is of another group, met at a barrier;
// - between a wait, or the start, and the next product lies a wgmma.fence, and another one behind products of shared
//   memory alone where rows come from registers, which were made meanwhile;
// - registers that hold a product's rows keep their numbers until it was waited for;
// - the four warps of a group issue the same products, commits and waits, and end with nothing in flight.
#pragma once

#include <array>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <tuple>

#include "emulator.h"

namespace emulator {

constexpr uint32_t SHARED_BASE = 1040;  // no multiple of the swizzle's 1024: kernels align their tiles themselves
constexpr int GROUP_WARPS = 4, GROUP_THREADS = GROUP_WARPS * WARP;

inline uint32_t shared_address(const void* shared) {
    return SHARED_BASE + static_cast<uint32_t>(static_cast<const char*>(shared) - machine().shared.data());
}

inline void fence_async_proxy() {
    Machine& m = machine();
    Fiber& self = *m.current;
    for (const size_t piece : self.arrived_pieces) {
        if (m.pieces[piece].state == PieceState::ARRIVED) m.pieces[piece].state = PieceState::FENCED;
    }
    self.fenced_pieces.insert(self.fenced_pieces.end(), self.arrived_pieces.begin(), self.arrived_pieces.end());
    self.arrived_pieces.clear();
}

// Numbers that products in flight have made, of a warp's lanes.
using Accumulators = std::vector<std::vector<float>>;

struct GroupProduct {
    int columns;
    std::vector<float*> target;  // of each lane
    std::shared_ptr<Accumulators> numbers;
    std::function<void()> compute;
    std::vector<const uint32_t*> rows;           // of each lane, its registers; empty where rows are in shared memory
    std::vector<std::array<uint32_t, 4>> given;  // what they held
    std::vector<size_t> reads;  // pieces of shared memory
    bool done = false;
};

struct GroupWarp {
    std::deque<std::vector<GroupProduct>> groups{1};  // committed, oldest first; the last is still open
    bool fenced = false, rows_fenced = false;
    size_t issued = 0;
};
using Issued = std::tuple<std::string, uint64_t, uint64_t, bool>;
struct Groups {
    std::map<int, GroupWarp> warps;
    std::map<int, std::vector<Issued>> issued;  // of each group
};
inline Groups& groups() {
    static Groups the;
    static bool hooked = false;
    if (!hooked) {
        hooked = true;
        machine().block_starts = [] { the = Groups{}; };
        machine().block_ends = []() -> std::string {
            for (auto& [number, warp] : the.warps) {
                if (warp.groups.size() > 1 || !warp.groups.back().empty()) {
                    return "a warp ends while its wgmma are in flight";
                }
                if (warp.issued != the.issued[number / GROUP_WARPS].size()) {
                    return "warps of a group started different numbers of wgmma";
                }
            }
            for (auto& [group, list] : the.issued) {
                for (int i = 0; i < GROUP_WARPS; ++i) {
                    if (the.warps[group * GROUP_WARPS + i].issued != list.size()) {
                        return "a warp took no part in its group's wgmma";
                    }
                }
            }
            return "";
        };
    }
    return the;
}
inline int warp_number() { return machine().current->index / WARP; }

// What every warp of a group does alike.
inline void issue(const Issued& what) {
    const int number = warp_number();
    GroupWarp& warp = groups().warps[number];
    auto& issued = groups().issued[number / GROUP_WARPS];
    if (warp.issued == issued.size()) {
        issued.push_back(what);
    } else if (issued[warp.issued] != what) {
        throw std::runtime_error("wgmma: warps of a group issue different ones");
    }
    ++warp.issued;
}

inline void carry_out(GroupProduct& product) {
    if (!product.done) product.compute();
    product.done = true;
}

inline void fence_group() {
    warp_instruction<int, int>("wgmma.fence", 0, [](const int**, int**) {
        GroupWarp& warp = groups().warps[warp_number()];
        warp.fenced = warp.rows_fenced = true;
    });
}
inline void commit_group() {
    warp_instruction<int, int>("wgmma.commit_group", 0, [](const int**, int**) {
        issue({"wgmma.commit_group", 0, 0, false});
        groups().warps[warp_number()].groups.emplace_back();
    });
}

inline void wait_group(size_t pending) {
    warp_instruction<int, int>("wgmma.wait_group", 0, [pending](const int**, int**) {
        issue({"wgmma.wait_group", pending, 0, false});
        GroupWarp& warp = groups().warps[warp_number()];
        warp.fenced = warp.rows_fenced = false;
        while (warp.groups.size() > pending + 1) {  // the open one is not committed
            std::vector<GroupProduct> finished = std::move(warp.groups.front());
            warp.groups.pop_front();
            for (GroupProduct& product : finished) {
                carry_out(product);
                for (size_t lane = 0; lane < product.rows.size(); ++lane) {
                    if (!std::equal(product.given[lane].begin(), product.given[lane].end(), product.rows[lane])) {
                        throw std::runtime_error("wgmma: registers of its rows were written while it was in flight");
                    }
                }
                for (const size_t piece : product.reads) {
                    --machine().pieces[piece].reading;
                    machine().pieces[piece].readers_wait[warp_number() / GROUP_WARPS % 8] =
                        machine().barriers_passed + 1;
                }
            }
            for (GroupProduct& product : finished) {
                bool goes_on = false;  // a product still in flight adds to the same numbers
                for (const auto& group : warp.groups) {
                    for (const GroupProduct& later : group) goes_on = goes_on || later.numbers == product.numbers;
                }
                if (goes_on) continue;
                for (int lane = 0; lane < WARP; ++lane) {
                    const auto& made = (*product.numbers)[static_cast<size_t>(lane)];
                    std::copy(made.begin(), made.end(), product.target[static_cast<size_t>(lane)]);
                }
            }
        }
    });
}

// A matrix in shared memory as its descriptor names it: only the 128-byte swizzle is known here.
struct Matrix {
    uint32_t start, leading, stride;

    explicit Matrix(uint64_t descriptor) {
        start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
        leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
        stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
        const uint64_t known = 0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 3ull << 62;
        if ((descriptor & ~known) != 0) throw std::runtime_error("wgmma: a descriptor with unknown bits");
        if (descriptor >> 62 != 1) throw std::runtime_error("wgmma: a descriptor without the 128-byte swizzle");
    }

    // The element `along` the direction in which memory runs and `across` it. Summed over what runs (K-major): 64
    // elements of eight rows are a pattern, `stride` leads to the next eight rows. Else (MN-major): `leading` leads to
    // the next 64 elements, `stride` to the next eight rows.
    uint32_t address(int along, int across) const {
        const uint32_t plain = start + static_cast<uint32_t>(along / 64) * leading +
                               static_cast<uint32_t>(across / 8) * stride + static_cast<uint32_t>(across % 8) * 128 +
                               static_cast<uint32_t>(along % 64) * 2;
        return plain ^ ((plain >> 7 & 7) << 4);
    }
};

// a: the lane's rows in registers, or null, where a_descriptor names them.
template <class Element>
void multiply_group(const char* name, float* c, int columns, const uint32_t* a, uint64_t a_descriptor,
                    uint64_t b_descriptor, bool b_runs_along_columns, bool accumulate, Element element) {
    struct In {
        float* c;
        const uint32_t* a;
        uint64_t a_descriptor, b_descriptor;
        bool accumulate;
    } in{c, a, a_descriptor, b_descriptor, accumulate};
    const bool from_registers = a != nullptr;
    warp_instruction<In, int>(name, in, [=](const In** ins, int**) {
        Machine& m = machine();
        const int number = warp_number();
        GroupWarp& warp = groups().warps[number];
        const Issued what{name, ins[0]->a_descriptor, ins[0]->b_descriptor, ins[0]->accumulate};
        for (int lane = 0; lane < WARP; ++lane) {
            if (Issued{name, ins[lane]->a_descriptor, ins[lane]->b_descriptor, ins[lane]->accumulate} != what) {
                throw std::runtime_error("wgmma: lanes name different matrices");
            }
        }
        issue(what);
        if (!from_registers) warp.rows_fenced = false;
        if (from_registers ? !warp.rows_fenced : !warp.fenced) {
            throw std::runtime_error("wgmma: no wgmma.fence since registers could be touched");
        }

        GroupProduct product;
        product.columns = columns;
        const auto read = [&](uint32_t address) {
            const int64_t offset = int64_t{address} - SHARED_BASE;
            if (offset < 0 || offset + 2 > static_cast<int64_t>(m.shared_bytes)) {
                throw std::runtime_error("out-of-bounds shared wgmma");
            }
            const size_t piece = static_cast<size_t>(offset) / 16;
            if (m.pieces[piece].state != PieceState::VISIBLE) {
                throw std::runtime_error("wgmma reads shared memory that was not waited for, fenced and synchronised");
            }
            product.reads.push_back(piece);
            return static_cast<size_t>(offset);
        };
        std::vector<size_t> a_places, b_places(static_cast<size_t>(16 * columns));
        if (!from_registers) {
            const Matrix matrix(ins[0]->a_descriptor);
            for (int r = 0; r < 16; ++r) {
                for (int k = 0; k < 16; ++k) a_places.push_back(read(matrix.address(k, number % 4 * 16 + r)));
            }
        }
        const Matrix matrix(ins[0]->b_descriptor);
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < columns; ++n) {
                b_places[static_cast<size_t>(k * columns + n)] =
                    read(b_runs_along_columns ? matrix.address(n, k) : matrix.address(k, n));
            }
        }
        std::sort(product.reads.begin(), product.reads.end());
        product.reads.erase(std::unique(product.reads.begin(), product.reads.end()), product.reads.end());
        for (const size_t piece : product.reads) ++m.pieces[piece].reading;
        if (LaunchCounts* const counts = counting()) {
            counts->group_products += 1;
            counts->group_columns += columns;
            // a group's B is read once for its four warps
            counts->group_bytes += (from_registers ? 0 : 16 * 16 * 2) + 16 * columns * 2 / GROUP_WARPS;
        }

        const size_t numbers = static_cast<size_t>(columns / 2);
        for (const auto& group : warp.groups) {
            for (const GroupProduct& earlier : group) {
                if (earlier.target[0] == ins[0]->c) product.numbers = earlier.numbers;
            }
        }
        for (int lane = 0; lane < WARP; ++lane) product.target.push_back(ins[lane]->c);
        if (product.numbers == nullptr) {
            product.numbers = std::make_shared<Accumulators>();
            for (float* const lane : product.target) {
                product.numbers->emplace_back(lane, lane + numbers);
                std::fill(lane, lane + numbers, std::numeric_limits<float>::quiet_NaN());
            }
        }
        for (int lane = 0; from_registers && lane < WARP; ++lane) {
            const uint32_t* const held = ins[lane]->a;
            product.rows.push_back(held);
            product.given.push_back({held[0], held[1], held[2], held[3]});
        }
        const bool adds = ins[0]->accumulate;
        product.compute = [=, target = product.numbers, registers = product.given] {
            const auto shared = [](size_t offset) {
                uint16_t bits;
                std::memcpy(&bits, machine().shared.data() + offset, 2);
                return bits;
            };
            float A[16][16];
            std::vector<float> B(static_cast<size_t>(16 * columns));
            for (int r = 0; r < 16; ++r) {
                for (int k = 0; k < 16; ++k) {
                    if (!from_registers) {
                        A[r][k] = element(shared(a_places[static_cast<size_t>(r * 16 + k)]));
                        continue;
                    }
                    const int lane = r % 8 * 4 + k % 8 / 2, i = r / 8 + 2 * (k / 8);
                    A[r][k] = element(static_cast<uint16_t>(
                        registers[static_cast<size_t>(lane)][static_cast<size_t>(i)] >> (16 * (k % 2))));
                }
            }
            for (size_t i = 0; i < B.size(); ++i) B[i] = element(shared(b_places[i]));
            std::vector<float> row(static_cast<size_t>(columns));
            for (int r = 0; r < 16; ++r) {
                for (int n = 0; n < columns; ++n) {
                    const int lane = r % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + r / 8 * 2 + n % 2;
                    row[static_cast<size_t>(n)] =
                        adds ? (*target)[static_cast<size_t>(lane)][static_cast<size_t>(i)] : 0.0f;
                }
                for (int k = 0; k < 16; ++k) {
                    for (int n = 0; n < columns; ++n) {
                        row[static_cast<size_t>(n)] += A[r][k] * B[static_cast<size_t>(k * columns + n)];
                    }
                }
                for (int n = 0; n < columns; ++n) {
                    const int lane = r % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + r / 8 * 2 + n % 2;
                    (*target)[static_cast<size_t>(lane)][static_cast<size_t>(i)] = row[static_cast<size_t>(n)];
                }
            }
        };
        warp.groups.back().push_back(std::move(product));
        if (m.draw(2) == 0) {
            for (auto& group : warp.groups) {
                for (GroupProduct& one : group) carry_out(one);
            }
        }
    });
}

}  // namespace emulator

// Weighted, Gaussian and branched attention, forward and backward.
//
//   e_ij = exp(scale q_i.k_j - max_i) (m_j + eps), Z_i = sum_k e_ik, P_ij = e_ij / Z_i, out = P v
//   dP = dO v^T, delta_i = sum_j P_ij dP_ij, dS = P (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T dO
//   dm_j = sum over heads and queries of dS_ij / (m_j + eps)
//
// A thread works on one (batch, head) pair at a time. It transposes the keys (in the backward also the values) once
// into scratch and then processes blocks of query rows. The scores of a block stay in the L1 and L2 caches; no [Lq, Lk]
// matrix exists. Multiplying by m + eps after exp needs no logarithm, and m + eps is large enough to divide by it
// accurately.
//
// A chunk of work is a batch entry with all its heads, in order; no other chunk writes to its outputs. Small heads end
// before the hardware prefetcher recognises their access pattern, so the products of a head prefetch the next head's
// rows.
#include "branched_attention.h"

#include <algorithm>
#include <limits>

#include "constants.h"
#include "gaussian.h"
#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 48;         // maximum number of queries in a block
constexpr int64_t BLOCK_ELEMENTS = 16384;  // maximum number of scores in a block: 64 KiB
constexpr int64_t FEW_SAMPLES = 64;

// A block of query rows; its rows see at most the first `keys` keys.
struct Block {
    int64_t begin, rows, keys;
};

// Divides the rows into blocks of about the same size, so that no block has only one or two rows.
int64_t rows_of_a_block(int64_t Lq, int64_t Lk) {
    const int64_t most = std::clamp<int64_t>(BLOCK_ELEMENTS / round_up(std::max<int64_t>(Lk, 1), W), 1, BLOCK_ROWS);
    const int64_t blocks = (Lq + most - 1) / most;
    return blocks == 0 ? 1 : round_up((Lq + blocks - 1) / blocks, 2);  // even: bf16 pairs rows
}

template <class T>
class Attention {
  public:
    using E = Operand<T>;

    // If `memory` is null, the constructor only counts the bytes that it needs.
    Attention(const AttentionInputs& p, const Branches& branches, bool backward, void* memory)
        : p_(p),
          branches_(branches),
          width_padded_(round_up(p.d, W)),
          keys_padded_(round_up(p.Lk, 2 * W)),
          block_rows_(rows_of_a_block(p.Lq, p.Lk)),
          arena_(memory),
          write_(p.B * p.H * p.Lk * p.d) {
        const int64_t rows = block_rows_ + block_rows_ % 2;
        scores_ = arena_.alloc<float>(rows * keys_padded_);
        weighted_scores_ = branches.n == 1 ? scores_ : arena_.alloc<float>(rows * keys_padded_);
        packed_ = arena_.alloc<E>(rows * keys_padded_);
        out_ = arena_.alloc<float>(DIRECT<T> ? 0 : rows * width_padded_);
        weight_ = arena_.alloc<float>(branches.n * keys_padded_);
        query_ = arena_.alloc<E>(p.Lq * width_padded_);
        key_t_ = arena_.alloc<E>(width_padded_ * keys_padded_);
        value_ = arena_.alloc<E>(keys_padded_ * width_padded_);
        lines_ = arena_.alloc<const char*>(
            PrefetchList::capacity((1 + branches.n) * p.Lq + 2 * p.Lk, p.d * static_cast<int64_t>(sizeof(T))));
        if (!backward) return;
        value_t_ = arena_.alloc<E>(width_padded_ * keys_padded_);
        key_ = arena_.alloc<E>(keys_padded_ * width_padded_);
        d_out_ = arena_.alloc<E>(branches.n * p.Lq * width_padded_);
        d_out_rows_ = arena_.alloc<OperandRows<E>>(branches.n);
        rows_ = arena_.alloc<E>(rows * width_padded_);
        d_scores_ = arena_.alloc<float>(rows * keys_padded_);
        d_scores_sum_ = branches.n == 1 ? d_scores_ : arena_.alloc<float>(rows * keys_padded_);
        d_key_ = arena_.alloc<float>(keys_padded_ * width_padded_);
        d_value_ = arena_.alloc<float>(keys_padded_ * width_padded_);
        d_weight_ = arena_.alloc<float>(2 * branches.n * keys_padded_);
        block_weight_ = d_weight_ + branches.n * keys_padded_;
    }

    size_t bytes() const { return arena_.bytes(); }

    // Computes the keys' weights m + eps of batch entry b; they are zero beyond its length.
    void begin_batch(int64_t b) {
        b_ = b;
        length_ = p_.key_lengths == nullptr ? p_.Lk : std::clamp<int64_t>(p_.key_lengths[b], 0, p_.Lk);
        const bool weighted = p_.key_weight != nullptr || p_.center != nullptr;
        weights_at_once_ = weighted && branches_.n == 1;
        for (int64_t i = 0; weighted && i < branches_.n; ++i) {
            for (int64_t j = 0; j < keys_padded_; j += W) {
                const int64_t n = std::clamp<int64_t>(length_ - j, 0, W);
                const int64_t at = i * branches_.weights + b * p_.Lk + (n == 0 ? 0 : j);
                const Vec m =
                    p_.center == nullptr ? load_tail(p_.key_weight + at, n) : gaussian().value(positions(j, p_.Lk));
                store(weights(i) + j, within(m + set1(KEY_WEIGHT_EPS), n));
            }
        }
    }

    // Names the head that this thread will probably process next; its rows are prefetched.
    void set_next(int64_t b, int64_t h) {
        next_b_ = b;
        next_h_ = h;
    }

    void forward(const BranchedAttentionParams& p, int64_t h) {
        begin_head(h);
        plan(nullptr);
        const OperandRows<E> value = as_b(p_.value, 0, length_, value_);
        float* first_stats = p.stats + 2 * (b_ * p_.H + h) * p_.Lq;
        for_each_block([&](const Block& block) {
            score(block);
            for (int64_t r = 0; r < block.rows; ++r) softmax(block, r, first_stats + 2 * (block.begin + r));
            for (int64_t i = 0; i < branches_.n; ++i) {
                float* stats = first_stats + i * branches_.stats;
                for (int64_t r = 0; branches_.n > 1 && r < block.rows; ++r) {
                    const int64_t at = 2 * (block.begin + r);
                    stats[at] = first_stats[at];
                    stats[at + 1] = weigh(block, r, i);
                }
                // Normalise after the product, when a row has d elements instead of Lk.
                multiply(packed_a(weighted_scores_, block), value, block, branch(p.out, i),
                         stats + 2 * block.begin + 1);
            }
            if (p.weights != nullptr) add_weights(p.weights, block, first_stats);
        });
    }

    void backward(const BranchedAttentionBackwardParams& p, int64_t h) {
        begin_head(h);
        plan(&p.d_out);
        pack_transposed(p_.d, length_, row(p_.value, 0), p_.value.row, value_t_, keys_padded_);
        const OperandRows<E> key = as_b(p_.key, 0, length_, key_);
        for (int64_t i = 0; i < branches_.n; ++i) {
            d_out_rows_[i] = as_a(branch(p.d_out, i), p_.Lq, d_out_ + i * p_.Lq * width_padded_);
        }
        const bool want_weight = p.d_key_weight != nullptr || p.d_center != nullptr;
        const float* first_stats = p.stats + 2 * (b_ * p_.H + h) * p_.Lq;
        if (want_weight && h == 0) std::fill(d_weight_, d_weight_ + 2 * branches_.n * keys_padded_, 0.0f);
        key_rows_done_ = 0;
        for_each_block([&](const Block& block) {
            score(block);
            for (int64_t r = 0; r < block.rows; ++r) {
                const float* stats = first_stats + 2 * (block.begin + r);
                probabilities(block, r, stats[0], branches_.n == 1 ? stats[1] : 1.0f);
            }
            for (int64_t i = 0; i < branches_.n; ++i) {
                const float* inverse = first_stats + i * branches_.stats + 2 * block.begin + 1;
                for (int64_t r = 0; branches_.n > 1 && r < block.rows; ++r) weigh(block, r, i, inverse[2 * r]);
                const Heads d_out = branch(p.d_out, i);
                const bool last = last_of_head(block) && i + 1 == branches_.n;
                if (p.d_value.data != nullptr) {
                    add_transposed(weighted_scores_, d_out, block, d_value_, p.d_value,
                                   i == 0 ? key_rows_done_ : block.keys, last);
                }
                product(d_out_rows_[i], block, value_t_, d_scores_);
                float* columns = want_weight ? block_weight_ + i * keys_padded_ : nullptr;
                for (int64_t r = 0; r < block.rows; ++r) score_gradient(p, block, r, columns);
                if (want_weight) add_weight_gradient(block, i);
                if (branches_.n > 1) add_score_gradient(block, i == 0);
            }
            if (p.d_query.data != nullptr) {
                multiply(packed_a(d_scores_sum_, block), key, block, p.d_query, nullptr);
            }
            if (p.d_key.data != nullptr) {
                add_transposed(d_scores_sum_, p_.query, block, d_key_, p.d_key, key_rows_done_, last_of_head(block));
            }
            key_rows_done_ = block.keys;
        });
        for (int64_t j = key_rows_done_; j < p_.Lk; ++j) {  // keys that no query sees
            if (p.d_key.data != nullptr) write_row(p.d_key, j, nullptr, 0);
            if (p.d_value.data != nullptr) write_row(p.d_value, j, nullptr, 0);
        }
    }

    // After the last head of a batch entry: writes the gradient of its key weights, or of its Gaussian's center and
    // width.
    void end_batch(const BranchedAttentionBackwardParams& p) {
        const auto d_m = [&](int64_t i, int64_t j) {
            return static_cast<double>(d_weight_[i * keys_padded_ + j]) / weights(i)[j];
        };
        for (int64_t i = 0; p.d_key_weight != nullptr && i < branches_.n; ++i) {
            float* out = p.d_key_weight + i * branches_.weights + b_ * p_.Lk;
            for (int64_t j = 0; j < p_.Lk; ++j) out[j] = j < length_ ? static_cast<float>(d_m(i, j)) : 0.0f;
        }
        if (p.d_center == nullptr) return;
        // Sum in float64: because sum_j dS_ij = 0, the terms almost cancel far from the Gaussian.
        double d_center = 0, d_width = 0;
        const Gaussian g = gaussian();
        for (int64_t j = 0; j < length_; j += W) {
            float x[W], bell[W];
            store(x, positions(j, p_.Lk));
            store(bell, g.bell(load(x)));
            for (int64_t i = 0; i < std::min<int64_t>(W, length_ - j); ++i) {
                g.add_gradient(x[i], d_m(0, j + i) * bell[i], d_center, d_width);
            }
        }
        p.d_center[b_] = static_cast<float>(d_center);
        p.d_width[b_] = g.width_passes ? static_cast<float>(d_width) : 0.0f;
    }

    void finish() const { write_.finish(); }

  private:
    Gaussian gaussian() const { return {p_.center[b_], p_.width[b_], p_.alpha, p_.min_width, p_.complement}; }

    void begin_head(int64_t h) {
        h_ = h;
        query_rows_ = as_a(p_.query, p_.Lq, query_);
        pack_transposed(p_.d, length_, row(p_.key, 0), p_.key.row, key_t_, keys_padded_);
    }

    template <class Body>
    void for_each_block(const Body& body) const {
        for (int64_t begin = 0; begin < p_.Lq; begin += block_rows_) {
            const int64_t rows = std::min(block_rows_, p_.Lq - begin);
            body(Block{begin, rows, p_.causal ? std::min(begin + rows, length_) : length_});
        }
    }

    float* weights(int64_t branch) const { return weight_ + branch * keys_padded_; }

    // Selects a branch of out or of its gradient.
    Heads branch(const Heads& t, int64_t i) const {
        return {static_cast<T*>(t.data) + i * branches_.out, t.batch, t.head, t.row};
    }

    bool last_of_head(const Block& block) const { return block.begin + block.rows == p_.Lq; }

    T* row(const Heads& t, int64_t i) const { return static_cast<T*>(t.data) + b_ * t.batch + h_ * t.head + i * t.row; }

    // Lists the cache lines of the next head, which the products of this head prefetch.
    void plan(const Heads* d_out) {
        PrefetchList list(lines_);
        const auto add = [&](const Heads& t, int64_t rows) {
            list.add(static_cast<const T*>(t.data) + next_b_ * t.batch + next_h_ * t.head, t.row, rows, p_.d);
        };
        if (next_b_ < p_.B) {
            add(p_.key, p_.Lk);
            add(p_.query, p_.Lq);
            add(p_.value, p_.Lk);
            for (int64_t i = 0; d_out != nullptr && i < branches_.n; ++i) add(branch(*d_out, i), p_.Lq);
        }
        prefetch_ = list.finish(d_out == nullptr ? 0 : 1);  // a backward has twice as many steps
    }

    // The head's rows as the left operand of gemm.
    OperandRows<E> as_a(const Heads& t, int64_t rows, E* buffer) const {
        return left_rows(rows, p_.d, row(t, 0), t.row, buffer, width_padded_);
    }
    // The head's rows from `begin` on as the right operand.
    OperandRows<E> as_b(const Heads& t, int64_t begin, int64_t rows, E* buffer) const {
        return right_rows(rows, p_.d, row(t, begin), t.row, buffer, width_padded_);
    }
    // A block of scores as the left operand.
    OperandRows<E> packed_a(const float* scores, const Block& block) const {
        return left_rows(block.rows, block.keys, scores, keys_padded_, packed_, keys_padded_);
    }

    // Writes the block's rows: out[r] = factors[2 r] a[r, keys] b[keys, d]. Null factors are ones.
    void multiply(OperandRows<E> a, OperandRows<E> b, const Block& block, const Heads& out,
                  const float* factors) const {
        const int64_t K = packed_k<T>(block.keys);
        if constexpr (DIRECT<T>) {
            const ResultOf<T> to{row(out, block.begin), out.row, nullptr, 0, factors, 2, write_.streams(), &prefetch_};
            gemm(block.rows, p_.d, K, a.data, a.ld, 1, b.data, b.ld, to);
        } else {
            gemm(block.rows, p_.d, K, a.data, a.ld, 1, b.data, b.ld, out_, width_padded_, false, &prefetch_);
            for (int64_t r = 0; r < block.rows; ++r) {
                write_row(out, block.begin + r, out_ + r * width_padded_, factors == nullptr ? 1 : factors[2 * r]);
            }
        }
    }

    // Adds scores[rows, keys]^T t[the block's rows, d] to sums[keys, d]; with `last`, writes the totals to `out`. Only
    // the first `begun` keys have sums from earlier blocks.
    void add_transposed(const float* scores, const Heads& t, const Block& block, float* sums, const Heads& out,
                        int64_t begun, bool last) const {
        const OperandRows<E> b = as_b(t, block.begin, block.rows, rows_);
        const E* a = right_rows(block.rows, block.keys, scores, keys_padded_, packed_, keys_padded_).data;
        const int64_t K = packed_k<T>(block.rows);
        const auto add = [&](int64_t from, int64_t to, bool old) {
            float* at = sums + from * width_padded_;
            if constexpr (DIRECT<T>) {
                if (last) {
                    const ResultOf<T> result{row(out, from), out.row, old ? at : nullptr, width_padded_,
                                             nullptr,        0,       write_.streams(),   &prefetch_};
                    return gemm(to - from, p_.d, K, a + from, 1, keys_padded_, b.data, b.ld, result);
                }
            }
            gemm(to - from, p_.d, K, a + from, 1, keys_padded_, b.data, b.ld, at, width_padded_, old, &prefetch_);
        };
        if (begun > 0) add(0, begun, true);
        if (block.keys > begun) add(begun, block.keys, false);
        if constexpr (!DIRECT<T>) {
            for (int64_t j = 0; last && j < block.keys; ++j) write_row(out, j, sums + j * width_padded_, 1);
        }
    }

    // out[rows, keys] = a[the block's rows, d] b[d, keys]
    void product(OperandRows<E> a, const Block& block, const E* b, float* out) const {
        gemm(block.rows, block.keys, packed_k<T>(p_.d), a.from(block.begin).data, a.ld, 1, b, keys_padded_, out,
             keys_padded_, false, &prefetch_);
    }

    void score(const Block& block) const { product(query_rows_, block, key_t_, scores_); }

    int64_t visible(const Block& block, int64_t r) const {
        return p_.causal ? std::min(block.begin + r + 1, length_) : length_;
    }

    // e of W keys from j on, of which n are visible. The backward must compute the same bits that the forward summed.
    // Scale after the subtraction: with a fused multiply-add, scale * score - rounded maximum is not 0 at the maximum.
    Vec exponential(const float* scores, int64_t j, int64_t n, Vec best) const {
        const Vec e = exp((load(scores + j) - best) * set1(p_.scale));
        return within(weights_at_once_ ? e * load(weight_ + j) : e, n);
    }

    // Replaces row r of the scores by e, 0 for hidden keys; writes the unscaled best score and 1 / Z to stats.
    void softmax(const Block& block, int64_t r, float* stats) const {
        float* scores = scores_ + r * keys_padded_;
        const int64_t n = visible(block, r);
        const float sign = p_.scale < 0 ? -1.0f : 1.0f;
        const Vec lowest = set1(std::numeric_limits<float>::lowest());
        Vec top = lowest;
        for (int64_t j = 0; j < n; j += W) {
            const Vec s = load(scores + j) * set1(sign);
            top = vmax(n - j >= W ? s : select(first_n(static_cast<int>(n - j)), s, lowest), top);
        }
        const float best = sign * hmax(top);
        Vec total = set1(0);
        for (int64_t j = 0; j < n; j += W) {
            const Vec e = exponential(scores, j, n - j, set1(best));
            store(scores + j, e);
            total += e;
        }
        blank(scores, n, block.keys);
        const float Z = hsum(total);
        stats[0] = best;
        stats[1] = Z == 0 ? 0 : 1 / Z;
    }

    // Replaces row r of the scores by factor * e, 0 for hidden keys. The factor 1 / Z gives P.
    void probabilities(const Block& block, int64_t r, float best, float factor) const {
        float* scores = scores_ + r * keys_padded_;
        const int64_t n = visible(block, r);
        for (int64_t j = 0; j < n; j += W) store(scores + j, exponential(scores, j, n - j, set1(best)) * set1(factor));
        blank(scores, n, block.keys);
    }

    // Multiplies row r of e (0 for hidden keys) by a branch's weights and `factor`. Returns 1 / Z.
    float weigh(const Block& block, int64_t r, int64_t branch, float factor = 1.0f) const {
        const float *e = scores_ + r * keys_padded_, *weight = weights(branch);
        float* to = weighted_scores_ + r * keys_padded_;
        Vec total = set1(0);
        for (int64_t j = 0; j < block.keys; j += W) {
            const Vec weighted = load(e + j) * load(weight + j) * set1(factor);
            store(to + j, weighted);
            total += weighted;
        }
        const float Z = hsum(total);
        return Z == 0 ? 0 : 1 / Z;
    }

    // Zeros the vectors after the one that holds key n; that vector is masked already.
    static void blank(float* scores, int64_t n, int64_t keys) {
        for (int64_t j = round_up(n, W); j < keys; j += W) store(scores + j, set1(0));
    }

    // Replaces row r of dP by scale * dS, with P from the scores; adds dS to `columns` unless it is null.
    void score_gradient(const AttentionBackwardParams& p, const Block& block, int64_t r, float* columns) const {
        const float* probability = weighted_scores_ + r * keys_padded_;
        float* d = d_scores_ + r * keys_padded_;
        const int64_t n = visible(block, r);
        if (p.d_weights != nullptr) {
            const float* given = p.d_weights + (b_ * p_.Lq + block.begin + r) * p_.Lk;
            const Vec share = set1(1.0f / static_cast<float>(p_.H));
            for (int64_t j = 0; j < n; j += W) store(d + j, fma(load_tail(given + j, n - j), share, load(d + j)));
        }
        Vec total = set1(0);
        for (int64_t j = 0; j < n; j += W) total = fma(load(probability + j), within(load(d + j), n - j), total);
        // A lone key's P is 1 whatever its score; dS of a rounded P would be divided by m + eps.
        const Vec delta = set1(n == 1 ? d[0] : hsum(total)), scale = set1(p_.scale);
        for (int64_t j = 0; j < n; j += W) {
            const Vec dS = load(probability + j) * within(load(d + j) - delta, n - j);
            if (columns != nullptr) store(columns + j, load(columns + j) + dS);
            store(d + j, dS * scale);
        }
        blank(d, n, block.keys);
    }

    // Adds the block's sums to the total: a sum of block sums has a smaller rounding error than one long sum.
    void add_weight_gradient(const Block& block, int64_t branch) const {
        float *sums = d_weight_ + branch * keys_padded_, *of_block = block_weight_ + branch * keys_padded_;
        for (int64_t j = 0; j < block.keys; j += W) {
            store(sums + j, load(sums + j) + load(of_block + j));
            store(of_block + j, set1(0));
        }
    }

    // Adds scale * dS of a branch to the sum over the branches.
    void add_score_gradient(const Block& block, bool first) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            const float* d = d_scores_ + r * keys_padded_;
            float* sum = d_scores_sum_ + r * keys_padded_;
            for (int64_t j = 0; j < block.keys; j += W)
                store(sum + j, first ? load(d + j) : load(sum + j) + load(d + j));
        }
    }

    // Adds the head's weights to the mean over the heads, in order; the first head overwrites the memory.
    void add_weights(float* weights, const Block& block, const float* stats) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            const float* scores = scores_ + r * keys_padded_;
            float* out = weights + (b_ * p_.Lq + block.begin + r) * p_.Lk;
            const Vec share = set1(stats[2 * (block.begin + r) + 1] / static_cast<float>(p_.H));
            for (int64_t j = 0; j < p_.Lk; j += W) {
                const Vec before = h_ == 0 ? set1(0) : load_tail(out + j, p_.Lk - j);
                store_tail(out + j, j < block.keys ? fma(load(scores + j), share, before) : before, p_.Lk - j);
            }
        }
    }

    void write_row(const Heads& t, int64_t i, const float* values, float factor) const {
        T* out = row(t, i);
        for (int64_t c = 0; c < p_.d; c += W) {
            const int64_t n = p_.d - c;
            write_(out + c, values == nullptr ? set1(0) : load_tail(values + c, n) * set1(factor), n);
        }
    }

    const AttentionInputs& p_;
    const Branches& branches_;
    const int64_t width_padded_, keys_padded_;  // d and Lk, padded
    const int64_t block_rows_;
    Arena arena_;
    const Output<T> write_;
    float *scores_, *weighted_scores_, *out_, *weight_, *d_scores_, *d_scores_sum_, *d_key_, *d_value_, *d_weight_,
        *block_weight_;
    E *packed_, *query_, *key_t_, *value_, *value_t_, *key_, *d_out_, *rows_;
    OperandRows<E> query_rows_{};
    OperandRows<E>* d_out_rows_;
    int64_t b_ = 0, h_ = 0, length_ = 0;
    int64_t next_b_ = 0, next_h_ = 0;
    const char** lines_;
    mutable Prefetch prefetch_{};
    int64_t key_rows_done_ = 0;     // key rows that already have gradient sums in this head
    bool weights_at_once_ = false;  // with a single branch, `exponential` applies the weights
};

// Calls body(attention, head) for every head. A task's heads are of one batch entry: before them begin_batch, after
// them end(attention). Tasks are single heads where few entries would leave threads idle, unless `together`: something
// is summed over an entry's heads.
template <class T, class Params, class Body, class End>
void for_each_head(const Params& p, bool backward, bool together, const Body& body, const End& end) {
    const size_t bytes = Attention<T>(p, p.branches, backward, nullptr).bytes();
    const int64_t threads = thread_count(), heads = together || p.B > FEW_SAMPLES ? p.H : 1;
    parallel_for(p.B * p.H / heads, [&](int64_t task) {
        Attention<T> attention(p, p.branches, backward, thread_scratch(bytes));
        const int64_t first = task * heads, last = first + heads - 1;  // of all entries' heads
        attention.begin_batch(first / p.H);
        for (int64_t head = first; head <= last; ++head) {
            const int64_t next = head < last ? head + 1 : first + threads * heads;
            attention.set_next(next / p.H, next % p.H);
            body(attention, head % p.H);
        }
        end(attention);
    });
}

}  // namespace

void branched_attention(const BranchedAttentionParams& p) {
    with_type(p.dtype, [&](auto* type) {
        for_each_head<std::remove_pointer_t<decltype(type)>>(
            p, false, p.weights != nullptr, [&](auto& attention, int64_t h) { attention.forward(p, h); },
            [](auto& attention) { attention.finish(); });
    });
}

void branched_attention_backward(const BranchedAttentionBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) {
        for_each_head<std::remove_pointer_t<decltype(type)>>(
            p, true, p.d_key_weight != nullptr || p.d_center != nullptr,
            [&](auto& attention, int64_t h) { attention.backward(p, h); },
            [&](auto& attention) {
                attention.end_batch(p);
                attention.finish();
            });
    });
}

void attention(const AttentionParams& p) {
    BranchedAttentionParams one{};
    static_cast<AttentionParams&>(one) = p;
    CNM_ISA::branched_attention(one);
}

void attention_backward(const AttentionBackwardParams& p) {
    BranchedAttentionBackwardParams one{};
    static_cast<AttentionBackwardParams&>(one) = p;
    CNM_ISA::branched_attention_backward(one);
}

}  // namespace cnm::CNM_ISA

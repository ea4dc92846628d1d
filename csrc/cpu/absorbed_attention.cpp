// Attention on states of the model's width, the heads' projections absorbed into the queries or the keys:
//
//   e_hij = exp(scale q_i.k_hj + b_hj - max_hi) (m_j + eps), P_hij = e_hij / sum_j e_hij, out_i = sum_h P_hi v_h
//   dP_h = dO v_h^T, delta_hi = sum_j P_hij dP_hij, dS = P (dP - delta)
//   dq = scale sum_h dS_h k_h, dk_h = scale dS_h^T q, dv_h = P_h^T dO, db_hj = sum_i dS_hij
//   dm_j = sum over heads and queries of dS_hij / (m_j + eps)
//
// A chunk is a batch entry. The real keys of all its heads stand side by side, as one matrix of as many columns; blocks
// of query rows pass through, their scores in the first caches, and a row's softmax runs head by head. The products
// with all heads' values add up the heads. The backward makes P anew: nothing is kept for it.
#include "absorbed_attention.h"

#include <algorithm>
#include <limits>

#include "constants.h"
#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 48;         // at most, of queries
constexpr int64_t BLOCK_ELEMENTS = 16384;  // at most, of a block's scores: 64 KiB

template <class T>
class AbsorbedAttention {
  public:
    using E = Operand<T>;
    static constexpr bool PAIRED = std::is_same_v<E, bf16x2>;

    // With a null `memory`, only counts the bytes it needs.
    AbsorbedAttention(const AbsorbedAttentionInputs& p, bool backward, void* memory)
        : p_(p),
          shared_(p.value.data == nullptr),
          width_padded_(round_up(p.D, W)),
          keys_padded_(round_up(p.H * (p.Lk + (PAIRED ? 1 : 0)), 2 * W)),
          block_rows_(std::clamp<int64_t>(BLOCK_ELEMENTS / std::max<int64_t>(keys_padded_, 1), 2, BLOCK_ROWS) / 2 * 2),
          arena_(memory),
          write_(p.B * p.Lq * p.D) {
        scores_ = arena_.alloc<float>(block_rows_ * keys_padded_);
        packed_ = arena_.alloc<E>(block_rows_ * keys_padded_);
        out_ = arena_.alloc<float>(DIRECT<T> ? 0 : block_rows_ * width_padded_);
        bias_ = arena_.alloc<float>(keys_padded_);
        weight_ = arena_.alloc<float>(keys_padded_);
        left_ = arena_.alloc<E>(block_rows_ * width_padded_);
        key_t_ = arena_.alloc<E>(width_padded_ * keys_padded_);
        value_ = arena_.alloc<E>(keys_padded_ * width_padded_);
        if (!backward) return;
        value_t_ = shared_ ? key_t_ : arena_.alloc<E>(width_padded_ * keys_padded_);
        key_ = shared_ ? value_ : arena_.alloc<E>(keys_padded_ * width_padded_);
        right_ = arena_.alloc<E>(block_rows_ * width_padded_);
        d_scores_ = arena_.alloc<float>(block_rows_ * keys_padded_);
        d_key_ = arena_.alloc<float>(keys_padded_ * width_padded_);
        d_value_ = shared_ ? d_key_ : arena_.alloc<float>(keys_padded_ * width_padded_);
        d_columns_ = arena_.alloc<float>(2 * keys_padded_);
        block_columns_ = d_columns_ + keys_padded_;
    }

    size_t bytes() const { return arena_.bytes(); }

    void forward(const AbsorbedAttentionParams& p, int64_t b) {
        begin(b);
        pack_keys(p_.key, key_t_);
        pack_values(shared_ ? p_.key : p_.value, value_);
        for (int64_t first = 0; first < queries_; first += block_rows_) {
            const int64_t rows = std::min(block_rows_, queries_ - first);
            probabilities(first, rows);
            multiply(scores_, value_, first, rows, p.out);
        }
        clear(p.out, queries_, p_.Lq);
        write_.finish();
    }

    void backward(const AbsorbedAttentionBackwardParams& p, int64_t b) {
        begin(b);
        pack_keys(p_.key, key_t_);
        if (!shared_) pack_keys(p_.value, value_t_);
        if (p.d_query.data != nullptr) pack_values(p_.key, key_);
        std::fill(d_columns_, d_columns_ + 2 * keys_padded_, 0.0f);
        const bool wants_values = shared_ ? p.d_key.data != nullptr : p.d_value.data != nullptr;
        for (int64_t first = 0; first < queries_; first += block_rows_) {
            const int64_t rows = std::min(block_rows_, queries_ - first);
            const bool old = first > 0;
            probabilities(first, rows);
            product(p.d_out, first, rows, value_t_, d_scores_);
            if (wants_values) add_transposed(scores_, p.d_out, first, rows, d_value_, old);
            for_each_segment(rows, [&](int64_t at, int64_t c, auto vectors) {
                score_gradient(scores_ + at, d_scores_ + at, block_columns_ + c, vectors);
                clear_gap(d_scores_ + at, c);
            });
            for (int64_t c = 0; c < columns_; c += W) {  // sums of sums round less than one long sum
                store(d_columns_ + c, load(d_columns_ + c) + load(block_columns_ + c));
                store(block_columns_ + c, set1(0));
            }
            if (p.d_query.data != nullptr) multiply(d_scores_, key_, first, rows, p.d_query);
            if (p.d_key.data != nullptr) add_transposed(d_scores_, p_.query, first, rows, d_key_, old || shared_);
        }
        if (p.d_query.data != nullptr) clear(p.d_query, queries_, p_.Lq);
        write_keys(p.d_key, d_key_);
        if (!shared_) write_keys(p.d_value, d_value_);
        write_columns(p);
        write_.finish();
    }

  private:
    // The first column of head h's keys; it is even, since bf16 pairs rows of values.
    int64_t column(int64_t h) const { return h * (PAIRED ? round_up(keys_, 2) : keys_); }

    static int64_t real(const int64_t* lengths, int64_t b, int64_t most) {
        return lengths == nullptr ? most : std::clamp<int64_t>(lengths[b], 0, most);
    }

    void begin(int64_t b) {
        b_ = b;
        keys_ = real(p_.key_lengths, b, p_.Lk);
        queries_ = real(p_.query_lengths, b, p_.Lq);
        tail_ = static_cast<int>(keys_ - (keys_ - 1) / W * W);
        columns_ = keys_ == 0 ? 0 : column(p_.H - 1) + keys_;
        for (int64_t h = 0; h < p_.H; ++h) {
            for (int64_t j = 0; j < keys_; ++j) {
                bias_[column(h) + j] = p_.key_bias == nullptr ? 0 : p_.key_bias[(b * p_.H + h) * p_.Lk + j];
                weight_[column(h) + j] = p_.key_weight == nullptr ? 1 : p_.key_weight[b * p_.Lk + j] + KEY_WEIGHT_EPS;
            }
        }
    }

    T* row(const Heads& t, int64_t h, int64_t i) const {
        return static_cast<T*>(t.data) + b_ * t.batch + h * t.head + i * t.row;
    }

    // All heads' keys as a right operand [D, columns].
    void pack_keys(const Heads& from, E* to) const {
        for (int64_t h = 0; h < p_.H; ++h)
            pack_transposed(p_.D, keys_, row(from, h, 0), from.row, to + column(h), keys_padded_);
    }
    // All heads' values as a right operand [columns, D].
    void pack_values(const Heads& from, E* to) const {
        for (int64_t h = 0; h < p_.H; ++h) {
            pack_rows(keys_, p_.D, row(from, h, 0), from.row, to + packed_k<T>(column(h)) * width_padded_,
                      width_padded_);
        }
    }

    // out[rows, columns] = t[the block's rows, D] b[D, columns]
    void product(const Heads& t, int64_t first, int64_t rows, const E* b, float* out) const {
        const auto [a, lda] = left_rows(rows, p_.D, row(t, 0, first), t.row, left_, width_padded_);
        gemm(rows, columns_, packed_k<T>(p_.D), a, lda, 1, b, keys_padded_, out, keys_padded_, false);
    }

    // The block's rows of `out` = scores[rows, columns] b[columns, D].
    void multiply(const float* scores, const E* b, int64_t first, int64_t rows, const Heads& out) const {
        const E* a = left_rows(rows, columns_, scores, keys_padded_, packed_, keys_padded_).data;
        const int64_t K = packed_k<T>(columns_);
        if constexpr (DIRECT<T>) {
            const ResultOf<T> to{row(out, 0, first), out.row, nullptr, 0, nullptr, 0, write_.streams()};
            gemm(rows, p_.D, K, a, keys_padded_, 1, b, width_padded_, to);
        } else {
            gemm(rows, p_.D, K, a, keys_padded_, 1, b, width_padded_, out_, width_padded_, false);
            for (int64_t r = 0; r < rows; ++r) write_row(row(out, 0, first + r), out_ + r * width_padded_);
        }
    }

    // sums[columns, D] = scores[rows, columns]^T t[the block's rows, D], added to what is there if `old`.
    void add_transposed(const float* scores, const Heads& t, int64_t first, int64_t rows, float* sums, bool old) const {
        const E* a = right_rows(rows, columns_, scores, keys_padded_, packed_, keys_padded_).data;
        const auto [b, ldb] = right_rows(rows, p_.D, row(t, 0, first), t.row, right_, width_padded_);
        gemm(columns_, p_.D, packed_k<T>(rows), a, 1, keys_padded_, b, ldb, sums, width_padded_, old);
    }

    // The block's scores to P.
    void probabilities(int64_t first, int64_t rows) const {
        product(p_.query, first, rows, key_t_, scores_);
        for_each_segment(rows, [&](int64_t at, int64_t c, auto vectors) {
            softmax(scores_ + at, bias_ + c, weight_ + c, vectors);
            clear_gap(scores_ + at, c);
        });
    }

    // For each row and head calls body(pointer to its scores, their first column, their number of vectors).
    template <class Body>
    void for_each_segment(int64_t rows, const Body& body) const {
        const auto run = [&](auto vectors) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t h = 0; h < p_.H; ++h) body(r * keys_padded_ + column(h), column(h), vectors);
            }
        };
        switch ((keys_ + W - 1) / W) {  // of few keys they stay in registers
            case 0: break;
            case 1: run(std::integral_constant<int, 1>{}); break;
            case 2: run(std::integral_constant<int, 2>{}); break;
            case 3: run(std::integral_constant<int, 3>{}); break;
            case 4: run(std::integral_constant<int, 4>{}); break;
            default: run((keys_ + W - 1) / W);
        }
    }

    // Vector j of a segment.
    Vec part(const float* p, int64_t j, int64_t vectors) const {
        return j + 1 < vectors ? load(p + j * W) : load_n(p + j * W, tail_);
    }
    void set_part(float* p, int64_t j, int64_t vectors, Vec v) const {
        j + 1 < vectors ? store(p + j * W, v) : store_n(p + j * W, v, tail_);
    }

    template <class Count>
    void softmax(float* scores, const float* bias, const float* weight, Count vectors) const {
        const Vec scale = set1(p_.scale), lowest = set1(std::numeric_limits<float>::lowest());
        Held<Count> held(scores, *this);
        Vec top = lowest;
        for (int64_t j = 0; j < vectors; ++j) {
            Vec s = fma(part(scores, j, vectors), scale, part(bias, j, vectors));
            if (j + 1 == vectors) s = select(first_n(tail_), s, lowest);
            held.set(j, vectors, s);
            top = vmax(s, top);
        }
        const Vec max = set1(hmax(top));
        Vec total = set1(0);
        for (int64_t j = 0; j < vectors; ++j) {
            Vec e = exp(held.get(j, vectors) - max) * part(weight, j, vectors);
            if (j + 1 == vectors) e = select(first_n(tail_), e, set1(0));  // what memory held no score for may be NaN
            held.set(j, vectors, e);
            total += e;
        }
        const float Z = hsum(total);
        const Vec inverse = set1(Z == 0 ? 0 : 1 / Z);
        for (int64_t j = 0; j < vectors; ++j) set_part(scores, j, vectors, held.get(j, vectors) * inverse);
    }

    // dP to scale dS; dS itself to the columns' sums.
    template <class Count>
    void score_gradient(const float* probability, float* d, float* columns, Count vectors) const {
        Vec total = set1(0);
        for (int64_t j = 0; j < vectors; ++j) {
            total = fma(part(probability, j, vectors), part(d, j, vectors), total);
        }
        // A lone key's P is 1 whatever its score; dS of a rounded P would be divided by m + eps.
        const Vec delta = set1(keys_ == 1 ? d[0] : hsum(total));
        for (int64_t j = 0; j < vectors; ++j) {
            const Vec dS = part(probability, j, vectors) * (part(d, j, vectors) - delta);
            set_part(columns, j, vectors, part(columns, j, vectors) + dS);
            set_part(d, j, vectors, dS * set1(p_.scale));
        }
    }

    // A segment's vectors between two passes over it: in registers where their number is a constant, else in its
    // memory.
    template <class Count>
    struct Held {
        float* memory;
        const AbsorbedAttention& attention;
        Held(float* memory, const AbsorbedAttention& attention) : memory(memory), attention(attention) {}
        Vec get(int64_t j, int64_t vectors) const { return attention.part(memory, j, vectors); }
        void set(int64_t j, int64_t vectors, Vec v) { attention.set_part(memory, j, vectors, v); }
    };
    template <int N>
    struct Held<std::integral_constant<int, N>> {
        Vec vectors_[N];
        Held(float*, const AbsorbedAttention&) {}
        Vec get(int64_t j, int64_t) const { return vectors_[j]; }
        void set(int64_t j, int64_t, Vec v) { vectors_[j] = v; }
    };

    // Between two heads' columns, after those that begin at column c.
    void clear_gap(float* scores, int64_t c) const {
        if (PAIRED && keys_ % 2 != 0 && c + keys_ < columns_) scores[keys_] = 0;
    }

    void write_row(T* out, const float* values) const {
        for (int64_t c = 0; c < p_.D; c += W) {
            write_(out + c, values == nullptr ? set1(0) : load_tail(values + c, p_.D - c), p_.D - c);
        }
    }
    void clear(const Heads& t, int64_t from, int64_t to) const {
        for (int64_t i = from; i < to; ++i) write_row(row(t, 0, i), nullptr);
    }
    void write_keys(const Heads& to, const float* sums) const {
        if (to.data == nullptr) return;
        for (int64_t h = 0; h < p_.H; ++h) {
            for (int64_t j = 0; j < p_.Lk; ++j) {
                write_row(row(to, h, j), j < keys_ && queries_ > 0 ? sums + (column(h) + j) * width_padded_ : nullptr);
            }
        }
    }
    void write_columns(const AbsorbedAttentionBackwardParams& p) const {
        for (int64_t h = 0; p.d_key_bias != nullptr && h < p_.H; ++h) {
            float* out = p.d_key_bias + (b_ * p_.H + h) * p_.Lk;
            for (int64_t j = 0; j < p_.Lk; ++j) out[j] = j < keys_ ? d_columns_[column(h) + j] : 0;
        }
        for (int64_t j = 0; p.d_key_weight != nullptr && j < p_.Lk; ++j) {
            float sum = 0;
            for (int64_t h = 0; j < keys_ && h < p_.H; ++h) sum += d_columns_[column(h) + j] / weight_[j];
            p.d_key_weight[b_ * p_.Lk + j] = sum;
        }
    }

    const AbsorbedAttentionInputs& p_;
    const bool shared_;  // the keys are the values
    const int64_t width_padded_, keys_padded_;
    const int64_t block_rows_;
    Arena arena_;
    const Output<T> write_;
    float *scores_, *out_, *bias_, *weight_, *d_scores_, *d_key_, *d_value_, *d_columns_, *block_columns_;
    E *packed_, *left_, *right_, *key_t_, *value_, *value_t_, *key_;
    int64_t b_ = 0, keys_ = 0, queries_ = 0, columns_ = 0;
    int tail_ = 0;  // keys in a segment's last vector
};

template <class Params, class Body>
void for_each_sample(const Params& p, bool backward, const Body& body) {
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const size_t bytes = AbsorbedAttention<T>(p, backward, nullptr).bytes();
        parallel_for(p.B, [&](int64_t b) {
            AbsorbedAttention<T> attention(p, backward, thread_scratch(bytes));
            body(attention, b);
        });
    });
}

}  // namespace

void absorbed_attention(const AbsorbedAttentionParams& p) {
    for_each_sample(p, false, [&](auto& attention, int64_t b) { attention.forward(p, b); });
}

void absorbed_attention_backward(const AbsorbedAttentionBackwardParams& p) {
    for_each_sample(p, true, [&](auto& attention, int64_t b) { attention.backward(p, b); });
}

}  // namespace cnm::CNM_ISA

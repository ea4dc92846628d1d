// Cache lines to be asked for while a product runs, one in `1 << shift` steps of its inner loop: a processor has few
// requests to memory under way at a time, and waits when they come in bursts.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cnm::CNM_ISA {

struct Prefetch {
    static constexpr int64_t PADDING = 512;  // harmless lines after `end`, so that nobody need count
    const char* const* next;
    const char* const* end;
    int shift;

    // The lines for K steps.
    const char* const* take(int64_t K) {
        const char* const* lines = next;
        next = std::min(next + (K >> shift) + 1, end);
        return lines;
    }
};

// Lists the lines of rows, in memory for capacity() addresses.
class PrefetchList {
  public:
    explicit PrefetchList(const char** memory) : begin_(memory), end_(memory) {}

    static int64_t capacity(int64_t rows, int64_t row_bytes) {
        return rows * ((row_bytes + LINE - 1) / LINE) + Prefetch::PADDING;
    }

    template <class T>
    void add(const T* first, int64_t ld, int64_t rows, int64_t width) {
        const int64_t lines = (width * static_cast<int64_t>(sizeof(T)) + LINE - 1) / LINE;
        const char** end = end_;
        for (int64_t i = 0; i < rows; ++i, end += lines) {
            const char* row = reinterpret_cast<const char*>(first + i * ld);
            for (int64_t line = 0; line < lines; ++line) end[line] = row + line * LINE;
        }
        end_ = end;
    }
    int64_t size() const { return end_ - begin_; }

    Prefetch finish(int shift) {
        std::fill(end_, end_ + Prefetch::PADDING, reinterpret_cast<const char*>(begin_));
        return {begin_, end_, shift};
    }

  private:
    static constexpr int64_t LINE = 64;
    const char **begin_, **end_;
};

}  // namespace cnm::CNM_ISA

// Whether other processes want the cores that a caller's threads run on, and whether one thread then does better alone.
//
// Threads meet at the end of every loop. One whose core another process holds makes all wait for its time slice,
// several milliseconds at each loop: a process of several threads can get less than one core's worth of work done.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace cnm {

// Nanoseconds that threads ran, and that they were ready to run and had no core.
struct CoreTime {
    int64_t run = 0;
    int64_t wait = 0;
};

// The calling thread's since its last call of this function, by Linux's own account; zeros where there is none.
CoreTime core_time_since_last_call();

// Watches the loops of one calling thread.
class Contention {
  public:
    // Whether the next loop is to run in the calling thread alone. Asked once before each loop.
    bool alone();

    // Whether all threads are to add their time to `add` in the loop that was asked about last.
    bool measures() const { return measures_; }
    void add(CoreTime time);

    // After a loop that measures.
    void decide();

  private:
    using Clock = std::chrono::steady_clock;

    Clock::time_point now_;    // of the last loop asked about
    Clock::time_point begun_;  // of the time that is measured
    Clock::time_point retry_;  // until then the caller computes alone
    Clock::duration pause_{};  // how long it did, the last time
    bool alone_ = false;
    bool measuring_ = false;  // a loop has begun what is measured
    bool measures_ = false;   // the loop asked about last begins or ends it
    std::atomic<int64_t> run_{0}, wait_{0};
};

}  // namespace cnm

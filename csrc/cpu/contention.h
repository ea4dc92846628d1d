// Whether other processes want the cores that a caller's threads run on, and whether one thread then does better alone.
//
// Threads meet at the end of every loop. One whose core another process holds makes all wait for its time slice,
// several milliseconds at each loop: a process of several threads can get less than one core's worth of work done.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace cnm {

// Watches the loops of one calling thread.
class Contention {
  public:
    // Whether the next loop is to run in the calling thread alone. Asked once before each loop.
    bool alone();

    // Whether every thread is to call add_own_time() in the loop that was asked about last, and the caller decide()
    // behind it.
    bool measures() const { return measures_; }
    void add_own_time();
    void decide();

  private:
    using Clock = std::chrono::steady_clock;

    Clock::time_point begun_;  // of the time that is measured
    Clock::time_point retry_;  // until then the caller computes alone
    Clock::duration pause_{};  // how long it did, the last time
    bool alone_ = false;
    bool measuring_ = false;  // a loop has begun what is measured
    bool measures_ = false;   // the loop asked about last begins or ends it
    // Of all threads: nanoseconds that they ran, and that they were ready to run and had no core.
    std::atomic<int64_t> run_{0}, wait_{0};
};

}  // namespace cnm

#include "contention.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#ifdef __linux__
#include <fcntl.h>
#include <unistd.h>
#endif

namespace cnm {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds WINDOW(50);           // measured at a time: several of the scheduler's slices
constexpr milliseconds SHORTEST_PAUSE(200);  // alone before all threads are tried again; doubled up to the longest
constexpr milliseconds LONGEST_PAUSE(3200);  // tries take 50 of so many milliseconds: less than 2%

struct CoreTime {
    int64_t run = 0;
    int64_t wait = 0;
};

#ifdef __linux__

// The calling thread's, by Linux's own account; zeros where there is none.
CoreTime core_time() {
    struct File {
        const int descriptor = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
        ~File() {
            if (descriptor >= 0) close(descriptor);
        }
    };
    thread_local const File file;
    char text[64];
    const ssize_t size = file.descriptor < 0 ? 0 : pread(file.descriptor, text, sizeof(text) - 1, 0);
    text[std::max<ssize_t>(size, 0)] = '\0';
    CoreTime time;
    const int read = std::sscanf(text, "%" SCNd64 " %" SCNd64, &time.run, &time.wait);
    return read == 2 ? time : CoreTime();
}

#else

CoreTime core_time() { return {}; }

#endif

// All threads together had no more than one core, and at least one of them could not run a third of the time.
bool better_alone(CoreTime time, int64_t elapsed) { return time.wait * 3 > elapsed && time.run * 10 < elapsed * 11; }

}  // namespace

bool Contention::alone() {
    const Clock::time_point now = Clock::now();
    if (alone_ && now >= retry_) alone_ = measuring_ = false;
    measures_ = !alone_ && (!measuring_ || now - begun_ >= WINDOW);
    return alone_;
}

void Contention::add_own_time() {
    thread_local CoreTime last;
    const CoreTime now = core_time();
    run_.fetch_add(now.run - last.run, std::memory_order_relaxed);
    wait_.fetch_add(now.wait - last.wait, std::memory_order_relaxed);
    last = now;
}

void Contention::decide() {
    const Clock::time_point end = Clock::now();
    const CoreTime time{run_.exchange(0), wait_.exchange(0)};
    if (measuring_) {
        alone_ = better_alone(time, std::chrono::nanoseconds(end - begun_).count());
        pause_ = alone_ ? std::clamp<Clock::duration>(2 * pause_, SHORTEST_PAUSE, LONGEST_PAUSE) : Clock::duration();
        retry_ = end + pause_;
    }
    measuring_ = !alone_;
    begun_ = end;
}

}  // namespace cnm

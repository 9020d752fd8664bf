// The library's thread pool. A task consists of parts, and each thread takes one part at a time, so a delayed thread
// does not delay the others.
#pragma once
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace fledge {

// Runs f. Returns 0, or -1 if f throws: no exception may leave the C interface. The parts of a task must not throw.
template <class F>
int catch_errors(F&& f) {
    try {
        f();
        return 0;
    } catch (...) {
        return -1;
    }
}

// Held during a whole call of the C interface. The pool serves one caller at a time, and the instruction set does not
// change during a call.
class CallLock {
   public:
    CallLock();
    ~CallLock();
    CallLock(const CallLock&) = delete;
    CallLock& operator=(const CallLock&) = delete;

   private:
    std::unique_lock<std::mutex> lock_;
    unsigned saved_control_;  // this thread's floating-point control register before the call
};

int thread_count();

// Sets the memory that a thread reads first in the task after the next one. When the thread has finished its parts of
// the next task, it prefetches this memory while the caller prepares the task after it. Cleared by the next task that
// uses several threads.
void prefetch_next(int thread, const void* data, int64_t bytes);

using PartFunction = void (*)(void* task, int64_t part, int thread);
void run_parts(int64_t parts, PartFunction run_part, void* task);

// Calls f(part, thread) for every part in [0, parts), with thread < thread_count(). Returns when all parts are done.
template <class F>
void parallel_for(int64_t parts, F&& f) {
    using Task = std::remove_reference_t<F>;
    run_parts(parts, [](void* task, int64_t part, int thread) { (*static_cast<Task*>(task))(part, thread); }, &f);
}

// The same for parts that together read and write about `bytes`. A small task runs on the calling thread, because
// waking the other threads would take longer.
constexpr int64_t MAX_SERIAL_BYTES = 200 << 10;
template <class F>
void parallel_for(int64_t parts, int64_t bytes, F&& f) {
    if (bytes > MAX_SERIAL_BYTES) return parallel_for(parts, f);
    for (int64_t i = 0; i < parts; i++) f(i, 0);
}

}  // namespace fledge

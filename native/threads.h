// The library's own threads: parts of a task are handed out one by one, so a thread that is held up holds up nobody.
#pragma once
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace fledge {

// Runs f and turns what it throws into -1: nothing may leave the C interface. Parts of a task must not throw at all.
template <class F>
int guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (...) {
        return -1;
    }
}

// Held for a whole call of the C interface: the pool serves one caller at a time, and a caller sees one set of kernels.
class Turn {
   public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;

   private:
    std::unique_lock<std::mutex> lock_;
    unsigned control_;  // how this thread's processor treated tiny results before
};

int threads();

// What each thread will read first in the task after the next one: a thread that has nothing left to do asks its cache
// for it while the caller prepares that task. Forgotten after the next task that threads share.
void expect(int thread, const void* data, int64_t bytes);

using Part = void (*)(void* task, int64_t part, int thread);
void run_parts(int64_t parts, Part part, void* task);

// f(part, thread) for every part from 0 to parts - 1; thread is below threads(). Returns when all are done.
template <class F>
void parallel(int64_t parts, F&& f) {
    using Task = std::remove_reference_t<F>;
    run_parts(parts, [](void* task, int64_t part, int thread) { (*static_cast<Task*>(task))(part, thread); }, &f);
}

// The same for parts of which all together read and write about `bytes`: a little is done sooner than anybody is told.
constexpr int64_t LITTLE = 200 << 10;
template <class F>
void parallel(int64_t parts, int64_t bytes, F&& f) {
    if (bytes > LITTLE) return parallel(parts, f);
    for (int64_t i = 0; i < parts; i++) f(i, 0);
}

}  // namespace fledge

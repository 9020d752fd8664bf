#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "export.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

namespace fledge {
namespace {

constexpr int SPINS = 4000;  // about 50 microseconds: longer than the pause between two tasks of one forward pass

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Results too small for a normal float become zero: a decaying state would otherwise slow the processor down.
unsigned flush_tiny_results() {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON);
    return before;
#else
    return 0;
#endif
}

void restore(unsigned control) {
#if defined(__x86_64__)
    _mm_setcsr(control);
#else
    (void)control;
#endif
}

struct Expected {
    const char* data = nullptr;
    int64_t bytes = 0;
};

// A thread's own share of the parts: neighbours, so that it reads on where it has read. Others help when they are done.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

class Pool {
   public:
    explicit Pool(int count) : count_(count), shares_(static_cast<size_t>(count)) {
        try {
            for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that are there, and the caller, do all the work.
        }
    }

    ~Pool() {
        ending_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int count() const { return count_; }

    void run(int64_t parts, Part part, void* task, const std::vector<Expected>* expected) {
        expected_ = expected;
        part_ = part, task_ = task;
        for (int i = 0; i < count_; i++) {
            Share& share = shares_[static_cast<size_t>(i)];
            share.next.store(parts * i / count_, std::memory_order_relaxed);
            share.end = parts * (i + 1) / count_;
        }
        open_.store(true);
        epoch_.fetch_add(1);
        if (sleeping_.load()) epoch_.notify_all();
        take(0);
        // Whoever enters after this sees a closed task; whoever entered before is counted and waited for. A worker that
        // sleeps through a short task costs nothing.
        open_.store(false);
        for (int spin = 0; inside_.load(); spin++) {
            pause_briefly();
            if (spin > SPINS) std::this_thread::yield();  // it may be waiting for this very core
        }
    }

   private:
    void take(int thread) {
        for (int other = 0; other < count_; other++) {
            Share& share = shares_[static_cast<size_t>((thread + other) % count_)];
            for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                part_(task_, i, thread);
        }
    }

    // In the idle time after a task; the next one ends it.
    void read_ahead(const Expected& expected, uint64_t seen) {
        for (int64_t i = 0; i < expected.bytes && epoch_.load(std::memory_order_relaxed) == seen; i += 64)
            __builtin_prefetch(expected.data + i, 0, 2);
    }

    void work(int thread) {
        flush_tiny_results();
        uint64_t seen = 0;
        while (true) {
            for (int spin = 0; epoch_.load() == seen && spin < SPINS; spin++) pause_briefly();
            if (epoch_.load() == seen) {
                sleeping_.fetch_add(1);
                epoch_.wait(seen);
                sleeping_.fetch_sub(1);
            }
            if (ending_) return;
            seen = epoch_.load();
            Expected expected;
            inside_.fetch_add(1);
            if (open_.load()) {
                take(thread);
                expected = (*expected_)[static_cast<size_t>(thread) % expected_->size()];
            }
            inside_.fetch_sub(1);
            read_ahead(expected, seen);
        }
    }

    const int count_;
    std::vector<Share> shares_;
    Part part_ = nullptr;
    void* task_ = nullptr;
    const std::vector<Expected>* expected_ = nullptr;
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<bool> open_{false}, ending_{false};
    std::atomic<int> sleeping_{0};
    std::vector<std::thread> workers_;
};

std::mutex& turn = *new std::mutex;
std::atomic<int> wanted{0};  // 0: one for each core
Pool* pool = nullptr;        // never destroyed at exit: its threads may be asleep then
long owner = 0;

// Never destroyed, as threads may still run when the process ends. Threads beyond 64 share what others expect.
std::vector<Expected>& expected = *new std::vector<Expected>(64);

long process() {
#if defined(_WIN32)
    return 0;
#else
    return static_cast<long>(getpid());
#endif
}

Pool& ready_pool() {
    if (pool && owner != process()) pool = nullptr;  // threads do not survive a fork; their memory is left alone
    if (pool && pool->count() != threads()) {
        delete pool;
        pool = nullptr;
    }
    if (!pool) pool = new Pool(threads()), owner = process();
    return *pool;
}

}  // namespace

// A fork waits for the call that runs, or the child would inherit a lock that nobody opens.
void watch_forks() {
#if !defined(_WIN32)
    static const int watched = pthread_atfork([] { turn.lock(); }, [] { turn.unlock(); }, [] { turn.unlock(); });
    (void)watched;
#endif
}

Turn::Turn() : lock_((watch_forks(), turn)), control_(flush_tiny_results()) {}
Turn::~Turn() { restore(control_); }

int threads() {
    static const unsigned cores = std::thread::hardware_concurrency();  // asking takes microseconds
    const int count = wanted.load(std::memory_order_relaxed);
    return count ? count : cores ? static_cast<int>(cores) : 1;
}

void expect(int thread, const void* data, int64_t bytes) {
    if (static_cast<size_t>(thread) < expected.size())
        expected[static_cast<size_t>(thread)] = {static_cast<const char*>(data), bytes};
}

void run_parts(int64_t parts, Part part, void* task) {
    if (parts <= 1 || threads() == 1)
        for (int64_t i = 0; i < parts; i++) part(task, i, 0);
    else
        ready_pool().run(parts, part, task, &expected);
    std::fill(expected.begin(), expected.end(), Expected{});
}

}  // namespace fledge

// How many threads to use from now on; 0: one for each core.
FLEDGE_API void fledge_set_threads(int count) {
    fledge::Turn waiting;
    fledge::wanted = count < 0 ? 0 : count > 1024 ? 1024 : count;
}

FLEDGE_API int fledge_threads() { return fledge::threads(); }

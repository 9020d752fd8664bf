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

constexpr int SPIN_LIMIT = 4000;  // about 50 microseconds: longer than the pause between two tasks of a forward pass

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Flushes denormal results to zero. Otherwise a decaying state would slow the processor down.
unsigned enable_flush_to_zero() {
#if defined(__x86_64__)
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | _MM_FLUSH_ZERO_ON);
    return control;
#else
    return 0;
#endif
}

void restore_control(unsigned control) {
#if defined(__x86_64__)
    _mm_setcsr(control);
#else
    (void)control;
#endif
}

struct MemoryRange {
    const char* data = nullptr;
    int64_t bytes = 0;
};

// The parts of one thread. They are adjacent, so the thread reads memory sequentially. A thread that has finished its
// own parts takes parts of other threads.
struct alignas(64) PartRange {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

class Pool {
   public:
    explicit Pool(int count) : count_(count), ranges_(static_cast<size_t>(count)) {
        try {
            for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { run_worker(i); });
        } catch (const std::system_error&) {
            // The system provides no more threads; the existing ones and the caller do all the work.
        }
    }

    ~Pool() {
        is_stopping_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int count() const { return count_; }

    void run(int64_t parts, PartFunction run_part, void* task, const std::vector<MemoryRange>* prefetch_ranges) {
        prefetch_ranges_ = prefetch_ranges;
        run_part_ = run_part;
        task_ = task;
        for (int i = 0; i < count_; i++) {
            PartRange& range = ranges_[static_cast<size_t>(i)];
            range.next.store(parts * i / count_, std::memory_order_relaxed);
            range.end = parts * (i + 1) / count_;
        }
        is_open_.store(true);
        epoch_.fetch_add(1);
        if (sleeping_workers_.load()) epoch_.notify_all();
        run_available_parts(0);
        // A worker that arrives after this sees a closed task. A worker that arrived before is counted, and the caller
        // waits for it. A worker that sleeps through a short task costs nothing.
        is_open_.store(false);
        for (int spin = 0; active_workers_.load(); spin++) {
            pause_briefly();
            if (spin > SPIN_LIMIT) std::this_thread::yield();  // the worker may need this core
        }
    }

   private:
    void run_available_parts(int thread) {
        for (int offset = 0; offset < count_; offset++) {
            PartRange& range = ranges_[static_cast<size_t>((thread + offset) % count_)];
            for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
                run_part_(task_, i, thread);
        }
    }

    // Runs in the idle time after a task and stops when the next one starts.
    void prefetch(const MemoryRange& range, uint64_t epoch) {
        for (int64_t i = 0; i < range.bytes && epoch_.load(std::memory_order_relaxed) == epoch; i += 64)
            __builtin_prefetch(range.data + i, 0, 2);
    }

    void run_worker(int thread) {
        enable_flush_to_zero();
        uint64_t epoch = 0;
        while (true) {
            for (int spin = 0; epoch_.load() == epoch && spin < SPIN_LIMIT; spin++) pause_briefly();
            if (epoch_.load() == epoch) {
                sleeping_workers_.fetch_add(1);
                epoch_.wait(epoch);
                sleeping_workers_.fetch_sub(1);
            }
            if (is_stopping_) return;
            epoch = epoch_.load();
            MemoryRange range;
            active_workers_.fetch_add(1);
            if (is_open_.load()) {
                run_available_parts(thread);
                range = (*prefetch_ranges_)[static_cast<size_t>(thread) % prefetch_ranges_->size()];
            }
            active_workers_.fetch_sub(1);
            prefetch(range, epoch);
        }
    }

    const int count_;
    std::vector<PartRange> ranges_;
    PartFunction run_part_ = nullptr;
    void* task_ = nullptr;
    const std::vector<MemoryRange>* prefetch_ranges_ = nullptr;
    alignas(64) std::atomic<uint64_t> epoch_{0};  // incremented by every task
    alignas(64) std::atomic<int> active_workers_{0};
    std::atomic<bool> is_open_{false};
    std::atomic<bool> is_stopping_{false};
    std::atomic<int> sleeping_workers_{0};
    std::vector<std::thread> workers_;
};

std::mutex& call_mutex = *new std::mutex;
std::atomic<int> requested_threads{0};  // 0: one per core
Pool* pool = nullptr;                   // not destroyed at exit, because its threads may be asleep then
long pool_process = 0;                  // the process that created the pool

// Not destroyed at exit, because threads may still run then. Threads from the 65th on share the ranges of the others.
std::vector<MemoryRange>& next_ranges = *new std::vector<MemoryRange>(64);

long process_id() {
#if defined(_WIN32)
    return 0;
#else
    return static_cast<long>(getpid());
#endif
}

Pool& current_pool() {
    if (pool && pool_process != process_id()) pool = nullptr;  // threads do not survive a fork; their memory is leaked
    if (pool && pool->count() != thread_count()) {
        delete pool;
        pool = nullptr;
    }
    if (!pool) {
        pool = new Pool(thread_count());
        pool_process = process_id();
    }
    return *pool;
}

// A fork waits for the running call. Otherwise the child would inherit a lock that no thread releases.
std::mutex& fork_safe_mutex() {
#if !defined(_WIN32)
    static const int registered =
        pthread_atfork([] { call_mutex.lock(); }, [] { call_mutex.unlock(); }, [] { call_mutex.unlock(); });
    (void)registered;
#endif
    return call_mutex;
}

}  // namespace

CallLock::CallLock() : lock_(fork_safe_mutex()), saved_control_(enable_flush_to_zero()) {}
CallLock::~CallLock() { restore_control(saved_control_); }

int thread_count() {
    static const unsigned cores = std::thread::hardware_concurrency();  // this call takes microseconds
    const int count = requested_threads.load(std::memory_order_relaxed);
    if (count) return count;
    return cores ? static_cast<int>(cores) : 1;
}

void prefetch_next(int thread, const void* data, int64_t bytes) {
    if (static_cast<size_t>(thread) < next_ranges.size())
        next_ranges[static_cast<size_t>(thread)] = {static_cast<const char*>(data), bytes};
}

void run_parts(int64_t parts, PartFunction run_part, void* task) {
    if (parts <= 1 || thread_count() == 1)
        for (int64_t i = 0; i < parts; i++) run_part(task, i, 0);
    else
        current_pool().run(parts, run_part, task, &next_ranges);
    std::fill(next_ranges.begin(), next_ranges.end(), MemoryRange{});
}

}  // namespace fledge

// Sets the number of threads; 0: one per core.
FLEDGE_API void fledge_set_threads(int count) {
    const fledge::CallLock lock;
    fledge::requested_threads = std::clamp(count, 0, 1024);
}

FLEDGE_API int fledge_threads() { return fledge::thread_count(); }

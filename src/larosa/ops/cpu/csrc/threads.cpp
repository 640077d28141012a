#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "larosa_cpu.h"

namespace larosa {
namespace {

// Tasks that follow each other, for one thread to take from the front, and for others from the back when they have
// none of their own left. Fewer than 2^32, for both ends to fit one atomic.
class Range {
  public:
    void set(int64_t first, int64_t end) { ends_.store(pack(first, end), std::memory_order_relaxed); }

    // A task, or -1 where none is left.
    int64_t take(bool from_front) {
        uint64_t ends = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t first = int64_t(ends & 0xffffffffu), end = int64_t(ends >> 32);
            if (first == end) return -1;
            const uint64_t left = from_front ? pack(first + 1, end) : pack(first, end - 1);
            if (ends_.compare_exchange_weak(ends, left, std::memory_order_relaxed)) return from_front ? first : end - 1;
        }
    }

  private:
    static uint64_t pack(int64_t first, int64_t end) { return uint64_t(first) | uint64_t(end) << 32; }

    alignas(64) std::atomic<uint64_t> ends_{0};
};

// Each thread has tasks that follow each other, as their weights do in memory: what the processor fetches past the end
// of one is the beginning of the next.
class Job {
  public:
    Job(int64_t tasks, int64_t threads, void (*run)(void *, int64_t), void *context)
        : tasks_(tasks), ranges_(threads < kRanges ? threads : kRanges), run_(run), context_(context) {
        for (int64_t i = 0; i < ranges_; ++i) range_[i].set(tasks * i / ranges_, tasks * (i + 1) / ranges_);
    }

    // Takes tasks until none is left. Any number of threads may, so it does not matter how many come.
    void work() {
        const int64_t own = arrived_.fetch_add(1, std::memory_order_relaxed);
        int64_t finished = 0;
        for (int64_t i = 0; i < ranges_; ++i)
            for (int64_t task; (task = range_[(own + i) % ranges_].take(i == 0)) >= 0; ++finished) run_(context_, task);
        if (finished) done_.fetch_add(finished, std::memory_order_release);
    }
    bool finished() const { return done_.load(std::memory_order_acquire) == tasks_; }

  private:
    static constexpr int64_t kRanges = 64;  // more threads than that share some

    const int64_t tasks_, ranges_;
    void (*const run_)(void *, int64_t);
    void *const context_;
    Range range_[kRanges];
    std::atomic<int64_t> arrived_{0};
    std::atomic<int64_t> done_{0};
};

// Threads that sleep until there is a job. A job is shared with them, for a thread may come when all is done.
class Pool {
  public:
    void run(const std::shared_ptr<Job> &job, int64_t threads) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            while (int64_t(size_) < threads - 1) {
                std::thread([this] { serve(); }).detach();
                ++size_;
            }
            job_ = job;
            wanted_ = threads - 1;
            ++generation_;
        }
        woken_.notify_all();
        job->work();
        while (!job->finished()) std::this_thread::yield();
    }

  private:
    void serve() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            woken_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (wanted_ == 0) continue;
            --wanted_;
            const std::shared_ptr<Job> job = job_;
            lock.unlock();
            job->work();
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable woken_;
    std::shared_ptr<Job> job_;
    uint64_t generation_ = 0;
    int64_t wanted_ = 0;
    int64_t size_ = 0;
};

// Never destroyed: its threads wait on it until the process ends.
Pool &pool() {
    static Pool *const pool = new Pool;
    return *pool;
}

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

void run_tasks(int64_t tasks, int64_t threads, void (*run)(void *, int64_t), void *context) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task);
        return;
    }
    // Always as many threads as asked for, even for fewer tasks: OpenMP's team is costly to resize.
    if (const GompParallel parallel = gomp_parallel.load(std::memory_order_relaxed)) {
        Job job(tasks, threads, run, context);
        parallel([](void *job) { static_cast<Job *>(job)->work(); }, &job, unsigned(threads), 0);
    } else {
        pool().run(std::make_shared<Job>(tasks, threads, run, context), threads);
    }
}

}  // namespace larosa

void larosa_share_openmp(void *gomp_parallel) {
    larosa::gomp_parallel = reinterpret_cast<larosa::GompParallel>(gomp_parallel);
}

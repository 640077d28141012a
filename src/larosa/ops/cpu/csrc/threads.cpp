#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
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
    Job(int64_t tasks, int64_t threads, Tasks run, std::shared_ptr<Job> beside)
        : tasks_(tasks),
          ranges_(threads < kRanges ? threads : kRanges),
          run_(std::move(run)),
          beside_(std::move(beside)) {
        for (int64_t i = 0; i < ranges_; ++i) range_[i].set(tasks * i / ranges_, tasks * (i + 1) / ranges_);
    }

    // Takes tasks until none is left, and while others are at the last ones, some of the job beside. Any number of
    // threads may, so it does not matter how many come.
    void work() {
        const int64_t own = arrived_.fetch_add(1, std::memory_order_relaxed);
        take(own, [] { return true; });
        if (beside_) beside_->take(own, [this] { return !finished(); });
    }
    bool finished() const { return done_.load(std::memory_order_acquire) == tasks_; }

  private:
    // Takes tasks, beginning with a thread's own, until none is left or there is better to do.
    template <class Condition>
    void take(int64_t own, Condition idle) {
        int64_t finished = 0;
        for (int64_t i = 0; i < ranges_; ++i)
            for (int64_t task; idle() && (task = range_[(own + i) % ranges_].take(i == 0)) >= 0; ++finished)
                run_(task);
        if (finished) done_.fetch_add(finished, std::memory_order_release);
    }

    static constexpr int64_t kRanges = 64;  // more threads than that share some

    const int64_t tasks_, ranges_;
    const Tasks run_;
    const std::shared_ptr<Job> beside_;
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

void run_job(const std::shared_ptr<Job> &job, int64_t threads) {
    if (const GompParallel parallel = gomp_parallel.load(std::memory_order_relaxed)) {
        parallel([](void *job) { static_cast<Job *>(job)->work(); }, job.get(), unsigned(threads), 0);
    } else {
        pool().run(job, threads);
    }
}

// What the caller's thread has put off, and for how many threads.
thread_local std::shared_ptr<Job> deferred;
thread_local int64_t deferred_for = 1;

}  // namespace

void parallel(int64_t tasks, int64_t threads, Tasks run) {
    if (threads <= 1 || (tasks <= 1 && !deferred)) {
        for (int64_t task = 0; task < tasks; ++task) run(task);
        return;
    }
    // Always as many threads as asked for, even for fewer tasks: OpenMP's team is costly to resize.
    run_job(std::make_shared<Job>(tasks, threads, std::move(run), deferred), threads);
}

void defer(int64_t tasks, int64_t threads, Tasks run) {
    deferred = std::make_shared<Job>(tasks, threads, std::move(run), nullptr);
    deferred_for = threads;
}

void finish_deferred() {
    if (deferred) run_job(deferred, deferred_for);
    deferred = nullptr;
    deferred_for = 1;
}

int64_t deferred_threads() { return deferred_for; }

}  // namespace larosa

void larosa_share_openmp(void *gomp_parallel) {
    larosa::gomp_parallel = reinterpret_cast<larosa::GompParallel>(gomp_parallel);
}

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

struct Job {
    const int64_t tasks;
    void (*const run)(void *, int64_t);
    void *const context;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};

    Job(int64_t tasks, void (*run)(void *, int64_t), void *context) : tasks(tasks), run(run), context(context) {}

    // Takes tasks until none is left. Any number of threads may, so it does not matter how many come.
    void work() {
        int64_t finished = 0;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++finished)
            run(context, task);
        if (finished) done.fetch_add(finished, std::memory_order_release);
    }
    bool finished() const { return done.load(std::memory_order_acquire) == tasks; }
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
        Job job(tasks, run, context);
        parallel([](void *job) { static_cast<Job *>(job)->work(); }, &job, unsigned(threads), 0);
    } else {
        pool().run(std::make_shared<Job>(tasks, run, context), threads);
    }
}

}  // namespace larosa

void larosa_share_openmp(void *gomp_parallel) {
    larosa::gomp_parallel = reinterpret_cast<larosa::GompParallel>(gomp_parallel);
}

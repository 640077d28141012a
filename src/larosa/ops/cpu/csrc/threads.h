// Work shared among threads, those of an OpenMP run-time library that the process has loaded, or else our own.
#pragma once

#include <cstdint>

namespace larosa {

// Calls run(context, task) for every task in [0, tasks), in any order, on up to `threads` threads; returns when all are
// done. Must not throw.
void run_tasks(int64_t tasks, int64_t threads, void (*run)(void *context, int64_t task), void *context);

template <class Function>
void parallel(int64_t tasks, int64_t threads, Function f) {
    run_tasks(tasks, threads, [](void *context, int64_t task) { (*static_cast<Function *>(context))(task); }, &f);
}

}  // namespace larosa

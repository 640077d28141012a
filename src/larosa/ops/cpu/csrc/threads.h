// Work shared among threads, those of an OpenMP run-time library that the process has loaded, or else our own.
#pragma once

#include <cstdint>
#include <functional>

namespace larosa {

// A number of tasks, which must not throw.
using Tasks = std::function<void(int64_t task)>;

// Calls run(task) for every task in [0, tasks), in any order, on up to `threads` threads; returns when all are done.
void parallel(int64_t tasks, int64_t threads, Tasks run);

// Puts off such work: in later calls of parallel() by this thread, threads take tasks of it instead of waiting for each
// other, and finish_deferred() does what is left, to be called before more is put off.
void defer(int64_t tasks, int64_t threads, Tasks run);
void finish_deferred();

// How many threads a single task is worth: those of the work put off, 1 where none is.
int64_t deferred_threads();

}  // namespace larosa

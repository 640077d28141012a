// y = residual + x W^T + b for the k largest entries of x, which each block finds for itself: that takes less time than
// to be told of them by another kernel.
//
// So it is where no multiprocessor has more than one block, for which 512 threads take more than half of the registers.
constexpr int DEPTH = 6;  // loads in flight in each thread

#include "columns.cuh"
#include "selection.cuh"

static_assert(IN_REGISTERS, "longer vectors are selected from by a kernel of their own");

struct Shared {
    Ranking ranking;
    unsigned kept[WARPS];  // entries that are certain, by warp
    Entry entries[MOST_KEPT / CLUSTER + 2];
    Sums sums;
};

SHARED(Shared);

// What the compiler makes of 88 registers runs .2 to .5% of a token faster than of the 100 it would take.
#if EACH <= 8
KERNEL_IN_REGISTERS(88)
#else
KERNEL(THREADS, 1)
#endif
top_k_linear(const float* x, int width, int k, Vector gain, float eps, Vector score, Matrices matrices,
             const float* residual, float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.y;
    const unsigned rank = cluster_rank<CLUSTER>();
    const Outputs tile(matrices, static_cast<int>(blockIdx.x) / CLUSTER);

    cluster_begin<CLUSTER>();
    prepare(shared.ranking);
    const Factors<SCORE> scores(score, width);
    Activation activation(x, row, width, gain, eps);
    wait_for_inputs();

    float entries[EACH];
    unsigned keep;
    const Digit digit = choose(shared.ranking, activation, scores, k, entries, keep);
    const unsigned kept = __reduce_add_sync(ALL_LANES, __popc(keep));
    if (Threads::lane() == 0) shared.kept[Threads::warp()] = kept;
    __syncthreads();
    // Of those that are certain this block takes a stretch, and then of the candidates every CLUSTER-th by their rank.
    const unsigned certain = k - digit.need;
    const unsigned begin = certain * rank / CLUSTER;
    const unsigned end = certain * (rank + 1) / CLUSTER;
    place_kept(keep, Threads::before(shared.kept), [&](int i, unsigned at, unsigned kept) {
        if (kept && begin <= at && at < end)
            shared.entries[at - begin] = {entries[i], (activation.first + i * 32) * tile.stride()};
    });
    compare(shared.ranking, digit.there, digit.need, [&](unsigned bits, unsigned larger) {
        if (larger % CLUSTER != rank) return;
        const unsigned index = LAST - (bits & LAST);
        shared.entries[end - begin + larger / CLUSTER] = {activation.entry_at(index), index * tile.stride()};
    });
    __syncthreads();
    const unsigned count = end - begin + (digit.need + CLUSTER - 1 - rank) / CLUSTER;
    float sum[WIDTH<WEIGHT>] = {};
    if (count > 0) add_listed<GROUPS>(sum, shared.entries, group(), static_cast<int>(count), tile.weights(), tile.there);
    release_dependents();
    finish(shared.sums, tile, sum, residual ? residual + row * outputs : nullptr, result + row * outputs);
}

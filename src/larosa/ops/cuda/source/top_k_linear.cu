// y = residual + x W^T + b for the k largest entries of x, which each block finds for itself: that takes less time than
// to be told of them by another kernel.
//
// So it is where no multiprocessor has more than one block, for which 512 threads take more than half of the registers.
constexpr int DEPTH = 5;  // loads in flight in each thread

#include "columns.cuh"
#include "selection.cuh"

static_assert(IN_REGISTERS, "longer vectors are selected from by a kernel of their own");

struct Shared {
    Ranking ranking;
    unsigned kept[WARPS];  // entries that are certain, and in the upper half candidates, by warp
    float candidate_values[MOST];
    Entry entries[MOST_KEPT / CLUSTER + 2];
    Sums sums;
};

SHARED(Shared);

// The factor of all sums, made while a thread waits for its last columns.
struct Factor {
    const Ranking& ranking;
    const Activation& activation;
    float factor = 1.0f;

    DEVICE void at_last() { factor = Chosen::end_factor(ranking, activation); }
};

KERNEL(THREADS, 1)
top_k_linear(const float* x, int width, int k, Vector gain, float eps, Vector score, Matrices matrices,
             const float* residual, float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.y;
    const unsigned rank = cluster_rank<CLUSTER>();
    const Outputs tile(matrices, static_cast<int>(blockIdx.x) / CLUSTER);

    begin(shared.sums);
    prepare(shared.ranking);
    const Factors<SCORE> scores(score, width);
    const Activation activation(x, row, width, gain, eps);
    wait_for_inputs();

    const Chosen chosen = choose(shared.ranking, activation, scores, k);
    const unsigned own = __popc(chosen.keep) + (__popc(chosen.open) << 16);
    const unsigned up_to = Threads::up_to(own);
    if (Threads::lane() == 31) shared.kept[Threads::warp()] = up_to;
    __syncthreads();
    // Of those that are certain this block takes a stretch, and then of the candidates every CLUSTER-th by their rank.
    const unsigned need = chosen.digit.need;
    const unsigned certain = k - need;
    const unsigned begin = certain * rank / CLUSTER;
    const unsigned end = certain * (rank + 1) / CLUSTER;
    const unsigned before = Threads::before(shared.kept) + up_to - own;
    unsigned place = (before & 0xffffu) - begin;
    unsigned candidate = before >> 16;
    unsigned stride = tile.stride();
    settle(stride);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const bool keep = chosen.keep & 1u << i;
        const Entry entry{chosen.x[i], (activation.first + i * 32) * stride};
        entry.put(shared.entries + place, keep && place < end - begin);
        if (keep) ++place;
        if (chosen.open >> i & 1u) {
            shared.ranking.candidates[candidate] = chosen.rest(i, activation.first);
            shared.candidate_values[candidate] = chosen.x[i];
            ++candidate;
        }
    }
    __syncthreads();
    chosen.begin_factor(shared.ranking);
    compare(shared.ranking, chosen.digit.there, need, [&](unsigned candidate, unsigned rest, unsigned larger) {
        if (larger % CLUSTER == rank)
            shared.entries[end - begin + larger / CLUSTER] = {shared.candidate_values[candidate],
                                                              Chosen::index(rest) * stride};
    });
    __syncthreads();
    const unsigned count = end - begin + (need + CLUSTER - 1 - rank) / CLUSTER;
    Sum sum = {};
    Factor last{shared.ranking, activation};
    auto columns = tile.columns();
    if (count > 0)
        add_listed<GROUPS>(sum, shared.entries, group(), static_cast<int>(count), columns, last);
    else
        last.at_last();
    columns.end(sum);
    release_dependents();
    finish(shared.sums, tile, sum, last.factor, residual ? residual + row * outputs : nullptr, result + row * outputs,
           outputs);
}

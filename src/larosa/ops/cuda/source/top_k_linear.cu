// y = residual + x W^T + b for the k largest entries of x, which each block finds for itself: that takes less time than
// to be told of them by another kernel.
//
// So it is where no multiprocessor has more than one block, for which 512 threads take more than half of the registers.
constexpr int DEPTH = 6;  // loads in flight in each thread

#include "columns.cuh"
#include "selection.cuh"

static_assert(IN_REGISTERS, "longer vectors are selected from by a kernel of their own");

#ifndef AHEAD
#error "AHEAD, the pieces that each thread asks for while candidates are compared, is given by the launcher"
#endif

struct Shared {
    Ranking ranking;
    unsigned kept[WARPS];  // entries that are certain, and in the upper half candidates, by warp
    float candidate_values[MOST];
    Entry entries[MOST_KEPT / CLUSTER + 2];
    Sums sums;
    uint4 early[AHEAD > 0 ? AHEAD : 1][THREADS];
};

SHARED(Shared);

// What is asked for as soon as the certain entries are listed, and used when the last columns are under way: the first pieces
// of columns, through shared memory, because loads to registers would be waited for by what is compared meanwhile.
struct Early : Nothing {
    const Shared& shared;
    const Activation& activation;
    const int count;  // of the entries, those that are read early
    float factor;

    DEVICE Early(Shared& shared, const Activation& activation, int certain, const WEIGHT* weights)
        : shared(shared), activation(activation), count(min(certain, AHEAD * GROUPS)) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const unsigned offset = there(i) ? shared.entries[entry(i)].offset : 0;
            copy_later(shared.early[i][threadIdx.x], at_offset(weights, offset), there(i));
        }
        copies_issued();
    }

    DEVICE int entry(int i) const { return i * GROUPS + group(); }
    DEVICE bool there(int i) const { return entry(i) < count && group() < GROUPS; }

    DEVICE void at_last(float (&sum)[WIDTH<WEIGHT>]) {
        factor = Chosen::end_factor(shared.ranking, activation);
        copies_arrived<0>();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            Packed piece;
            piece.data = shared.early[i][threadIdx.x];
            add(sum, there(i) ? shared.entries[entry(i)].value : 0.0f, piece);
        }
    }
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
    const unsigned own = chosen.count();
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
        const bool keep = chosen.keeps(i);
        const Entry entry{chosen.x[i], (activation.first + i * 32) * stride};
        entry.put(shared.entries + place, keep && place < end - begin);
        if (keep) ++place;
        if (chosen.candidate(i)) {
            shared.ranking.candidates[candidate] = chosen.rest(i, activation.first);
            shared.candidate_values[candidate] = chosen.x[i];
            ++candidate;
        }
    }
    __syncthreads();
    Early early(shared, activation, static_cast<int>(end - begin), tile.weights());
    const float base = Finished(tile).base(residual ? residual + row * outputs : nullptr);
    chosen.begin_factor(shared.ranking);
    compare(shared.ranking, chosen.digit.there, need, [&](unsigned candidate, unsigned rest, unsigned larger) {
        if (larger % CLUSTER == rank)
            shared.entries[end - begin + larger / CLUSTER] = {shared.candidate_values[candidate],
                                                              Chosen::index(rest) * stride};
    });
    __syncthreads();
    const int count = static_cast<int>(end - begin + (need + CLUSTER - 1 - rank) / CLUSTER) - early.count;
    float sum[WIDTH<WEIGHT>] = {};
    if (count > 0)
        add_listed<GROUPS>(sum, shared.entries + early.count, group(), count, tile.weights(), tile.there, early);
    else
        early.at_last(sum);
    release_dependents();
    finish(shared.sums, tile, sum, early.factor, base, result + row * outputs);
}

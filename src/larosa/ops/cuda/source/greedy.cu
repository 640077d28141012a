// The index of the largest of a row of logits, by one cluster of blocks.
#include "block.cuh"

#ifndef CLUSTER
#error "CLUSTER is given by the launcher"
#endif

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int DEPTH = 4;  // loads in flight in each thread
using Threads = Block<THREADS>;

// Orders as the numbers do, with NaN the largest.
DEVICE unsigned order_of(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return 0xffffffffu;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

constexpr unsigned INFINITE = 0xff800000u;           // from here on they are infinite or NaN
constexpr unsigned NEGATIVE_INFINITE = 0x007fffffu;  // and up to here

// The largest so far, and of equal ones the first.
struct Best {
    unsigned order = 0;
    unsigned index = 0xffffffffu;

    DEVICE void meet(Best other) {
        if (other.order > order || (other.order == order && other.index < index)) *this = other;
    }

    // Over the lanes of a warp; all get it.
    DEVICE Best of_warp() const {
        Best best;
        best.order = __reduce_max_sync(ALL_LANES, order);
        best.index = ~__reduce_max_sync(ALL_LANES, order == best.order ? ~index : 0u);
        return best;
    }
};

struct Shared {
    Best warps[WARPS];
    float orders[CLUSTER];  // of the blocks of the cluster, as bits
    float indices[CLUSTER];
    Mailbox mailbox;
};

SHARED(Shared);

KERNEL(THREADS, 1)
greedy(const float* logits, int vocabulary, long long* tokens) {
    constexpr int STEP = CLUSTER * THREADS;
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    logits += static_cast<long long>(blockIdx.y) * vocabulary;

    cluster_begin<CLUSTER>(shared.mailbox, rank == 0 ? 2 * CLUSTER : 0);
    wait_for_inputs();
    release_dependents();
    Best best;
    for (int from = rank * THREADS + thread; from < vocabulary; from += DEPTH * STEP) {
        float x[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) x[j] = load_fresh(logits + from + j * STEP, from + j * STEP < vocabulary);
#pragma unroll
        for (int j = 0; j < DEPTH; ++j)
            if (from + j * STEP < vocabulary) {
                Best other;
                other.order = order_of(x[j]);
                other.index = static_cast<unsigned>(from + j * STEP);
                best.meet(other);
            }
    }
    best = best.of_warp();
    if (Threads::lane() == 0) shared.warps[Threads::warp()] = best;
    cluster_begun<CLUSTER>();
    __syncthreads();
    if (thread < 32) {
        best = shared.warps[thread].of_warp();
        if (thread == 0) {
            cluster_send<CLUSTER>(shared.mailbox, shared.orders[rank], 0, __uint_as_float(best.order));
            cluster_send<CLUSTER>(shared.mailbox, shared.indices[rank], 0, __uint_as_float(best.index));
        }
    }
    cluster_received<CLUSTER>(shared.mailbox);
    if (rank != 0 || thread != 0) return;
    for (int block = 0; block < CLUSTER; ++block) {
        Best other;
        other.order = __float_as_uint(shared.orders[block]);
        other.index = __float_as_uint(shared.indices[block]);
        best.meet(other);
    }
    const bool usable = best.order > NEGATIVE_INFINITE && best.order < INFINITE;
    tokens[blockIdx.y] = usable ? static_cast<long long>(best.index) : -1;  // NO_TOKEN in ops/greedy.py
}

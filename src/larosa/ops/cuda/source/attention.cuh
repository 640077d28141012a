// What the kernels of attention have in common: what is done before the first score and after the last.
//
// A cluster of CLUSTER blocks serves HEADS query heads that share a key head, each block a stretch of positions. Each
// warp of a block works on a part of them with a running softmax (maximum, sum, weighted values); warps and blocks are
// merged at the end, in a fixed order. Scores are logarithms to the base 2.
#ifndef LAROSA_ATTENTION
#define LAROSA_ATTENTION

#include "vectors.cuh"

#ifndef CACHE
#error "CACHE, SIZE, HEADS, CLUSTER and THREADS are given by the launcher"
#endif

constexpr int WARPS = THREADS / 32;

// The maximum of no scores: -infinity.
DEVICE float none() { return __uint_as_float(0xff800000u); }

// By which what was summed under `maximum` counts under a larger one; nothing was summed under -infinity.
DEVICE float rescale(float maximum, float larger) {
    return maximum == none() ? 0.0f : power_of_two(maximum - larger);
}

// Of one softmax over some positions. Of `weighted` it has every EACH-th entry.
template <int EACH>
struct Partial {
    static_assert(SIZE % EACH == 0, "each block has as many");

    float maximum;
    float sum;
    float weighted[SIZE / EACH];
};

struct Rotary {
    const float* cos;  // [T, SIZE], null without rotation
    const float* sin;
    Vector q_gain;
    Vector k_gain;
    float eps;
    float scale;
};

// The positions that a block of the cluster attends to.
struct Stretch {
    int begin;
    int end;
};

DEVICE Stretch stretch_of(int position, int window, int rank) {
    const int start = window > 0 ? max(0, position + 1 - window) : 0;
    const long long seen = position + 1 - start;
    return {start + static_cast<int>(seen * rank / CLUSTER), start + static_cast<int>(seen * (rank + 1) / CLUSTER)};
}

// Norms and rotates one head with one warp; `put(i, x)` takes the entries.
template <class Put>
DEVICE void prepare(const float* head, bool normed, const Vector& gain, const Rotary& rotary, int position, Put put) {
    constexpr int HALF = SIZE / 2;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float inverse = 1.0f;
    if (normed) {
        float squares = 0.0f;
        for (int i = lane; i < SIZE; i += 32) {
            const float x = load_fresh(head + i);
            squares = fmaf(x, x, squares);
        }
        inverse = 1.0f / sqrtf(warp_sum(squares) / SIZE + rotary.eps);
    }
    for (int i = lane; i < HALF; i += 32) {
        const float first = load_fresh(head + i) * inverse * gain.at(i, 1.0f);
        const float second = load_fresh(head + HALF + i) * inverse * gain.at(HALF + i, 1.0f);
        if (rotary.cos == nullptr) {
            put(i, first);
            put(HALF + i, second);
        } else {
            const float* cos = rotary.cos + static_cast<long long>(position) * SIZE + i;
            const float* sin = rotary.sin + static_cast<long long>(position) * SIZE + i;
            put(i, first * cos[0] - second * sin[0]);
            put(HALF + i, second * cos[HALF] + first * sin[HALF]);
        }
    }
}

// Rounds an entry of this position's key or value for the cache, and keeps it at hand.
DEVICE void keep(float x, CACHE& at_hand, CACHE& in_cache) {
    narrow(x, at_hand);
    in_cache = at_hand;
}

// COUNT partial softmaxes in one, as far as entry i of the head goes; `at(p)` is the p-th.
struct Merged {
    float maximum;
    float sum;
    float entry;
};

template <int EACH, int COUNT, class At>
DEVICE Merged merged(int i, At at) {
    Merged all = {none(), 0.0f, 0.0f};
    for (int p = 0; p < COUNT; ++p) all.maximum = fmaxf(all.maximum, at(p).maximum);
    for (int p = 0; p < COUNT; ++p) {
        const Partial<EACH>& partial = at(p);
        const float scale = rescale(partial.maximum, all.maximum);
        all.sum = fmaf(scale, partial.sum, all.sum);
        all.entry = fmaf(scale, partial.weighted[i % SIZE / EACH], all.entry);
    }
    return all;
}

// What the blocks of a cluster have found, for this one.
template <int EACH>
struct Found {
    Partial<EACH> by[CLUSTER][HEADS];
    Mailbox mailbox;
};

// Says that the block has begun. Block r finishes every CLUSTER-th entry from the r-th on, and gets of each block theirs
// and each head's maximum and sum.
template <int EACH>
DEVICE void begin(Found<EACH>& found) {
    const int entries = (HEADS * SIZE - cluster_rank<CLUSTER>() + CLUSTER - 1) / CLUSTER;
    cluster_begin<CLUSTER>(found.mailbox, CLUSTER * (entries + 2 * HEADS));
}

// Merges what warps have found, `of_warp(w, h)` being warp w's of head h, and then blocks of the cluster.
template <int EACH, class OfWarp>
DEVICE void finish(Found<EACH>& found, int first_head, OfWarp of_warp, float* result) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    cluster_begun<CLUSTER>();
    __syncthreads();
    for (int i = thread; i < HEADS * SIZE; i += THREADS) {
        const int h = i / SIZE;
        const Merged own = merged<1, WARPS>(i, [&](int w) -> const Partial<1>& { return of_warp(w, h); });
        Partial<EACH>& mine = found.by[rank][h];
        cluster_send<CLUSTER>(found.mailbox, mine.weighted[i % SIZE / EACH], i % CLUSTER, own.entry);
        for (int to = i % SIZE; to < CLUSTER; to += SIZE) {
            cluster_send<CLUSTER>(found.mailbox, mine.maximum, to, own.maximum);
            cluster_send<CLUSTER>(found.mailbox, mine.sum, to, own.sum);
        }
    }
    cluster_received<CLUSTER>(found.mailbox);
    for (int i = rank + thread * CLUSTER; i < HEADS * SIZE; i += THREADS * CLUSTER) {
        const int h = i / SIZE;
        const Merged all = merged<EACH, CLUSTER>(i, [&](int b) -> const Partial<EACH>& { return found.by[b][h]; });
        result[first_head * SIZE + i] = all.entry / all.sum;
    }
}

#endif

// One position's attention over the cache.
//
// A cluster of CLUSTER blocks serves HEADS query heads that share a key head, each block a stretch of positions; what
// they find is merged at the end, in a fixed order.
#include "attention.cuh"

#ifndef HEADS
#error "HEADS and CLUSTER are given by the launcher"
#endif

constexpr int THREADS = 256;

using Shared = Attention<THREADS, HEADS>;

SHARED(Shared);

KERNEL(THREADS, 1)
attend(const float* qkv, CACHE* keys, CACHE* values, const long long* positions, Rotary rotary, int length,
       int query_heads, int key_heads, int window, float* result) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int team = static_cast<int>(blockIdx.x) / CLUSTER;       // of the clusters
    const int first_head = team * HEADS;                           // of its query heads
    const int key_head = first_head / (query_heads / key_heads);
    keys += static_cast<long long>(key_head) * length * SIZE;
    values += static_cast<long long>(key_head) * length * SIZE;

    release_dependents();
    if (thread < 64 && thread % 32 == 0) {
        const int position = static_cast<int>(max(0ll, min(guess(positions), length - 1ll)));
        const Stretch stretch = stretch_of(position, window, rank, CLUSTER);
        prefetch((thread ? values : keys) + static_cast<long long>(stretch.begin) * SIZE,
                 static_cast<unsigned>((stretch.end - stretch.begin) * SIZE * sizeof(CACHE)));
    }
    wait_for_inputs();

    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const long long asked = load_fresh(positions);
    const bool inside = asked >= 0 && asked < length;
    const int position = inside ? static_cast<int>(asked) : 0;
    const Stretch stretch = inside ? stretch_of(position, window, rank, CLUSTER) : Stretch{0, 0};

    // The last block, whose stretch ends at this position, adds it to the cache.
    shared.prepare_heads(qkv, first_head, query_heads, key_head, key_heads, rotary, position,
                         rank == CLUSTER - 1 && inside, keys, values);
    shared.over(keys, values, stretch);
    cluster_sync<CLUSTER>();
    // Block r of the cluster finishes every CLUSTER-th entry from the r-th on.
    for (int i = rank + thread * CLUSTER; i < HEADS * SIZE; i += THREADS * CLUSTER) {
        const Partial& partial = shared.block[i / SIZE];
        const Summed all = merged(CLUSTER, [&](int b) {
            return Summed{cluster_load<CLUSTER>(partial.maximum, b), cluster_load<CLUSTER>(partial.sum, b),
                          cluster_load<CLUSTER>(partial.weighted[i % SIZE], b)};
        });
        result[first_head * SIZE + i] = all.entry / all.sum;
    }
    if constexpr (CLUSTER > 1) cluster_sync<CLUSTER>();
}

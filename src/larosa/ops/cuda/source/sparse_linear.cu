// y = residual + x W^T + b for an x that is given by its k entries: reads the columns of W at their indices.
//
// W is column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a part
// of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Partial sums meet
// in shared memory, first of the block, then of the cluster.
//
// With an ADAPTER it is residual R^T instead of the residual. That reads memory while the list is still being made, and
// goes into the same sums.
#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER, ALIGNED and ADAPTER are given by the launcher"
#endif

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = LANES * WIDTH<WEIGHT>;
constexpr int DEPTH = 8;     // loads in flight in each thread
constexpr int CHUNK = 1024;  // entries of the list held in shared memory

struct Entry {
    float value;
    unsigned offset;  // of its column, in elements
};

// The entries that a product reads, and how far apart columns are.
struct Listed {
    const float* values;
    const int* indices;
    unsigned stride;

    DEVICE Entry at(int i) const { return {load_fresh(values + i), load_fresh(indices + i) * stride}; }
};

// All entries of a vector, which was there before the kernel in front of this one began.
struct Carried {
    const float* values;
    unsigned stride;

    DEVICE Entry at(int i) const { return {load_earlier(values + i), i * stride}; }
};

struct Shared {
    Entry entries[CHUNK];
    float sums[WARPS][TILE];
    float total[TILE];
};

SHARED(Shared);

using Packed = Pack<WEIGHT>;

// Adds DEPTH entries, GROUPS apart; those from `count` on are not there unless ALL are.
template <bool ALL>
DEVICE void add_batch(float (&sum)[WIDTH<WEIGHT>], const Entry* entries, int count, const WEIGHT* weights, int there) {
    Packed pack[DEPTH];  // what is not loaded is zero, so it adds nothing even where a weight is infinite
    float value[DEPTH];
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
        value[j] = 0.0f;
        if (ALL || j * GROUPS < count) {
            const Entry entry = entries[j * GROUPS];
            value[j] = entry.value;
            pack[j].template load<ALIGNED>(at_offset(weights, entry.offset), ALIGNED ? WIDTH<WEIGHT> : there);
        }
    }
#pragma unroll
    for (int j = 0; j < DEPTH; ++j)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = fmaf(value[j], widen(pack[j].weight[e]), sum[e]);
}

// Adds this block's part of `count` entries, each group of threads every GROUPS-th from its own number on.
template <class Entries>
DEVICE void add(float (&sum)[WIDTH<WEIGHT>], Shared& shared, Entries entries, int count, const WEIGHT* weights,
                int there) {
    constexpr int BATCH = DEPTH * GROUPS;
    const int rank = cluster_rank<CLUSTER>();
    const int begin = static_cast<int>(static_cast<long long>(count) * rank / CLUSTER);
    const int end = static_cast<int>(static_cast<long long>(count) * (rank + 1) / CLUSTER);
    for (int start = begin; start < end; start += CHUNK) {
        const int here = min(CHUNK, end - start);
        __syncthreads();  // what stood here has been read
        for (int i = static_cast<int>(threadIdx.x); i < here; i += THREADS) shared.entries[i] = entries.at(start + i);
        __syncthreads();
        int i = static_cast<int>(threadIdx.x) / LANES;
        for (; i + BATCH - GROUPS < here; i += BATCH) add_batch<true>(sum, shared.entries + i, BATCH, weights, there);
        if (i < here) add_batch<false>(sum, shared.entries + i, here - i, weights, there);
    }
}

KERNEL(THREADS, 3)
sparse_linear(const float* values, const int* indices, int k, Matrices matrices, const float* residual,
              const void* adapter, unsigned adapter_stride, int width, float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int tile = static_cast<int>(blockIdx.x) / CLUSTER;
    const long long row = blockIdx.y;
    const Matrix& matrix = matrices.of(tile);
    const int first = (tile - static_cast<int>(matrix.tile)) * TILE;  // of the tile, in its matrix
    // Of this thread's outputs; beyond the matrix it reads the last whole piece again, and the sum is not used.
    const int own = first + thread % LANES * WIDTH<WEIGHT>;
    const int mine = ALIGNED ? min(own, static_cast<int>(matrix.outputs) - WIDTH<WEIGHT>) : own;
    const int there = static_cast<int>(matrix.outputs) - mine;
    const WEIGHT* weights = static_cast<const WEIGHT*>(matrix.weights) + mine;
    const unsigned stride = static_cast<unsigned>(matrix.stride);

    float sum[WIDTH<WEIGHT>] = {};
    if constexpr (ADAPTER)
        add(sum, shared, Carried{residual + row * width, adapter_stride}, width,
            static_cast<const WEIGHT*>(adapter) + matrix.first + mine, there);
    wait_for_inputs();
    release_dependents();

    // One thread of the cluster finishes each output; what it adds to the sum is on its way meanwhile.
    const int finished = rank * (TILE / CLUSTER) + thread;
    const bool finishes = thread < TILE / CLUSTER && first + finished < matrix.outputs;
    const long long place = row * outputs + matrix.first + first + finished;
    float bias = 0.0f;
    float before = 0.0f;
    if (!ADAPTER && finishes && residual) before = load_fresh(residual + place);
    if (finishes) bias = matrix.bias.at(first + finished, 0.0f);

    add(sum, shared, Listed{values + row * k, indices + row * k, stride}, k, weights, there);

    // Groups of one warp, warps of the block, blocks of the cluster.
#pragma unroll
    for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = warp_sum(sum[e], LANES);
    if (thread % 32 < LANES)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) shared.sums[thread / 32][thread % LANES * WIDTH<WEIGHT> + e] = sum[e];
    __syncthreads();
    if (thread < TILE) {
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) total += shared.sums[warp][thread];
        shared.total[thread] = total;
    }
    cluster_sync<CLUSTER>();
    if (finishes) {
        float total = 0.0f;
        for (int from = 0; from < CLUSTER; ++from) total += cluster_load<CLUSTER>(shared.total[finished], from);
        result[place] = before + (total + bias);
    }
    if constexpr (CLUSTER > 1) cluster_sync<CLUSTER>();  // shared memory stays until all have read it
}

// y = residual + x W^T + b for an x that is given by its k entries: reads the columns of W at their indices.
//
// W is column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a part
// of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Partial sums meet
// in shared memory, first of the block, then of the cluster, each output's in the block that finishes it.
//
// With an ADAPTER it is residual R^T instead of the residual. That reads memory while the list is still being made, and
// goes into the same sums.
#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER, ALIGNED and ADAPTER are given by the launcher"
#endif

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = LANES * WIDTH<WEIGHT>;
constexpr int DEPTH = 5;  // loads in flight in each thread: as many as there are registers for
constexpr int CHUNK = 2048;                            // entries of the list held in shared memory
constexpr int SHARE = (TILE + CLUSTER - 1) / CLUSTER;  // outputs that a block finishes

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
    float found[CLUSTER][SHARE];  // by the blocks of the cluster, for this one
};

SHARED(Shared);

using Packed = Pack<WEIGHT>;

DEVICE void add(float (&sum)[WIDTH<WEIGHT>], float value, const Packed& pack) {
#pragma unroll
    for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = fmaf(value, widen(pack.weight[e]), sum[e]);
}

DEVICE void load(Packed& pack, const WEIGHT* from, int there) {
    pack.template load<ALIGNED>(from, ALIGNED ? WIDTH<WEIGHT> : there);
}

// Adds entries of a list in shared memory, each group of threads every GROUPS-th from its own number on. As soon as one
// load has been added, the next takes its registers, so that DEPTH are under way from first to last.
DEVICE void add_listed(float (&sum)[WIDTH<WEIGHT>], const Entry* entries, int count, const WEIGHT* weights, int there) {
    constexpr int BATCH = DEPTH * GROUPS;
    int from = static_cast<int>(threadIdx.x) / LANES;
    Packed pack[DEPTH];
#pragma unroll
    for (int j = 0; j < DEPTH; ++j)  // without a condition in between, or the compiler waits at each
        load(pack[j], at_offset(weights, entries[min(from + j * GROUPS, count - 1)].offset), there);
#pragma unroll 1
    for (; from + 2 * BATCH - GROUPS < count; from += BATCH) {
        float value[DEPTH];
        const WEIGHT* next[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            value[j] = entries[from + j * GROUPS].value;
            next[j] = at_offset(weights, entries[from + j * GROUPS + BATCH].offset);
        }
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            add(sum, value[j], pack[j]);
            load(pack[j], next[j], there);
        }
    }
    // Fewer than two batches are left. What is not listed must be zero: it counts nothing even where a weight is infinite.
    Packed last[DEPTH];
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
        const int i = from + j * GROUPS + BATCH;
        const WEIGHT* next = at_offset(weights, entries[min(i, count - 1)].offset);
        if (i < count) load(last[j], next, there);
    }
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
        const int i = from + j * GROUPS;
        if (i >= count) pack[j] = Packed();
        add(sum, i < count ? entries[i].value : 0.0f, pack[j]);
    }
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
        const int i = from + j * GROUPS + BATCH;
        add(sum, i < count ? entries[i].value : 0.0f, last[j]);
    }
}

// Adds this block's part of `count` entries.
template <class Entries>
DEVICE void add(float (&sum)[WIDTH<WEIGHT>], Shared& shared, Entries entries, int count, const WEIGHT* weights,
                int there) {
    const int rank = cluster_rank<CLUSTER>();
    const int begin = static_cast<int>(static_cast<long long>(count) * rank / CLUSTER);
    const int end = static_cast<int>(static_cast<long long>(count) * (rank + 1) / CLUSTER);
    for (int start = begin; start < end; start += CHUNK) {
        const int here = min(CHUNK, end - start);
        __syncthreads();  // what stood here has been read
        for (int i = static_cast<int>(threadIdx.x); i < here; i += THREADS) shared.entries[i] = entries.at(start + i);
        __syncthreads();
        add_listed(sum, shared.entries, here, weights, there);
    }
}

KERNEL(THREADS, 2)
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

    cluster_begin<CLUSTER>();
    float sum[WIDTH<WEIGHT>] = {};
    if constexpr (ADAPTER)
        add(sum, shared, Carried{residual + row * width, adapter_stride}, width,
            static_cast<const WEIGHT*>(adapter) + matrix.first + mine, there);
    wait_for_inputs();
    release_dependents();

    add(sum, shared, Listed{values + row * k, indices + row * k, stride}, k, weights, there);

    // One thread of the cluster finishes each output; what it adds to the sum is on its way while sums meet.
    const int finished = rank * SHARE + thread;
    const bool finishes = thread < SHARE && finished < TILE && first + finished < matrix.outputs;
    const long long place = row * outputs + matrix.first + first + finished;
    float bias = 0.0f;
    float before = 0.0f;
    if (!ADAPTER && finishes && residual) before = load_fresh(residual + place);
    if (finishes) bias = matrix.bias.at(first + finished, 0.0f);

    // Groups of one warp, warps of the block, blocks of the cluster.
#pragma unroll
    for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = warp_sum(sum[e], LANES);
    if (thread % 32 < LANES)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) shared.sums[thread / 32][thread % LANES * WIDTH<WEIGHT> + e] = sum[e];
    cluster_begun<CLUSTER>();
    __syncthreads();
    if (thread < TILE) {
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) total += shared.sums[warp][thread];
        cluster_store<CLUSTER>(shared.found[rank][thread % SHARE], thread / SHARE, total);
    }
    cluster_sync<CLUSTER>();
    if (finishes) {
        float total = 0.0f;
        for (int from = 0; from < CLUSTER; ++from) total += shared.found[from][thread];
        result[place] = before + (total + bias);
    }
}

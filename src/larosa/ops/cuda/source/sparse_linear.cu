// y = residual + x W^T + b for an x that is given by its k entries: reads the columns of W at their indices.
//
// W is column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a part
// of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Partial sums meet
// in shared memory, first of the block, then of the cluster, each output's in the block that finishes it.
//
// While the list is still being made, memory idles. So a dense product with an early vector, one that is there already,
// may go ALONG, into the same sums, or BESIDE, with sums of its own that each block keeps a part of.
#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER, ALIGNED and EARLY (NONE, ALONG or BESIDE) are given by the launcher"
#endif

enum Early { NONE, ALONG, BESIDE };
constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = LANES * WIDTH<WEIGHT>;
constexpr int DEPTH = 5;     // loads in flight in each thread: as many as there are registers for
constexpr int CHUNK = 2048;  // entries of the list held in shared memory
constexpr int SHARE = TILE / CLUSTER;  // outputs that a block finishes

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

// The early product: x, which was there before the kernel in front of this one began, and a column-major matrix.
struct EarlyProduct {
    const float* x;
    const void* matrix;
    long long stride;
    int width, outputs;
    float* parts;  // BESIDE: [count, rows, outputs], whose sum over the first is the product
    int count, unused;

    DEVICE Entry at(int i) const { return {load_earlier(x + i), static_cast<unsigned>(i * stride)}; }
};

// A part of 0 to count - 1: of equal parts, the rank-th.
DEVICE int part_of(int count, int rank, int parts) {
    return static_cast<int>(static_cast<long long>(count) * rank / parts);
}

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
    if constexpr (ALIGNED)
        pack.data = load_once(from);
    else
        pack.template load<false>(from, there);
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

// Adds the entries from `begin` to before `end`.
template <class Entries>
DEVICE void add(float (&sum)[WIDTH<WEIGHT>], Shared& shared, const Entries& entries, int begin, int end,
                const WEIGHT* weights, int there) {
    for (int start = begin; start < end; start += CHUNK) {
        const int here = min(CHUNK, end - start);
        __syncthreads();  // what stood here has been read
        for (int i = static_cast<int>(threadIdx.x); i < here; i += THREADS) shared.entries[i] = entries.at(start + i);
        __syncthreads();
        add_listed(sum, shared.entries, here, weights, there);
    }
}

// The block's sum of the tile's t-th output, in thread t.
DEVICE float block_sum(float (&sum)[WIDTH<WEIGHT>], Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = warp_sum(sum[e], LANES);
    if (thread % 32 < LANES)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) shared.sums[thread / 32][thread % LANES * WIDTH<WEIGHT> + e] = sum[e];
    __syncthreads();
    float total = 0.0f;
    if (thread < TILE)
        for (int warp = 0; warp < WARPS; ++warp) total += shared.sums[warp][thread];
    return total;
}

// The first of this thread's outputs. Beyond the matrix it reads the last whole piece again, and the sum is not used.
DEVICE int output_of(int first, int outputs) {
    const int own = first + static_cast<int>(threadIdx.x) % LANES * WIDTH<WEIGHT>;
    return ALIGNED ? min(own, outputs - WIDTH<WEIGHT>) : own;
}

// Of the product beside, blocks take tiles of outputs and, of each, parts of the columns. The block's part of output
// `place` in one thread for each; elsewhere `place` is -1.
DEVICE float beside(const EarlyProduct& early, Shared& shared, long long& place) {
    const int thread = static_cast<int>(threadIdx.x);
    const int first = static_cast<int>(blockIdx.x) / early.count * TILE;
    const int rank = static_cast<int>(blockIdx.x) % early.count;
    place = -1;
    if (first >= early.outputs) return 0.0f;
    const int mine = output_of(first, early.outputs);
    float sum[WIDTH<WEIGHT>] = {};
    const EarlyProduct own = {early.x + static_cast<long long>(blockIdx.y) * early.width, nullptr, early.stride};
    add(sum, shared, own, part_of(early.width, rank, early.count), part_of(early.width, rank + 1, early.count),
        static_cast<const WEIGHT*>(early.matrix) + mine, early.outputs - mine);
    if (thread < TILE && first + thread < early.outputs)
        place = (static_cast<long long>(rank) * gridDim.y + blockIdx.y) * early.outputs + first + thread;
    return block_sum(sum, shared);
}

KERNEL(THREADS, 2)
sparse_linear(const float* values, const int* indices, int k, Matrices matrices, const float* added, int added_parts,
              EarlyProduct early, float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int tile = static_cast<int>(blockIdx.x) / CLUSTER;
    const long long row = blockIdx.y;
    const Matrix& matrix = matrices.of(tile);
    const int first = (tile - static_cast<int>(matrix.tile)) * TILE;  // of the tile, in its matrix
    const int mine = output_of(first, static_cast<int>(matrix.outputs));
    const int there = static_cast<int>(matrix.outputs) - mine;

    cluster_begin<CLUSTER>();
    float sum[WIDTH<WEIGHT>] = {};
    long long place_beside = -1;
    float part_beside = 0.0f;
    if constexpr (EARLY == ALONG) {
        const EarlyProduct own = {early.x + row * early.width, nullptr, early.stride};
        add(sum, shared, own, part_of(early.width, rank, CLUSTER), part_of(early.width, rank + 1, CLUSTER),
            static_cast<const WEIGHT*>(early.matrix) + matrix.first + mine, there);
    }
    if constexpr (EARLY == BESIDE) part_beside = beside(early, shared, place_beside);
    wait_for_inputs();
    release_dependents();
    if constexpr (EARLY == BESIDE) {
        if (place_beside >= 0) early.parts[place_beside] = part_beside;
        __syncthreads();  // the sums in shared memory have been read
    }

    add(sum, shared, Listed{values + row * k, indices + row * k, static_cast<unsigned>(matrix.stride)},
        part_of(k, rank, CLUSTER), part_of(k, rank + 1, CLUSTER), static_cast<const WEIGHT*>(matrix.weights) + mine,
        there);

    // One thread of the cluster finishes each output; what it adds to the sum is on its way while sums meet.
    const int finished = rank * SHARE + thread;
    const bool finishes = thread < SHARE && first + finished < matrix.outputs;
    const long long place = row * outputs + matrix.first + first + finished;
    float bias = 0.0f;
    float before = 0.0f;
    if (finishes) {
        bias = matrix.bias.at(first + finished, 0.0f);
        for (int part = 0; part < added_parts; ++part)
            before += load_fresh(added + static_cast<long long>(part) * gridDim.y * outputs + place);
    }
    const float own = block_sum(sum, shared);
    cluster_begun<CLUSTER>();
    if (thread < TILE) cluster_store<CLUSTER>(shared.found[rank][thread % SHARE], thread / SHARE, own);
    cluster_sync<CLUSTER>();
    if (finishes) {
        float total = 0.0f;
        for (int from = 0; from < CLUSTER; ++from) total += shared.found[from][thread];
        result[place] = before + (total + bias);
    }
}

// Columns of matrices times the entries of a list, added up: what sparse products have in common.
//
// Matrices are column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a
// part of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Partial sums meet
// in shared memory, first of the block, then of the cluster, each output's in the block that finishes it.
#ifndef LAROSA_COLUMNS
#define LAROSA_COLUMNS

#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER and ALIGNED are given by the launcher"
#endif

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = LANES * WIDTH<WEIGHT>;
constexpr int SHARE = (TILE + CLUSTER - 1) / CLUSTER;  // outputs that a block finishes

struct Entry {
    float value;
    unsigned offset;  // of its column, in elements
};

// What a thread adds up.
struct Outputs {
    const Matrix& matrix;
    const int first;  // of the tile, in its matrix
    const int mine;   // of this thread; beyond the matrix it reads the last whole piece again, and the sum is not used
    const int there;  // weights to be had from `mine` on

    DEVICE Outputs(const Matrices& matrices, int tile)
        : matrix(matrices.of(tile)),
          first((tile - static_cast<int>(matrix.tile)) * TILE),
          mine(ALIGNED ? min(own(), static_cast<int>(matrix.outputs) - WIDTH<WEIGHT>) : own()),
          there(static_cast<int>(matrix.outputs) - mine) {}

    DEVICE const WEIGHT* weights() const { return static_cast<const WEIGHT*>(matrix.weights) + mine; }
    DEVICE unsigned stride() const { return static_cast<unsigned>(matrix.stride); }

private:
    DEVICE int own() const { return first + static_cast<int>(threadIdx.x) % LANES * WIDTH<WEIGHT>; }
};

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

struct Sums {
    float warps[WARPS][TILE];
    float found[CLUSTER][SHARE];  // by the blocks of the cluster, for this one
};

// Writes residual + (sum + bias): groups of one warp, warps of the block, blocks of the cluster. One thread of the
// cluster finishes each output; what it adds to the sum is on its way while sums meet.
DEVICE void finish(Sums& sums, const Outputs& tile, float (&sum)[WIDTH<WEIGHT>], const float* residual, float* result) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int finished = rank * SHARE + thread;
    const bool finishes = thread < SHARE && finished < TILE && tile.first + finished < tile.matrix.outputs;
    const long long place = tile.matrix.first + tile.first + finished;
    float bias = 0.0f;
    float before = 0.0f;
    if (finishes && residual) before = load_fresh(residual + place);
    if (finishes) bias = tile.matrix.bias.at(tile.first + finished, 0.0f);

#pragma unroll
    for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = warp_sum(sum[e], LANES);
    if (thread % 32 < LANES)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) sums.warps[thread / 32][thread % LANES * WIDTH<WEIGHT> + e] = sum[e];
    cluster_begun<CLUSTER>();
    __syncthreads();
    if (thread < TILE) {
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) total += sums.warps[warp][thread];
        cluster_store<CLUSTER>(sums.found[rank][thread % SHARE], thread / SHARE, total);
    }
    cluster_sync<CLUSTER>();
    if (finishes) {
        float total = 0.0f;
        for (int from = 0; from < CLUSTER; ++from) total += sums.found[from][thread];
        result[place] = before + (total + bias);
    }
}

#endif

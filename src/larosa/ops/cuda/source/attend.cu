// One position's attention over the cache.
//
// A cluster of CLUSTER blocks serves HEADS query heads that share a key head, each block a stretch of positions.
// Groups of LANES threads hold one position's keys and values at a time, 16 bytes a thread, and carry a running
// softmax (maximum, sum, weighted values); groups, warps and blocks are merged at the end, in a fixed order. The first
// keys and values of each group are on their way before the queries are there.
#include "vectors.cuh"

#ifndef CACHE
#error "CACHE, SIZE, HEADS and CLUSTER are given by the launcher"
#endif

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PARTS = SIZE / WIDTH<CACHE>;  // threads that hold a vector
constexpr int LANES = PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int DEPTH = 4;  // positions a group has in flight
static_assert(SIZE % WIDTH<CACHE> == 0 && PARTS <= 32, "a head takes 1 to 32 pieces of 16 bytes");

using Packed = Pack<CACHE>;

// The maximum of no scores: -infinity.
DEVICE float none() { return __uint_as_float(0xff800000u); }

// Of one softmax over some positions.
struct Partial {
    float maximum;
    float sum;
    float weighted[SIZE];
};

struct Shared {
    alignas(16) CACHE key[SIZE];  // this position's, as the cache holds them
    alignas(16) CACHE value[SIZE];
    float queries[HEADS][SIZE];
    Partial warps[WARPS][HEADS];
    Partial found[CLUSTER][HEADS];  // by the blocks of the cluster; of `weighted`, what this one finishes
};

SHARED(Shared);

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

// By which what was summed under `maximum` counts under a larger one; nothing was summed under -infinity.
DEVICE float rescale(float maximum, float larger) {
    return maximum == none() ? 0.0f : expf(maximum - larger);
}

// The keys and values of one position for each of a group's loads.
struct Batch {
    Packed key[DEPTH];
    Packed value[DEPTH];

    // What is not there reads the last position again, and does not count.
    DEVICE void load(const CACHE* keys, const CACHE* values, int from, int end, int part) {
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const int at = from + j * GROUPS + static_cast<int>(threadIdx.x) / LANES;
            const long long place = static_cast<long long>(min(at, end - 1)) * SIZE + part;
            key[j].template load<true>(keys + place, WIDTH<CACHE>);
            value[j].template load<true>(values + place, WIDTH<CACHE>);
        }
    }
};

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

// COUNT partial softmaxes in one, as far as entry i of the head goes; `at(p)` is the p-th.
struct Merged {
    float maximum;
    float sum;
    float entry;
};

template <int COUNT, class At>
DEVICE Merged merged(int i, At at) {
    Merged all = {none(), 0.0f, 0.0f};
    for (int p = 0; p < COUNT; ++p) all.maximum = fmaxf(all.maximum, at(p).maximum);
    for (int p = 0; p < COUNT; ++p) {
        const Partial& partial = at(p);
        const float scale = rescale(partial.maximum, all.maximum);
        all.sum = fmaf(scale, partial.sum, all.sum);
        all.entry = fmaf(scale, partial.weighted[i % SIZE], all.entry);
    }
    return all;
}

// Merges the partial softmax of the lane `distance` away into this lane's.
DEVICE void merge_lanes(float& maximum, float& sum, float (&weighted)[WIDTH<CACHE>], int distance) {
    const float other = __shfl_xor_sync(ALL_LANES, maximum, distance);
    const float larger = fmaxf(maximum, other);
    const float own_scale = rescale(maximum, larger);
    sum *= own_scale;
    sum += __shfl_xor_sync(ALL_LANES, sum, distance);
#pragma unroll
    for (int e = 0; e < WIDTH<CACHE>; ++e) {
        weighted[e] *= own_scale;
        weighted[e] += __shfl_xor_sync(ALL_LANES, weighted[e], distance);
    }
    maximum = larger;
}

KERNEL(THREADS, 1)
attend(const float* qkv, CACHE* keys, CACHE* values, const long long* positions, Rotary rotary, int length,
       int query_heads, int key_heads, int window, float* result) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int rank = cluster_rank<CLUSTER>();
    const int team = static_cast<int>(blockIdx.x) / CLUSTER;       // of the clusters
    const int first_head = team * HEADS;                           // of its query heads
    const int key_head = first_head / (query_heads / key_heads);
    keys += static_cast<long long>(key_head) * length * SIZE;
    values += static_cast<long long>(key_head) * length * SIZE;

    const bool holds = thread % LANES < PARTS;
    const int part = holds ? thread % LANES * WIDTH<CACHE> : 0;

    cluster_begin<CLUSTER>();
    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const long long asked = load_earlier(positions);
    const bool inside = asked >= 0 && asked < length;
    const int position = inside ? static_cast<int>(asked) : 0;
    const auto [begin, end] = inside ? stretch_of(position, window, rank) : Stretch{0, 0};
    Batch batch;
    if (begin < end) batch.load(keys, values, begin, end, part);
    wait_for_inputs();
    release_dependents();

    // Queries go to shared memory; the last block, whose stretch ends at this position, adds it to the cache, and
    // takes it from shared memory itself.
    for (int head = warp; head < HEADS; head += WARPS)
        prepare(qkv + (first_head + head) * SIZE, rotary.q_gain.data != nullptr, rotary.q_gain, rotary, position,
                [&](int i, float x) { shared.queries[head][i] = x * rotary.scale; });
    if (rank == CLUSTER - 1 && inside) {
        const long long at = static_cast<long long>(position) * SIZE;
        if (warp == WARPS - 1)
            prepare(qkv + (query_heads + key_head) * SIZE, rotary.k_gain.data != nullptr, rotary.k_gain, rotary,
                    position, [&](int i, float x) {
                        narrow(x, shared.key[i]);
                        keys[at + i] = shared.key[i];
                    });
        const float* value = qkv + (query_heads + key_heads + key_head) * SIZE;
        for (int i = thread; i < SIZE; i += THREADS) {
            narrow(load_fresh(value + i), shared.value[i]);
            values[at + i] = shared.value[i];
        }
    }
    __syncthreads();

    float query[HEADS][WIDTH<CACHE>];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int e = 0; e < WIDTH<CACHE>; ++e) query[h][e] = holds ? shared.queries[h][part + e] : 0.0f;

    float maximum[HEADS];
    float sum[HEADS] = {};
    float weighted[HEADS][WIDTH<CACHE>] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) maximum[h] = none();

    // Whole warps stay in the loop together: they exchange scores.
    for (int from = begin; from < end; from += GROUPS * DEPTH) {
        if (from > begin) batch.load(keys, values, from, end, part);
        bool there[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const int at = from + j * GROUPS + thread / LANES;
            there[j] = at < end;
            if (at == position) {
                batch.key[j].data = *reinterpret_cast<const uint4*>(shared.key + part);
                batch.value[j].data = *reinterpret_cast<const uint4*>(shared.value + part);
            }
            if (!there[j]) batch.value[j] = Packed();
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float score[DEPTH];
            float larger = maximum[h];
#pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                float dot = 0.0f;
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e) dot = fmaf(query[h][e], widen(batch.key[j].weight[e]), dot);
#pragma unroll
                for (int lane = 1; lane < LANES; lane *= 2) dot += __shfl_xor_sync(ALL_LANES, dot, lane);
                score[j] = dot;
                if (there[j]) larger = fmaxf(larger, dot);
            }
            const float old = rescale(maximum[h], larger);
            sum[h] *= old;
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) weighted[h][e] *= old;
#pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                const float weight = there[j] ? rescale(score[j], larger) : 0.0f;
                sum[h] += weight;
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e)
                    weighted[h][e] = fmaf(weight, widen(batch.value[j].weight[e]), weighted[h][e]);
            }
            maximum[h] = larger;
        }
    }

#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2)
            merge_lanes(maximum[h], sum[h], weighted[h], distance);
        Partial& partial = shared.warps[warp][h];
        if (thread % 32 == 0) {
            partial.maximum = maximum[h];
            partial.sum = sum[h];
        }
        if (thread % 32 < LANES && holds)
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) partial.weighted[part + e] = weighted[h][e];
    }
    cluster_begun<CLUSTER>();
    __syncthreads();
    // Block r of the cluster finishes every CLUSTER-th entry from the r-th on.
    for (int i = thread; i < HEADS * SIZE; i += THREADS) {
        const int h = i / SIZE;
        const Merged own = merged<WARPS>(i, [&](int w) -> const Partial& { return shared.warps[w][h]; });
        Partial& found = shared.found[rank][h];
        cluster_store<CLUSTER>(found.weighted[i % SIZE], i % CLUSTER, own.entry);
        for (int to = i % SIZE; to < CLUSTER; to += SIZE) {
            cluster_store<CLUSTER>(found.maximum, to, own.maximum);
            cluster_store<CLUSTER>(found.sum, to, own.sum);
        }
    }
    cluster_sync<CLUSTER>();
    for (int i = rank + thread * CLUSTER; i < HEADS * SIZE; i += THREADS * CLUSTER) {
        const int h = i / SIZE;
        const Merged all = merged<CLUSTER>(i, [&](int b) -> const Partial& { return shared.found[b][h]; });
        result[first_head * SIZE + i] = all.entry / all.sum;
    }
}

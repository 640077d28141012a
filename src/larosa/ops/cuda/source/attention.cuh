// One position's attention over a stretch of the cache, by one block.
//
// Groups of HEAD_LANES threads hold one position's keys and values at a time, 16 bytes a thread, and carry a running
// softmax (maximum, sum, weighted values); groups and warps are merged at the end, in a fixed order.
#ifndef LAROSA_ATTENTION
#define LAROSA_ATTENTION

#include "vectors.cuh"

#ifndef CACHE
#error "CACHE and SIZE are given by the launcher"
#endif

constexpr int PARTS = SIZE / WIDTH<CACHE>;  // threads that hold a vector
constexpr int HEAD_LANES = PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32;
constexpr int POSITIONS = 4;  // that a group has in flight
static_assert(SIZE % WIDTH<CACHE> == 0 && PARTS <= 32, "a head takes 1 to 32 pieces of 16 bytes");

// The maximum of no scores: -infinity.
DEVICE float none() { return __uint_as_float(0xff800000u); }

// Of one softmax over some positions.
struct Partial {
    float maximum;
    float sum;
    float weighted[SIZE];
};

struct Rotary {
    const float* cos;  // [T, SIZE], null without rotation
    const float* sin;
    Vector q_gain;
    Vector k_gain;
    float eps;
    float scale;
};

// Positions of the cache.
struct Stretch {
    int begin;
    int end;
};

// The part `rank` out of `parts` of the positions that are seen from one.
DEVICE Stretch stretch_of(int position, int window, int rank, int parts) {
    const int start = window > 0 ? max(0, position + 1 - window) : 0;
    const long long seen = position + 1 - start;
    return {start + static_cast<int>(seen * rank / parts), start + static_cast<int>(seen * (rank + 1) / parts)};
}

// By which what was summed under `maximum` counts under a larger one; nothing was summed under -infinity.
DEVICE float rescale(float maximum, float larger) {
    return maximum == none() ? 0.0f : expf(maximum - larger);
}

// One entry of a partial softmax.
struct Summed {
    float maximum;
    float sum;
    float entry;
};

// `count` of them together, `part(i)` being the i-th.
template <class Part>
DEVICE Summed merged(int count, Part part) {
    Summed all = {none(), 0.0f, 0.0f};
    for (int i = 0; i < count; ++i) all.maximum = fmaxf(all.maximum, part(i).maximum);
    for (int i = 0; i < count; ++i) {
        const Summed one = part(i);
        const float scale = rescale(one.maximum, all.maximum);
        all.sum = fmaf(scale, one.sum, all.sum);
        all.entry = fmaf(scale, one.entry, all.entry);
    }
    return all;
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

template <int THREADS, int QUERIES>
struct Attention {
    static constexpr int WARPS = THREADS / 32;
    static constexpr int GROUPS = THREADS / HEAD_LANES;
    static constexpr int AT_ONCE = GROUPS * POSITIONS;  // positions

    float queries[QUERIES][SIZE];  // heads that share a key head
    Partial warps[WARPS][QUERIES];
    Partial block[QUERIES];

    // Leaves QUERIES queries in shared memory, from `first_head` on, and, where `stores`, adds the position to the cache.
    DEVICE void prepare_heads(const float* qkv, int first_head, int query_heads, int key_head, int key_heads,
                              const Rotary& rotary, int position, bool stores, CACHE* keys, CACHE* values) {
        const int thread = static_cast<int>(threadIdx.x);
        const int warp = thread / 32;
        for (int head = warp; head < QUERIES; head += WARPS)
            prepare(qkv + (first_head + head) * SIZE, rotary.q_gain.data != nullptr, rotary.q_gain, rotary, position,
                    [&](int i, float x) { queries[head][i] = x * rotary.scale; });
        if (stores) {
            const long long at = static_cast<long long>(position) * SIZE;
            if (warp == WARPS - 1)
                prepare(qkv + (query_heads + key_head) * SIZE, rotary.k_gain.data != nullptr, rotary.k_gain, rotary,
                        position, [&](int i, float x) { narrow(x, keys[at + i]); });
            const float* value = qkv + (query_heads + key_heads + key_head) * SIZE;
            for (int i = thread; i < SIZE; i += THREADS) narrow(load_fresh(value + i), values[at + i]);
        }
        __syncthreads();
    }

    // Leaves the softmax over a stretch, which the block has prepared for, in `block`.
    DEVICE void over(const CACHE* keys, const CACHE* values, Stretch stretch) {
        const int thread = static_cast<int>(threadIdx.x);
        const int warp = thread / 32;
        const bool holds = thread % HEAD_LANES < PARTS;
        const int part = holds ? thread % HEAD_LANES * WIDTH<CACHE> : 0;
        float query[QUERIES][WIDTH<CACHE>];
#pragma unroll
        for (int h = 0; h < QUERIES; ++h)
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) query[h][e] = holds ? queries[h][part + e] : 0.0f;

        float maximum[QUERIES];
        float sum[QUERIES] = {};
        float weighted[QUERIES][WIDTH<CACHE>] = {};
#pragma unroll
        for (int h = 0; h < QUERIES; ++h) maximum[h] = none();

        // Whole warps stay in the loop together: they exchange scores.
        for (int from = stretch.begin; from < stretch.end; from += AT_ONCE) {
            Pack<CACHE> key[POSITIONS];
            Pack<CACHE> value[POSITIONS];
            bool there[POSITIONS];
#pragma unroll
            for (int j = 0; j < POSITIONS; ++j) {
                // What is not there reads the last position again, and does not count.
                const int at = from + j * GROUPS + thread / HEAD_LANES;
                there[j] = at < stretch.end;
                const long long place = static_cast<long long>(min(at, stretch.end - 1)) * SIZE + part;
                key[j].template load<true>(keys + place, WIDTH<CACHE>);
                value[j].template load<true>(values + place, WIDTH<CACHE>);
            }
#pragma unroll
            for (int j = 0; j < POSITIONS; ++j)
                if (!there[j]) value[j] = Pack<CACHE>();
#pragma unroll
            for (int h = 0; h < QUERIES; ++h) {
                float score[POSITIONS];
                float larger = maximum[h];
#pragma unroll
                for (int j = 0; j < POSITIONS; ++j) {
                    float dot = 0.0f;
#pragma unroll
                    for (int e = 0; e < WIDTH<CACHE>; ++e) dot = fmaf(query[h][e], widen(key[j].weight[e]), dot);
#pragma unroll
                    for (int lane = 1; lane < HEAD_LANES; lane *= 2) dot += __shfl_xor_sync(ALL_LANES, dot, lane);
                    score[j] = dot;
                    if (there[j]) larger = fmaxf(larger, dot);
                }
                const float old = rescale(maximum[h], larger);
                sum[h] *= old;
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e) weighted[h][e] *= old;
#pragma unroll
                for (int j = 0; j < POSITIONS; ++j) {
                    const float weight = there[j] ? rescale(score[j], larger) : 0.0f;
                    sum[h] += weight;
#pragma unroll
                    for (int e = 0; e < WIDTH<CACHE>; ++e)
                        weighted[h][e] = fmaf(weight, widen(value[j].weight[e]), weighted[h][e]);
                }
                maximum[h] = larger;
            }
        }

#pragma unroll
        for (int h = 0; h < QUERIES; ++h) {
#pragma unroll
            for (int distance = HEAD_LANES; distance < 32; distance *= 2)
                merge_lanes(maximum[h], sum[h], weighted[h], distance);
            Partial& partial = warps[warp][h];
            if (thread % 32 == 0) {
                partial.maximum = maximum[h];
                partial.sum = sum[h];
            }
            if (thread % 32 < HEAD_LANES && holds)
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e) partial.weighted[part + e] = weighted[h][e];
        }
        __syncthreads();
        for (int i = thread; i < QUERIES * SIZE; i += THREADS) {
            const int h = i / SIZE;
            const Summed all = merged(WARPS, [&](int w) {
                const Partial& partial = warps[w][h];
                return Summed{partial.maximum, partial.sum, partial.weighted[i % SIZE]};
            });
            block[h].weighted[i % SIZE] = all.entry;
            if (i % SIZE == 0) {
                block[h].maximum = all.maximum;
                block[h].sum = all.sum;
            }
        }
    }
};

#endif

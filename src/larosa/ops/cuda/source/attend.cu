// One position's attention over the cache.
//
// Groups of LANES threads work on STEP positions' keys and values at a time, 16 bytes a thread, and carry a running
// softmax; the groups of a warp are merged at its end. Keys and values are copied to shared memory STEPS steps ahead,
// without registers, and the first before the queries are there; a thread reads what it has copied itself, so that
// nobody waits for others.
#include "attention.cuh"

constexpr int PARTS = SIZE / WIDTH<CACHE>;  // threads that hold a vector
constexpr int LANES = PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int STEP = 4;   // positions that a group works on at once
constexpr int STEPS = 2;  // whose keys and values are in shared memory, or on their way there
static_assert(SIZE % WIDTH<CACHE> == 0 && PARTS <= 32, "a head takes 1 to 32 pieces of 16 bytes");

using Packed = Pack<CACHE>;

// Digits of 8 bits: a key's and a value's count as many times as the position's two scales say.
constexpr bool DIGITS = sizeof(CACHE) == 1;
struct alignas(8) Scales {
    float of[2];
};

struct Shared {
    Words<2> scales[DIGITS ? STEPS : 1][DIGITS ? STEP : 1][DIGITS ? THREADS : 1];
    float wide[2][DIGITS ? SIZE : 1];  // this position's key and value
    Scales scale;
    Words<4> keys[STEPS][STEP][THREADS];  // a piece for each thread
    Words<4> values[STEPS][STEP][THREADS];
    alignas(16) CACHE own[2][SIZE];  // this position's key and value, as the cache holds them
    float queries[HEADS][SIZE];
    Partial warps[WARPS][HEADS];
    Found found;
};

SHARED(Shared);

// Copies the keys and values of a thread's next positions. For what is not there it writes zeros.
DEVICE void fetch(Shared& shared, int slot, const CACHE* keys, const CACHE* values, const Scales* scales, int from, int end,
                  int part) {
    const int thread = static_cast<int>(threadIdx.x);
    if (from < end)
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            const int at = from + j * GROUPS + thread / LANES;
            const long long place = static_cast<long long>(min(at, end - 1)) * SIZE + part;
            copy_later(shared.keys[slot][j][thread], keys + place, at < end);
            copy_later(shared.values[slot][j][thread], values + place, at < end);
            if (DIGITS) copy_later(shared.scales[slot][j][thread], scales + min(at, end - 1), at < end);
        }
    copies_issued();
}

// Adds up each of COUNT numbers over lanes that differ in the bits up to DISTANCE: all get all sums. Where it can, each
// half of the lanes adds half of them, and tells the other.
template <int COUNT, int DISTANCE>
DEVICE void sum_lanes(float* x) {
    if constexpr (DISTANCE > 0 && COUNT % 2 == 0) {
        constexpr int HALF = COUNT / 2;
        const bool upper = threadIdx.x & DISTANCE;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float other = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + HALF], DISTANCE);
            x[i] = (upper ? x[i + HALF] : x[i]) + other;
        }
        sum_lanes<HALF, DISTANCE / 2>(x);
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float other = __shfl_xor_sync(ALL_LANES, x[i], DISTANCE);
            x[i + HALF] = upper ? x[i] : other;
            x[i] = upper ? other : x[i];
        }
    } else if constexpr (DISTANCE > 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) x[i] += __shfl_xor_sync(ALL_LANES, x[i], DISTANCE);
        sum_lanes<COUNT, DISTANCE / 2>(x);
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

// Rounds a warp's vector to digits.
template <class Digit>
DEVICE void round_to_digits(const float* wide, Digit* at_hand, Digit* in_cache, float& scale) {
    unsigned largest = 0;  // NaN is larger than infinity
    for (int i = static_cast<int>(threadIdx.x) % 32; i < SIZE; i += 32)
        largest = max(largest, __float_as_uint(wide[i]) & 0x7fffffffu);
    largest = __reduce_max_sync(ALL_LANES, largest);
    scale = __uint_as_float(largest) / 127.0f;
    const float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < SIZE; i += 32) {
        const int digit = max(-127, min(127, rounded(wide[i] * inverse)));
        at_hand[i].bits = in_cache[i].bits = static_cast<unsigned char>(digit);
    }
}

// Keeps an entry of this position's key or value at hand.
DEVICE void keep(Shared& shared, int what, int i, float x, Int8*) { shared.wide[what][i] = x; }
template <class T>
DEVICE void keep(Shared& shared, int what, int i, float x, T* in_cache) {
    T& at_hand = reinterpret_cast<T*>(shared.own[what])[i];
    narrow(x, at_hand);
    in_cache[i] = at_hand;
}

DEVICE void round_for_cache(Shared& shared, int what, Int8* in_cache, float& scale_in_cache) {
    float scale;
    round_to_digits(shared.wide[what], reinterpret_cast<Int8*>(shared.own[what]), in_cache, scale);
    if (threadIdx.x % 32 == 0) shared.scale.of[what] = scale_in_cache = scale;
}
DEVICE void round_for_cache(Shared&, int, float*, float&) {}
DEVICE void round_for_cache(Shared&, int, Half*, float&) {}
DEVICE void round_for_cache(Shared&, int, BFloat16*, float&) {}

KERNEL(THREADS, 1)
attend(const float* qkv, CACHE* keys, CACHE* values, Scales* scales, const long long* positions, Rotary rotary, int length,
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
    scales += static_cast<long long>(key_head) * length;

    const bool holds = thread % LANES < PARTS;
    const int part = holds ? thread % LANES * WIDTH<CACHE> : 0;

    begin(shared.found);
    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const long long asked = load_earlier(positions);
    const bool inside = asked >= 0 && asked < length;
    const int position = inside ? static_cast<int>(asked) : 0;
    const auto [begin, end] = inside ? stretch_of(position, window, rank) : Stretch{0, 0};
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        fetch(shared, step, keys, values, scales, begin + step * GROUPS * STEP, end, part);
    const Heads heads(qkv, query_heads, key_heads, first_head, key_head, rotary, position);
    wait_for_inputs();
    release_dependents();
    CACHE* const in_cache[] = {keys + static_cast<long long>(position) * SIZE, values + static_cast<long long>(position) * SIZE};
    const bool last = rank == CLUSTER - 1 && inside;
    heads.prepare(shared.queries, last, [&](int what, int i, float x) { keep(shared, what, i, x, in_cache[what]); });
    if (DIGITS) {
        if (last && warp < 2) round_for_cache(shared, warp, in_cache[warp], scales[position].of[warp]);
        __syncthreads();
    }

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
    int slot = 0;
    for (int from = begin; from < end; from += GROUPS * STEP) {
        copies_arrived<STEPS - 1>();
        Packed key[STEP];
        Packed value[STEP];
        bool there[STEP];
        Scales scale[STEP];
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            const int at = from + j * GROUPS + thread / LANES;
            there[j] = at < end;
            const bool own = there[j] && at == position;
            key[j].data = *(own ? reinterpret_cast<const Words<4>*>(shared.own[0] + part) : &shared.keys[slot][j][thread]);
            value[j].data = *(own ? reinterpret_cast<const Words<4>*>(shared.own[1] + part) : &shared.values[slot][j][thread]);
            if (DIGITS) scale[j] = own ? shared.scale : reinterpret_cast<const Scales&>(shared.scales[slot][j][thread]);
        }
        float score[HEADS * STEP] = {};
#pragma unroll
        for (int j = 0; j < STEP; ++j)
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e)
#pragma unroll
                for (int h = 0; h < HEADS; ++h)
                    score[h * STEP + j] = fmaf(query[h][e], key[j].at(e), score[h * STEP + j]);
        if (DIGITS)
#pragma unroll
            for (int i = 0; i < HEADS * STEP; ++i) score[i] *= scale[i % STEP].of[0];
        sum_lanes<HEADS * STEP, LANES / 2>(score);
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float larger = maximum[h];
#pragma unroll
            for (int j = 0; j < STEP; ++j)
                if (there[j]) larger = fmaxf(larger, score[h * STEP + j]);
            const float old = rescale(maximum[h], larger);
            sum[h] *= old;
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) weighted[h][e] *= old;
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                const float weight = there[j] ? rescale(score[h * STEP + j], larger) : 0.0f;
                sum[h] += weight;
                const float counted = DIGITS ? weight * scale[j].of[1] : weight;
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e)
                    weighted[h][e] = fmaf(counted, value[j].at(e), weighted[h][e]);
            }
            maximum[h] = larger;
        }
        fetch(shared, slot, keys, values, scales, from + STEPS * GROUPS * STEP, end, part);
        slot = slot + 1 == STEPS ? 0 : slot + 1;
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
    const auto of_warp = [&](int w, int h) -> const Partial& { return shared.warps[w][h]; };
    finish(shared.found, first_head, of_warp, result);
}

// Attention of a position a row over the row's cache.
//
// Groups of LANES threads work on STEP positions' keys and values at a time, 16 bytes a thread, and carry a running
// softmax; the groups of a warp are merged at its end. Keys and values are copied to shared memory STEPS steps ahead,
// without registers, and the first before the queries are there; a thread reads what it has copied itself, so that
// nobody waits for others. Instead of what rows of this very step write there, a block takes what it makes itself of
// q, k and v.
#include "cached.cuh"

constexpr int PARTS = SIZE / WIDTH<CACHE>;  // threads that hold a vector
constexpr int LANES = PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int STEP = DIGITS || HEADS == 1 ? 2 : 4;  // positions that a group works on at once
constexpr int STEPS = 8 / STEP;  // whose keys and values are in shared memory, or on their way there
// A multiprocessor has registers for so many, that some find room beside those of the product before.
constexpr int BLOCKS = HEADS == 1 ? 8 : HEADS == 2 ? 5 : 1;
static_assert(SIZE % WIDTH<CACHE> == 0 && PARTS <= 32, "a head takes 1 to 32 pieces of 16 bytes");

using Packed = Pack<CACHE>;

struct Shared {
    Words<4> keys[STEPS][STEP][THREADS];  // a piece for each thread
    Words<4> values[STEPS][STEP][THREADS];
    Words<1> scales[DIGITS ? STEPS : 1][STEP][THREADS];
    Own own[ROWS];
    Queries<CACHE> queries;
    Partial warps[WARPS][HEADS];
    Found found;
};

SHARED(Shared);

// Copies a thread's pieces of keys and values to shared memory, step by step. For what is not there it writes zeros.
struct Copies {
    const CACHE* keys;  // its piece at its group's next position
    const CACHE* values;
    const Scales* scales;
    int left;  // positions from that one to the end of the block's

    DEVICE Copies(const CACHE* keys, const CACHE* values, const Scales* scales, int from, int end, int part)
        : keys(keys + static_cast<long long>(from) * SIZE + part),
          values(values + static_cast<long long>(from) * SIZE + part),
          scales(scales + from),
          left(end - from) {}

    DEVICE void next(Shared& shared, int slot) {
        const int thread = static_cast<int>(threadIdx.x);
        if (left > -GROUPS) {  // or no group has any
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                const bool there = j * GROUPS < left;
                copy_later(shared.keys[slot][j][thread], keys + j * GROUPS * SIZE, there);
                copy_later(shared.values[slot][j][thread], values + j * GROUPS * SIZE, there);
                if constexpr (DIGITS) copy_later(shared.scales[slot][j][thread], scales + j * GROUPS, there);
            }
            keys += STEP * GROUPS * SIZE;
            values += STEP * GROUPS * SIZE;
            scales += STEP * GROUPS;
            left -= STEP * GROUPS;
        }
        copies_issued();
    }
};

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

KERNEL(THREADS, BLOCKS)
attend(const float* qkv, CACHE* keys, CACHE* values, Scales* scales, const long long* positions,
       const long long* caches, int cache_count, Rotary rotary, int length, int query_heads, int key_heads, int window,
       float* result) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int rank = cluster_rank<CLUSTER>();
    const int team = static_cast<int>(blockIdx.x) / CLUSTER;       // of the clusters
    const int first_head = team * HEADS;                           // of its query heads
    const int key_head = first_head / (query_heads / key_heads);
    const int row = static_cast<int>(blockIdx.y);

    const bool holds = thread % LANES < PARTS;
    const int part = holds ? thread % LANES * WIDTH<CACHE> : 0;

    begin(shared.found);
    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const long long cache = caches ? load_earlier(caches + row) : 0;
    const long long asked = load_earlier(positions + row);
    const bool inside = asked >= 0 && asked < length && cache >= 0 && cache < cache_count;
    const int position = inside ? static_cast<int>(asked) : 0;
    const auto [begin, end] = inside ? stretch_of(position, window, rank) : Stretch{0, 0};
    Fresh fresh;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const bool same = ROWS == 1 || !caches || load_earlier(caches + r) == cache;
        const long long at = ROWS == 1 ? asked : load_earlier(positions + r);
        fresh.position[r] = same && at >= begin && at < end ? static_cast<int>(at) : -1;
    }
    const int first_fresh = fresh.first();
    const long long first = ((inside ? cache : 0) * key_heads + key_head) * length;  // of the positions of all
    keys += first * SIZE;
    values += first * SIZE;
    scales += first;
    Copies copies(keys, values, scales, begin + thread / LANES, end, part);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) copies.next(shared, step);
    const Heads heads(qkv, row, query_heads, key_heads, first_head, key_head, rotary, position, fresh);
    wait_for_inputs();
    release_dependents();
    const auto writes = [&](int r) { return ROWS == 1 || r == row; };
    heads.prepare(
        [&](int h, const Head& head) { shared.queries.put(h, head, rotary.scale * LOG2_E); },
        [&](int r, int at, const Head& head) {
            Own& own = shared.own[r];
            put(head, writes(r), own.key, keys + 1ll * at * SIZE, own.scales.key, &scales[at].key);
        },
        [&](int r, int at, const Head& head) {
            Own& own = shared.own[r];
            put(head, writes(r), own.value, values + 1ll * at * SIZE, own.scales.value, &scales[at].value);
        });

    QueryPiece<CACHE> query[HEADS];
    float query_scale[HEADS];
    float maximum[HEADS];
    float sum[HEADS] = {};
    float weighted[HEADS][WIDTH<CACHE>] = {};
    float lifts[HEADS] = {};  // that weighted values hold too many
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        query[h] = shared.queries.piece(h, part, holds);
        query_scale[h] = shared.queries.scale(h);
        maximum[h] = none();
    }

    // Whole warps stay in the loop together: they exchange scores.
    int slot = 0;
    for (int from = begin; from < end; from += GROUPS * STEP) {
        copies_arrived<STEPS - 1>();
        Packed key[STEP];
        Packed value[STEP];
        float key_scale[STEP];
        float value_scale[STEP];
        bool there[STEP];
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            const int at = from + j * GROUPS + thread / LANES;
            there[j] = at < end;
            const int own_row = ROWS == 1 || at >= first_fresh ? fresh.row(at) : -1;
            const bool is_own = own_row >= 0;
            const Own& own = shared.own[ROWS == 1 ? 0 : max(own_row, 0)];
            key[j].data = *(is_own ? reinterpret_cast<const Words<4>*>(own.key + part) : &shared.keys[slot][j][thread]);
            value[j].data = *(is_own ? reinterpret_cast<const Words<4>*>(own.value + part) : &shared.values[slot][j][thread]);
            if constexpr (DIGITS) {
                const Words<1>& scales = *(is_own ? reinterpret_cast<const Words<1>*>(&own.scales)
                                                  : &shared.scales[slot][j][thread]);
                key_scale[j] = widen_half<BFloat16>(scales.word[0], 0);
                value_scale[j] = widen_half<BFloat16>(scales.word[0], 1);
            }
        }
        float score[HEADS * STEP];
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
            for (int j = 0; j < STEP; ++j) score[h * STEP + j] = query[h].times(key[j]);
        sum_lanes<HEADS * STEP, LANES / 2>(score);
        float weight[HEADS][STEP];
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float larger = maximum[h];
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                weight[h][j] = score[h * STEP + j];
                if constexpr (DIGITS) weight[h][j] *= query_scale[h] * key_scale[j];
                if (there[j]) larger = fmaxf(larger, weight[h][j]);
            }
            if (__ballot_sync(ALL_LANES, larger != maximum[h])) {
                const float old = rescale(maximum[h], larger);
                sum[h] *= old;
                lifts[h] *= old;
#pragma unroll
                for (int e = 0; e < WIDTH<CACHE>; ++e) weighted[h][e] *= old;
                maximum[h] = larger;
            }
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                weight[h][j] = there[j] ? rescale(weight[h][j], larger) : 0.0f;
                sum[h] += weight[h][j];
                if constexpr (DIGITS) lifts[h] += weight[h][j] *= value_scale[j];
            }
        }
#pragma unroll
        for (int j = 0; j < STEP; ++j)
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) {
                const float entry = lifted(value[j], e);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) weighted[h][e] = fmaf(weight[h][j], entry, weighted[h][e]);
            }
        copies.next(shared, slot);
        slot = slot + 1 == STEPS ? 0 : slot + 1;
    }

#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if constexpr (DIGITS)
#pragma unroll
            for (int e = 0; e < WIDTH<CACHE>; ++e) weighted[h][e] = fmaf(-LIFT, lifts[h], weighted[h][e]);
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
    finish(shared.found, first_head, of_warp, result + static_cast<long long>(row) * query_heads * SIZE);
}

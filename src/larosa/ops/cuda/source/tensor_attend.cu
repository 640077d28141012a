// One position's attention over a cache of 16 bits, by tensor cores: for query heads that share a key head.
//
// A warp works on TILE positions at a time. Tensor cores multiply numbers of the cache's format alone, so queries and
// weights are given in parts: the rounded number, and what rounding left of it. That keeps twice the bits, all but
// 2^-22 of a number in float16 and 2^-18 in bfloat16; of weights in float16, all but 2^-25 of the largest if that is
// more. In the product for scores high parts are the first 8 rows and low ones the last 8, whose sums are in the same
// lanes; and scores come out where the product with values wants their weights.
//
// A warp copies keys and values to its own shared memory STEPS steps ahead, and the first before the queries are there.
// In comments g is lane / 4 and t is lane % 4.
#include "attention.cuh"

constexpr int TILE = 16;            // positions of a warp's step
constexpr int STEP = TILE * WARPS;  // of a block's
constexpr int PIECES = SIZE / 8;    // of 16 bytes in a vector
constexpr int SLICES = SIZE / 16;   // of a head, each for a product
constexpr int ROOM = 72 * 1024;     // bytes for keys and values on their way
static_assert(sizeof(CACHE) == 2 && SIZE % 16 == 0 && PIECES <= 32, "16 to 256 entries of 16 bits");
static_assert(HEADS <= 8, "high and low parts of 8 heads are the 16 rows of a product");

// Keys or values. A piece is left out after each vector, so that 8 of them lie in different banks.
struct Tile {
    uint4 vector[TILE][PIECES + 1];

    // 16 positions' entries 16 `slice` to 16 `slice` + 15, as the four 8 x 8 matrices of a fragment: the first 8
    // positions' pieces, then the last 8 positions'.
    template <bool TRANSPOSED>
    DEVICE void load(unsigned (&matrices)[4], int slice) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        load_matrices<TRANSPOSED>(matrices, vector[lane / 16 * 8 + lane % 8][2 * slice + lane / 8 % 2]);
    }
};

constexpr int FITTING = ROOM / (2 * WARPS * static_cast<int>(sizeof(Tile)));
constexpr int STEPS = FITTING < 1 ? 1 : FITTING > 4 ? 4 : FITTING;  // in shared memory, or on their way there

struct Ring {
    Tile keys[STEPS];
    Tile values[STEPS];
};

struct Shared {
    union {
        Ring ring;
        Partial<1> partial[HEADS];  // what the warp has found when it has read all
    } warps[WARPS];
    alignas(16) CACHE key[SIZE];  // this position's, as the cache holds them
    alignas(16) CACHE value[SIZE];
    float queries[HEADS][SIZE];
    Found<CLUSTER> found;
};

SHARED(Shared);

// Copies a warp's next keys or values, but not this position's, which is only being written. For that, and for what is
// not there, it writes zeros and reads nothing.
DEVICE void fetch(Tile& tile, const CACHE* vectors, int from, int end, int position) {
    constexpr int AT_ONCE = 32 / PIECES;  // vectors
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int row = lane / PIECES;
    const int piece = lane % PIECES;
    const int there = min(end, position) - from - row;
    const CACHE* next = vectors + static_cast<long long>(from + row) * SIZE + piece * 8;
    if (from < end)
#pragma unroll
        for (int first = 0; first < TILE; first += AT_ONCE)
            if (row < min(AT_ONCE, TILE - first))
                copy_later(tile.vector[first + row][piece], next + first * SIZE, first < there);
    copies_issued();
}

// What `fetch` copied is there for the whole warp, with this position's vector from `own` if it is one of them.
DEVICE void arrive(Tile& tile, const CACHE* own, int from, int end, int position) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    copies_arrived<2 * STEPS - 1>();
    __syncwarp();
    if (position < min(end, from + TILE)) {
        if (lane < PIECES) tile.vector[position - from][lane] = reinterpret_cast<const uint4*>(own)[lane];
        __syncwarp();
    }
}

// Two numbers in parts, each two side by side.
struct Parts {
    unsigned high;
    unsigned low;
};

DEVICE Parts split(float x, float y) {
    const unsigned high = narrow_both<CACHE>(x, y);
    const CACHE first = {static_cast<unsigned short>(high)};
    const CACHE second = {static_cast<unsigned short>(high >> 16)};
    return {high, narrow_both<CACHE>(x - widen(first), y - widen(second))};
}

// A power of two that makes room for queries, of which `largest` is the largest, in a format: to 2^15 in float16.
// bfloat16 holds what float32 does.
DEVICE float fitting(float largest, Half) {
    return __uint_as_float((268u - max(__float_as_uint(largest) >> 23, 15u)) << 23);
}
DEVICE float fitting(float, BFloat16) { return 1.0f; }

// Queries as the first operand of SLICES products: row g is of head g, in parts.
struct Queries {
    unsigned slices[SLICES][4];
    float unscale;  // what makes scores of products

    DEVICE explicit Queries(const float (&queries)[HEADS][SIZE]) {
        const int head = static_cast<int>(threadIdx.x) % 32 / 4;
        const int first = static_cast<int>(threadIdx.x) % 4 * 2;
        const auto at = [&](int i) { return head < HEADS ? queries[head % HEADS][first + i] : 0.0f; };
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < SIZE; i += 8) largest = fmaxf(largest, fmaxf(fabsf(at(i)), fabsf(at(i + 1))));
        for (int lanes = 1; lanes < 4; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
        const float scale = fitting(largest, CACHE{});
        unscale = __uint_as_float(0x7f000000u - __float_as_uint(scale));
#pragma unroll
        for (int i = 0; i < SIZE; i += 8) {
            const Parts parts = split(at(i) * scale, at(i + 1) * scale);
            slices[i / 16][i % 16 / 8 * 2] = parts.high;
            slices[i / 16][i % 16 / 8 * 2 + 1] = parts.low;
        }
    }

    // Of head g at positions 2t, 2t + 1, 2t + 8 and 2t + 9 of the tile.
    DEVICE void score(float (&scores)[4], const Tile& keys) const {
        float sums[2][2][4] = {};  // of even and odd slices, of 8 positions each
#pragma unroll
        for (int i = 0; i < SLICES; ++i) {
            unsigned key[4];
            keys.load<false>(key, i);
            multiply_add<CACHE>(sums[i % 2][0], slices[i], key[0], key[1]);
            multiply_add<CACHE>(sums[i % 2][1], slices[i], key[2], key[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float high = sums[0][i / 2][i % 2] + sums[1][i / 2][i % 2];
            const float low = sums[0][i / 2][i % 2 + 2] + sums[1][i / 2][i % 2 + 2];
            // A key that is infinite is so in the high part; in the low one it has met any number, or 0.
            scores[i] = (fabsf(high) == -none() ? high : high + low) * unscale;
        }
    }
};

// A warp's running softmax.
struct Softmax {
    float maximum;              // of head g
    float sum;                  // likewise, of this lane's positions
    float weighted[SLICES][4];  // entries g and g + 8 of a slice, of heads 2t and 2t + 1 each

    DEVICE Softmax() : maximum(none()), sum(0.0f), weighted{} {}

    // Makes weights of scores under a maximum that counts them in.
    DEVICE void weigh(float (&scores)[4]) {
        float larger = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
        for (int lanes = 1; lanes < 4; lanes *= 2) larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, lanes));
        larger = fmaxf(larger, maximum);
        const float old = rescale(maximum, larger);
        if (__ballot_sync(ALL_LANES, larger > maximum)) {
            const int lane = static_cast<int>(threadIdx.x) % 4 * 8;  // of head 2t
            const float olds[2] = {__shfl_sync(ALL_LANES, old, lane), __shfl_sync(ALL_LANES, old, lane + 4)};
            sum *= old;
#pragma unroll
            for (int i = 0; i < SLICES * 4; ++i) weighted[i / 4][i % 4] *= olds[i % 2];
            maximum = larger;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = rescale(scores[i], larger);
            sum += scores[i];
        }
    }

    // Adds a tile's values by their weights.
    DEVICE void add(const float (&weights)[4], const Tile& values) {
        const Parts first = split(weights[0], weights[1]);
        const Parts last = split(weights[2], weights[3]);
#pragma unroll
        for (int i = 0; i < SLICES; ++i) {
            unsigned value[4];
            values.load<true>(value, i);
            multiply_add<CACHE>(weighted[i], value, first.high, last.high);
            multiply_add<CACHE>(weighted[i], value, first.low, last.low);
        }
    }

    DEVICE void store(Partial<1> (&partial)[HEADS]) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        sum = warp_sum(sum, 1, 4);
        if (lane % 4 == 0 && lane / 4 < HEADS) {
            partial[lane / 4].maximum = maximum;
            partial[lane / 4].sum = sum;
        }
#pragma unroll
        for (int i = 0; i < SLICES * 4; ++i) {
            const int head = lane % 4 * 2 + i % 2;
            if (head < HEADS) partial[head].weighted[i / 2 * 8 + lane / 4] = weighted[i / 4][i % 4];
        }
    }
};

KERNEL(THREADS, 1)
tensor_attend(const float* qkv, CACHE* keys, CACHE* values, const long long* positions, Rotary rotary, int length,
              int query_heads, int key_heads, int window, float* result) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int rank = cluster_rank<CLUSTER>();
    const int first_head = static_cast<int>(blockIdx.x) / CLUSTER * HEADS;
    const int key_head = first_head / (query_heads / key_heads);
    keys += static_cast<long long>(key_head) * length * SIZE;
    values += static_cast<long long>(key_head) * length * SIZE;
    Ring& ring = shared.warps[warp].ring;

    begin(shared.found);
    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const long long asked = load_earlier(positions);
    const bool inside = asked >= 0 && asked < length;
    const int position = inside ? static_cast<int>(asked) : 0;
    const auto [begin, end] = inside ? stretch_of(position, window, rank) : Stretch{0, 0};
    const int first = begin + warp * TILE;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        fetch(ring.keys[step], keys, first + step * STEP, end, position);
        fetch(ring.values[step], values, first + step * STEP, end, position);
    }
    const Heads heads(qkv, query_heads, key_heads, first_head, key_head, rotary, position);
    wait_for_inputs();
    release_dependents();
    const long long at = static_cast<long long>(position) * SIZE;
    heads.prepare(shared.queries, rank == CLUSTER - 1 && inside, shared.key, shared.value, keys + at, values + at);

    const Queries queries(shared.queries);
    Softmax softmax;
    int slot = 0;
    for (int from = first; from < end; from += STEP) {
        float scores[4];
        arrive(ring.keys[slot], shared.key, from, end, position);
        queries.score(scores, ring.keys[slot]);
        __syncwarp();
        fetch(ring.keys[slot], keys, from + STEPS * STEP, end, position);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (from + i / 2 * 8 + thread % 4 * 2 + i % 2 >= end) scores[i] = none();
        softmax.weigh(scores);
        arrive(ring.values[slot], shared.value, from, end, position);
        softmax.add(scores, ring.values[slot]);
        __syncwarp();
        fetch(ring.values[slot], values, from + STEPS * STEP, end, position);
        slot = slot + 1 == STEPS ? 0 : slot + 1;
    }
    softmax.store(shared.warps[warp].partial);
    const auto of_warp = [&](int w, int h) -> const Partial<1>& { return shared.warps[w].partial[h]; };
    finish(shared.found, first_head, of_warp, result);
}

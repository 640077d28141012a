// Exact Top-K of one vector by one block, with what produces the vector.
//
// Every thread keeps its entries in registers. A radix select over the 31 bits of |x * score| finds the k-th largest
// in three passes of 11, 10 and 10 bits: the first takes the exponent and three bits of the fraction together,
// because the exponents alone fall into so few bins that their additions would queue. Entries are then counted in
// the order of their indices, which makes ties go to the lowest and leaves the list ascending.
#include "block.cuh"
#include "values.cuh"

#ifndef SOURCE
#error "SOURCE (AS_IS, NORMED or GATED) and EACH, the entries of a thread, are given by the launcher"
#endif

constexpr int THREADS = 1024;
enum Source { AS_IS, NORMED, GATED };
constexpr unsigned NAN_KEY = 0x7f800001u;  // all NaN alike, above infinity

struct Digit {
    unsigned digit;  // of the k-th largest key
    unsigned need;   // how many of the keys with that digit, and the same digits before it, belong to the k largest
};

// The entries of a long vector do not fit in registers beside their keys; each thread reads only its own.
constexpr bool IN_REGISTERS = EACH <= 16;

struct Shared {
    Block<THREADS> block;
    unsigned high[2048];
    unsigned middle[1024];
    unsigned low[1024];
    Digit found;
    unsigned counts[EACH][THREADS / 32];  // by slab and warp, in the order of indices
    float entries[IN_REGISTERS ? 1 : EACH][IN_REGISTERS ? 1 : THREADS];
};

SHARED(Shared);

struct Entries {
    float own[IN_REGISTERS ? EACH : 1];

    DEVICE float& at(int i, Shared& shared) {
        if constexpr (IN_REGISTERS) return own[i];
        return shared.entries[IN_REGISTERS ? 0 : i][IN_REGISTERS ? 0 : threadIdx.x];
    }
};

// The digit that holds the key which `need` keys are at least as large as. Thread t looks at the t-th highest bins.
template <int BINS>
DEVICE Digit find(Shared& shared, const unsigned (&histogram)[BINS], unsigned need) {
    constexpr int BINS_EACH = BINS / THREADS;
    const int highest = BINS - 1 - static_cast<int>(threadIdx.x) * BINS_EACH;
    unsigned counts[BINS_EACH];
    unsigned own = 0;
    __syncthreads();  // the histogram is complete, and what the last use left in `block` has been read
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) own += counts[i] = histogram[highest - i];
    unsigned before = shared.block.before(own);
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) {
        if (before < need && need <= before + counts[i])
            shared.found = {static_cast<unsigned>(highest - i), need - before};
        before += counts[i];
    }
    __syncthreads();
    return shared.found;
}

DEVICE unsigned key_of(float x) {
    return min(__float_as_uint(x) & 0x7fffffffu, NAN_KEY);
}

KERNEL(THREADS, 1)
select_top_k(const float* input, int width, int k, Vector gain, float eps, Vector score, float* values, int* indices) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const long long row = blockIdx.x;

    if (thread == 0) score.fetch(width);
    if (thread == 32) gain.fetch(width);
    shared.high[thread] = shared.high[thread + 1024] = shared.middle[thread] = shared.low[thread] = 0;
    wait_for_inputs();
    release_dependents();

    // Entry i of thread t is number i * THREADS + t: slab by slab.
    Entries entries;
    input += row * width * (SOURCE == GATED ? 2 : 1);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        // Beyond the end the last entry again: a load on a condition would wait for the one before it.
        const int at = min(i * THREADS + thread, width - 1);
        const float x = SOURCE == GATED ? silu_mul_at(input, at, width) : load_fresh(input + at);
        entries.at(i, shared) = i * THREADS + thread < width ? x : 0.0f;
    }
    if (SOURCE == NORMED) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float x = entries.at(i, shared);
            squares = fmaf(x, x, squares);
        }
        const float inverse = inverse_rms(shared.block.sum(squares), width, eps);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = i * THREADS + thread;
            if (at < width) entries.at(i, shared) *= inverse * gain.at(at, 1.0f);
        }
    }
    unsigned key[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = i * THREADS + thread;
        key[i] = at < width ? key_of(entries.at(i, shared) * score.at(at, 1.0f)) : 0;
    }

    __syncthreads();  // the histograms are clear
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (i * THREADS + thread < width) atomicAdd(&shared.high[key[i] >> 20], 1u);
    const Digit high = find(shared, shared.high, static_cast<unsigned>(k));
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (i * THREADS + thread < width && key[i] >> 20 == high.digit)
            atomicAdd(&shared.middle[key[i] >> 10 & 1023u], 1u);
    const Digit middle = find(shared, shared.middle, high.need);
    const unsigned prefix = high.digit << 10 | middle.digit;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (i * THREADS + thread < width && key[i] >> 10 == prefix) atomicAdd(&shared.low[key[i] & 1023u], 1u);
    const Digit low = find(shared, shared.low, middle.need);
    const unsigned threshold = prefix << 10 | low.digit;

    // Counts of larger keys in the low half of a word, of tied ones in the high half; both stay below 65536.
    const unsigned below = (1u << thread % 32) - 1u;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const bool present = i * THREADS + thread < width;
        const unsigned larger = __ballot_sync(ALL_LANES, present && key[i] > threshold);
        const unsigned tied = __ballot_sync(ALL_LANES, present && key[i] == threshold);
        if (thread % 32 == 0) shared.counts[i][thread / 32] = __popc(larger) | __popc(tied) << 16;
    }
    __syncthreads();
    unsigned* counts = &shared.counts[0][0];
    const unsigned own = thread < EACH * THREADS / 32 ? counts[thread] : 0u;
    const unsigned before = shared.block.before(own);
    if (thread < EACH * THREADS / 32) counts[thread] = before;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const bool present = i * THREADS + thread < width;
        const bool larger = present && key[i] > threshold;
        const bool tied = present && key[i] == threshold;
        const unsigned counted = shared.counts[i][thread / 32];
        const unsigned larger_before = (counted & 0xffffu) + __popc(__ballot_sync(ALL_LANES, larger) & below);
        const unsigned tied_before = (counted >> 16) + __popc(__ballot_sync(ALL_LANES, tied) & below);
        if (larger || (tied && tied_before < low.need)) {
            const long long place = row * k + larger_before + min(tied_before, low.need);
            values[place] = entries.at(i, shared);
            indices[place] = i * THREADS + thread;
        }
    }
}

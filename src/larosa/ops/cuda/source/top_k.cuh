// The k-th largest key of a block, exactly, by a radix select over 31 bits in three passes of 11, 10 and 10.
//
// The first pass takes the exponent and three bits of the fraction together, because the exponents alone fall into so
// few bins that their additions would queue.
#ifndef LAROSA_TOP_K
#define LAROSA_TOP_K

#include "block.cuh"

constexpr unsigned NAN_KEY = 0x7f800001u;  // all NaN alike, above infinity

// Orders entries by magnitude.
DEVICE unsigned key_of(float x) {
    return min(__float_as_uint(x) & 0x7fffffffu, NAN_KEY);
}

// The keys from which on entries belong to the k largest.
struct Cut {
    unsigned threshold;  // the k-th largest key; every larger one belongs
    unsigned need;       // so many of those that equal it do
    bool all;            // and these are all there are
};

template <int THREADS>
struct TopK {
    struct Digit {
        unsigned digit;  // of the k-th largest key
        unsigned need;   // how many of the keys with that digit, and the same digits before it, belong to the k largest
        unsigned there;  // how many there are
    };

    unsigned high[2048];
    unsigned middle[1024];
    unsigned low[1024];
    Digit found;

    // Before the first key is counted, with a barrier in between.
    DEVICE void clear() {
        for (int i = static_cast<int>(threadIdx.x); i < 2048; i += THREADS) high[i] = 0;
        for (int i = static_cast<int>(threadIdx.x); i < 1024; i += THREADS) middle[i] = low[i] = 0;
    }

    // `keys(visit)` calls `visit(key)` for each of the thread's keys, the same ones every time; 0 < k <= their number.
    template <class Keys>
    DEVICE Cut cut(Block<THREADS>& block, unsigned k, Keys keys) {
        keys([&](unsigned key) { atomicAdd(&high[key >> 20], 1u); });
        const Digit first = find(block, high, k);
        keys([&](unsigned key) {
            if (key >> 20 == first.digit) atomicAdd(&middle[key >> 10 & 1023u], 1u);
        });
        const Digit second = find(block, middle, first.need);
        const unsigned prefix = first.digit << 10 | second.digit;
        keys([&](unsigned key) {
            if (key >> 10 == prefix) atomicAdd(&low[key & 1023u], 1u);
        });
        const Digit third = find(block, low, second.need);
        return {prefix << 10 | third.digit, third.need, third.need == third.there};
    }

    // The digit that holds the key which `need` keys are at least as large as. Thread t looks at the t-th highest bins.
    template <int BINS>
    DEVICE Digit find(Block<THREADS>& block, const unsigned (&histogram)[BINS], unsigned need) {
        constexpr int COUNT = BINS / THREADS;
        const int highest = BINS - 1 - static_cast<int>(threadIdx.x) * COUNT;
        unsigned counts[COUNT];
        unsigned own = 0;
        __syncthreads();  // the histogram is complete, and what the last use left in `block` has been read
#pragma unroll
        for (int i = 0; i < COUNT; ++i) own += counts[i] = histogram[highest - i];
        unsigned before = block.before(own);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (before < need && need <= before + counts[i])
                found = {static_cast<unsigned>(highest - i), need - before, counts[i]};
            before += counts[i];
        }
        __syncthreads();
        return found;
    }
};

#endif

// The k-th largest key of a block, exactly, by a radix select over 31 bits in passes of 12, 10 and 9.
//
// The first pass takes the exponent and four bits of the fraction together, because the exponents alone fall into so
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

    alignas(16) unsigned high[4096];
    alignas(16) unsigned middle[1024];
    alignas(16) unsigned low[512];
    Digit found;

    // Before the first key is counted, with a barrier in between.
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 4096 / THREADS; ++i) high[i * THREADS + threadIdx.x] = 0;
#pragma unroll
        for (int i = 0; i < 1024 / THREADS; ++i) middle[i * THREADS + threadIdx.x] = 0;
        if (threadIdx.x < 512) low[threadIdx.x] = 0;
    }

    // `keys(visit)` calls `visit(key)` for each of the thread's keys, the same ones every time; 0 < k <= their number.
    template <class Keys>
    DEVICE Cut cut(Block<THREADS>& block, unsigned k, Keys keys) {
        keys([&](unsigned key) { atomicAdd(&high[key >> 19], 1u); });
        const Digit first = find(block, high, k);
        keys([&](unsigned key) {
            if (key >> 19 == first.digit) atomicAdd(&middle[key >> 9 & 1023u], 1u);
        });
        const Digit second = find(block, middle, first.need);
        const unsigned prefix = first.digit << 10 | second.digit;
        keys([&](unsigned key) {
            if (key >> 9 == prefix) atomicAdd(&low[key & 511u], 1u);
        });
        const Digit third = find(block, low, second.need);
        return {prefix << 9 | third.digit, third.need, third.need == third.there};
    }

    // The digit that holds the key which `need` keys are at least as large as. Thread t looks at the t-th highest bins.
    template <int BINS>
    DEVICE Digit find(Block<THREADS>& block, const unsigned (&histogram)[BINS], unsigned need) {
        constexpr int COUNT = BINS > THREADS ? BINS / THREADS : 1;
        const int lowest = BINS - (static_cast<int>(threadIdx.x) + 1) * COUNT;
        unsigned counts[COUNT];
        unsigned own = 0;
        __syncthreads();  // the histogram is complete, and what the last use left in `block` has been read
        if constexpr (COUNT % 4 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {  // four at once: one by one they would meet in the same banks
                const uint4 four = *reinterpret_cast<const uint4*>(histogram + lowest + i);
                counts[i] = four.x, counts[i + 1] = four.y, counts[i + 2] = four.z, counts[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) counts[i] = lowest >= 0 ? histogram[max(lowest, 0) + i] : 0u;
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) own += counts[i];
        unsigned before = block.before(own);
#pragma unroll
        for (int i = COUNT - 1; i >= 0; --i) {
            if (before < need && need <= before + counts[i])
                found = {static_cast<unsigned>(lowest + i), need - before, counts[i]};
            before += counts[i];
        }
        __syncthreads();
        return found;
    }
};

#endif

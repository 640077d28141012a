// The list of the entries of a vector in shared memory that a product reads, by the block that reads them.
#ifndef LAROSA_CHOOSE
#define LAROSA_CHOOSE

#include "top_k.cuh"
#include "vectors.cuh"

// For vectors of up to MOST entries. Thread t sees to entries t, t + THREADS, ...
template <int THREADS, int MOST>
struct Chooser {
    static constexpr bool KEPT = MOST <= 15360;  // whether keys have a place; else they are worked out at each look

    TopK<THREADS> top;
    // Those with the digit of the k-th largest: the key, and below it the index, so that ties go to the lowest.
    alignas(16) unsigned long long candidates[THREADS];
    unsigned keys[KEPT ? MOST : 1];  // the bits of scores, until the vector is there

    // What may be done before the vector is there; a barrier stands between this and `choose`.
    DEVICE void prepare(int width, const Vector& score) {
        top.clear();
        if (KEPT)
#pragma unroll 4
            for (int at = static_cast<int>(threadIdx.x); at < width; at += THREADS)
                keys[KEPT ? at : 0] = __float_as_uint(score.plain(at, 1.0f));
    }

    // Lists the k entries of x with the largest |x * score|, ties to the lowest index; 0 < k < width <= MOST.
    // The list is in a fixed order, but not in that of indices.
    DEVICE void choose(Block<THREADS>& block, const float* x, int width, int k, const Vector& score,
                       unsigned short* chosen) {
        const int thread = static_cast<int>(threadIdx.x);
        const auto look = [&](int at) { return KEPT ? keys[KEPT ? at : 0] : key_of(x[at] * score.plain(at, 1.0f)); };
        // Calls visit(index, key) for each of the thread's entries, in the order of their indices. Not unrolled further:
        // the code of a whole layer is to stay in the instruction cache.
        const auto every = [&](auto visit) {
#pragma unroll 4
            for (int at = thread; at < width; at += THREADS) visit(at, look(at));
        };
#pragma unroll 4
        for (int at = thread; at < width; at += THREADS) {
            const float rank = x[at] * (KEPT ? __uint_as_float(keys[KEPT ? at : 0]) : score.plain(at, 1.0f));
            const unsigned key = key_of(rank);
            if (KEPT) keys[KEPT ? at : 0] = key;
            atomicAdd(&top.high[key >> 19], 1u);
        }
        const auto cut = top.find(block, top.high, static_cast<unsigned>(k));
        const bool all = cut.need == cut.there;
        const bool few = cut.there <= THREADS;
        // Those above the digit of the k-th largest are certain; how many each thread has in the low half of a word,
        // and in the high half those that have the digit.
        unsigned mine = 0;
        every([&](int, unsigned key) {
            const unsigned digit = key >> 19;
            mine += digit > cut.digit ? 1u : digit == cut.digit ? 65536u : 0u;
        });
        const unsigned before = block.before(mine);
        const unsigned certain = static_cast<unsigned>(k) - cut.need;
        unsigned place = before & 0xffffu;
        unsigned other = before >> 16;
        every([&](int at, unsigned key) {
            const unsigned digit = key >> 19;
            if (digit > cut.digit) chosen[place++] = static_cast<unsigned short>(at);
            if (digit != cut.digit) return;
            if (all) chosen[certain + other] = static_cast<unsigned short>(at);
            if (few) candidates[other] = static_cast<unsigned long long>(key) << 32 | (0xffffffffu - at);
            ++other;
        });
        if (few && thread == 0 && cut.there < THREADS) candidates[cut.there] = 0;  // pairs are looked at together
        __syncthreads();
        if (all) return;
        if (few)
            rank(static_cast<int>(cut.there), cut.need, chosen + certain);
        else
            refine(block, look, cut.digit, cut.need, width, chosen + certain);
        __syncthreads();
    }

private:
    // The `need` largest of the candidates, a thread each.
    DEVICE void rank(int there, unsigned need, unsigned short* chosen) {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread >= there) return;
        const unsigned long long own = candidates[thread];
        unsigned larger = 0;
#pragma unroll 4
        for (int i = 0; i < there; i += 2) {
            const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(candidates + i);
            larger += two.x > own ? 1u : 0u;
            larger += two.y > own ? 1u : 0u;
        }
        if (larger < need) chosen[larger] = static_cast<unsigned short>(0xffffffffu - static_cast<unsigned>(own));
    }

    // The same of any number of candidates: two more digits, and ties in the order of their indices. It is seldom
    // needed, so it works keys out again and keeps its code short.
    template <class Look>
    DEVICE void refine(Block<THREADS>& block, Look look, unsigned digit, unsigned need, int width,
                       unsigned short* chosen) {
        const int thread = static_cast<int>(threadIdx.x);
        const auto every = [&](auto visit) {
#pragma unroll 1
            for (int at = thread; at < width; at += THREADS) visit(at, look(at));
        };
        every([&](int, unsigned key) {
            if (key >> 19 == digit) atomicAdd(&top.middle[key >> 9 & 1023u], 1u);
        });
        const auto second = top.find(block, top.middle, need);
        const unsigned prefix = digit << 10 | second.digit;
        every([&](int, unsigned key) {
            if (key >> 9 == prefix) atomicAdd(&top.low[key & 511u], 1u);
        });
        const auto third = top.find(block, top.low, second.need);
        const unsigned threshold = prefix << 9 | third.digit;
        const auto larger = [&](unsigned key) { return key >> 19 == digit && key > threshold; };
        unsigned mine = 0;
        every([&](int, unsigned key) { mine += larger(key) ? 1u : 0u; });
        unsigned place = block.before(mine);
        every([&](int at, unsigned key) {
            if (larger(key)) chosen[place++] = static_cast<unsigned short>(at);
        });
        // Slab by slab, in which a thread's number says how many indices come before its own.
        chosen += need - third.need;
        unsigned before = 0;
#pragma unroll 1
        for (int first = 0; first < width; first += THREADS) {
            const int at = first + thread;
            const unsigned tied = at < width && look(min(at, width - 1)) == threshold ? 1u : 0u;
            __syncthreads();
            const unsigned rank = before + block.before(tied);
            if (thread == THREADS - 1) top.found.there = rank + tied;
            if (tied && rank < third.need) chosen[rank] = static_cast<unsigned short>(at);
            __syncthreads();
            before = top.found.there;
        }
    }
};

#endif

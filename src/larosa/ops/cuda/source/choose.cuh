// The list of the entries of a vector in shared memory that a product reads, by the block that reads them.
#ifndef LAROSA_CHOOSE
#define LAROSA_CHOOSE

#include "top_k.cuh"
#include "vectors.cuh"

template <int THREADS>
struct Chooser {
    static constexpr int FEW = THREADS;  // candidates that are ranked by comparing each with all others

    TopK<THREADS> top;
    unsigned keys[FEW];
    unsigned short candidates[FEW];

    // Before any thread chooses, with a barrier in between.
    DEVICE void clear() { top.clear(); }

    // Lists the k entries of x with the largest |x * score|, ties to the lowest index; 0 < k < width <= EACH * THREADS.
    // The list is in a fixed order, but not in that of indices.
    template <int EACH>
    DEVICE void choose(Block<THREADS>& block, const float* x, int width, int k, const Vector& score,
                       unsigned short* chosen) {
        const int thread = static_cast<int>(threadIdx.x);
        constexpr bool HELD = EACH <= 24;  // in registers; else keys are worked out again at each look
        unsigned held[HELD ? EACH : 1];
        const auto look = [&](int at) { return key_of(x[at] * score.at(at, 1.0f)); };
        if constexpr (HELD)
#pragma unroll
            for (int i = 0; i < EACH; ++i) held[i] = look(min(i * THREADS + thread, width - 1));
        // Calls visit(index, key) for each of the thread's entries, in the order of their indices.
        const auto every = [&](auto visit) {
            if constexpr (HELD) {
#pragma unroll
                for (int i = 0; i < EACH; ++i)
                    if (i * THREADS + thread < width) visit(i * THREADS + thread, held[i]);
            } else {
                for (int at = thread; at < width; at += THREADS) visit(at, look(at));
            }
        };

        every([&](int, unsigned key) { atomicAdd(&top.high[key >> 20], 1u); });
        const auto cut = top.find(block, top.high, static_cast<unsigned>(k));
        const bool all = cut.need == cut.there;
        const bool few = cut.there <= FEW;
        // Those above the digit of the k-th largest are certain; how many each thread has in the low half of a word,
        // and in the high half those that have the digit.
        unsigned own = 0;
        every([&](int, unsigned key) {
            own += key >> 20 > cut.digit ? 1u : 0u;
            own += key >> 20 == cut.digit ? 65536u : 0u;
        });
        const unsigned before = block.before(own);
        const unsigned certain = static_cast<unsigned>(k) - cut.need;
        unsigned place = before & 0xffffu;
        unsigned other = before >> 16;
        every([&](int at, unsigned key) {
            if (key >> 20 > cut.digit) chosen[place++] = static_cast<unsigned short>(at);
            if (key >> 20 != cut.digit) return;
            if (all) {
                chosen[certain + other] = static_cast<unsigned short>(at);
            } else if (few) {
                keys[other] = key;
                candidates[other] = static_cast<unsigned short>(at);
            }
            ++other;
        });
        __syncthreads();
        if (all) return;
        if (few)
            rank(cut.there, cut.need, chosen + certain);
        else
            refine(block, every, look, cut.digit, cut.need, width, chosen + certain);
        __syncthreads();
    }

private:
    // The `need` largest of the candidates, a thread each.
    DEVICE void rank(unsigned there, unsigned need, unsigned short* chosen) {
        const unsigned thread = threadIdx.x;
        if (thread >= there) return;
        const unsigned own = keys[thread];
        const unsigned short at = candidates[thread];
        unsigned larger = 0;
#pragma unroll 8
        for (unsigned i = 0; i < there; ++i) {
            const unsigned key = keys[i];
            larger += key > own || (key == own && candidates[i] < at) ? 1u : 0u;
        }
        if (larger < need) chosen[larger] = at;
    }

    // The same of any number of candidates: two more digits, and ties in the order of their indices.
    template <class Every, class Look>
    DEVICE void refine(Block<THREADS>& block, Every every, Look look, unsigned digit, unsigned need, int width,
                       unsigned short* chosen) {
        every([&](int, unsigned key) {
            if (key >> 20 == digit) atomicAdd(&top.middle[key >> 10 & 1023u], 1u);
        });
        const auto second = top.find(block, top.middle, need);
        const unsigned prefix = digit << 10 | second.digit;
        every([&](int, unsigned key) {
            if (key >> 10 == prefix) atomicAdd(&top.low[key & 1023u], 1u);
        });
        const auto third = top.find(block, top.low, second.need);
        const unsigned threshold = prefix << 10 | third.digit;
        unsigned own = 0;
        every([&](int, unsigned key) { own += key >> 20 == digit && key > threshold ? 1u : 0u; });
        unsigned place = block.before(own);
        every([&](int at, unsigned key) {
            if (key >> 20 == digit && key > threshold) chosen[place++] = static_cast<unsigned short>(at);
        });
        // Slab by slab, in which a thread's number says how many indices come before its own.
        chosen += need - third.need;
        unsigned before = 0;
        for (int first = 0; first < width; first += THREADS) {
            const int at = first + static_cast<int>(threadIdx.x);
            const unsigned mine = at < width && look(min(at, width - 1)) == threshold ? 1u : 0u;
            __syncthreads();
            const unsigned rank = before + block.before(mine);
            if (static_cast<int>(threadIdx.x) == THREADS - 1) top.found.there = rank + mine;
            if (mine && rank < third.need) chosen[rank] = static_cast<unsigned short>(at);
            __syncthreads();
            before = top.found.there;
        }
    }
};

#endif

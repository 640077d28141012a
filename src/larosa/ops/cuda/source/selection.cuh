// Exact Top-K of one vector by one block, with what produces the vector.
//
// Entries are ordered by 31 bits of |x * score| and then by their indices, the lowest first, so that no two are equal.
// A histogram over the first digit of that order (the exponent and four bits or more of the fraction, because the
// exponents alone fall into so few bins that their additions would queue) tells the digit of the k-th largest. Entries
// with a larger one are kept; the few that share it, the candidates, are compared with each other. Where they are
// many, further digits make them few first.
//
// A block is bound by the instructions it issues, so each that every entry needs counts, and a population count, which
// has an eighth of the lanes of an addition, most of all.
#ifndef LAROSA_SELECTION
#define LAROSA_SELECTION

#include "activation.cuh"

// Of the order's bits, those of the first digit; 32 are left, the last of them for the index.
constexpr int DIGIT_BITS = EACH * THREADS <= 4096 ? 12 : EACH * THREADS <= 16384 ? 13 : 14;
constexpr int KEY_BITS = 31 - DIGIT_BITS;
constexpr int INDEX_BITS = 32 - KEY_BITS;
constexpr int BINS = 1 << DIGIT_BITS;
constexpr int QUADS = BINS / 4 / THREADS;  // fours of bins a thread
constexpr unsigned LAST = (1u << INDEX_BITS) - 1u;
static_assert(EACH <= 32 && EACH * THREADS <= 1 << INDEX_BITS && QUADS > 0, "no room for the order's bits");

constexpr unsigned MOST = 256;  // candidates to compare with each other
constexpr int HELPERS = 4;      // threads that compare one of them

struct alignas(16) Digit {
    unsigned digit;  // of the k-th largest
    unsigned need;   // how many of the entries with that digit, and the same digits before it, belong to the k largest
    unsigned there;  // how many there are
};

struct Ranking {
    alignas(16) unsigned histogram[BINS];
    alignas(16) unsigned candidates[MOST];  // the 32 bits after the digit, and 0 where there is none
    unsigned totals[THREADS / 32];
    Digit found;
    Threads block;
};

DEVICE void clear(Ranking& shared) {
    uint4* quads = reinterpret_cast<uint4*>(shared.histogram);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) quads[i * THREADS + threadIdx.x] = {0, 0, 0, 0};
}

// The digit of the `need`-th largest of the entries in the histogram. Lane after lane, and warp after warp, looks at
// lower bins.
DEVICE Digit find(Ranking& shared, unsigned need) {
    const int highest = BINS - 4 - 4 * (Threads::warp() * QUADS * 32 + Threads::lane());
    uint4 counts[QUADS];
    unsigned own = 0;
    __syncthreads();  // the histogram is complete
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        counts[i] = *reinterpret_cast<const uint4*>(shared.histogram + highest - i * 128);
        own += counts[i].x + counts[i].y + counts[i].z + counts[i].w;
    }
    own = __reduce_add_sync(ALL_LANES, own);
    if (Threads::lane() == 0) shared.totals[Threads::warp()] = own;
    __syncthreads();
    unsigned before = Threads::before(shared.totals);
    if (before < need && need <= before + own) {  // in the bins of this warp
        unsigned up_to[QUADS];
#pragma unroll
        for (int i = 0; i < QUADS; ++i)
            up_to[i] = Threads::up_to(counts[i].x + counts[i].y + counts[i].z + counts[i].w);
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            const unsigned four[] = {counts[i].w, counts[i].z, counts[i].y, counts[i].x};
            const unsigned sum = four[0] + four[1] + four[2] + four[3];
            unsigned above = before + up_to[i] - sum;
            if (above < need && need <= above + sum) {
                unsigned bin = highest - i * 128 + 3, there = four[0];
#pragma unroll
                for (int j = 1; j < 4; ++j) {
                    if (above + there >= need) continue;
                    above += there;
                    there = four[j];
                    --bin;
                }
                shared.found = {bin, need - above, there};
            }
            before += __shfl_sync(ALL_LANES, up_to[i], 31);
        }
    }
    __syncthreads();
    return shared.found;
}

// Takes further digits until few candidates are left. `rests` are the bits after the first digit. Seldom needed, so its
// code is short, and leaves the registers to the rest: `rests` lies in memory.
DEVICE Digit narrow(Ranking& shared, Digit digit, const unsigned (&rests)[EACH], unsigned& open, unsigned& keep) {
    unsigned known = 0;  // how the candidates' bits begin, down to bit `shift`
    for (int shift = 32; digit.there > MOST;) {
        shift = max(shift - DIGIT_BITS, 0);
        clear(shared);
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < EACH; ++i)
            if (open >> i & 1u) atomicAdd(&shared.histogram[rests[i] - known >> shift], 1u);
        digit = find(shared, digit.need);
        known += digit.digit << shift;
#pragma unroll 1
        for (int i = 0; i < EACH; ++i) {
            if (!(open >> i & 1u) || rests[i] >> shift == known >> shift) continue;
            open ^= 1u << i;
            if (rests[i] > known) keep |= 1u << i;
        }
    }
    return digit;
}

// Has `take(candidate, rest, rank)` called for each candidate that is among the `need` largest of `there`: with its
// number, its bits after the first digit, and how many of the candidates are larger.
template <class Take>
DEVICE void compare(const Ranking& shared, unsigned there, unsigned need, Take take) {
    constexpr unsigned WARP = 32 / HELPERS;
    const unsigned helper = Threads::lane() % HELPERS;
    for (unsigned first = Threads::warp() * WARP; first < there; first += THREADS / HELPERS) {
        const unsigned candidate = first + Threads::lane() / HELPERS;
        const unsigned own = shared.candidates[candidate];
        unsigned larger = 0;
#pragma unroll 2
        for (unsigned i = 0; i < there; i += HELPERS * 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(shared.candidates + i + helper * 4);
            count_larger(larger, four.x, own);
            count_larger(larger, four.y, own);
            count_larger(larger, four.z, own);
            count_larger(larger, four.w, own);
        }
#pragma unroll
        for (int distance = 1; distance < HELPERS; distance *= 2)
            larger += __shfl_xor_sync(ALL_LANES, larger, distance);
        if (helper == 0 && larger < need && candidate < there) take(candidate, own, larger);
    }
}

DEVICE void prepare(Ranking& shared) {
    clear(shared);
    if (threadIdx.x < MOST) shared.candidates[threadIdx.x] = 0;
    __syncthreads();
}

// What a thread knows of its entries x. Those to be kept are the certain ones, and the `need` largest of all threads'
// candidates, which whoever includes this lists in shared memory.
struct Chosen {
    float x[EACH];
    unsigned key[EACH];
    float squares = 0.0f;  // the sum of those of what the entries are made from
    unsigned keep = 0;     // as bits, those that are certainly among the k largest
    unsigned open = 0;     // as bits, candidates
    unsigned first_digit;  // of the k-th largest
    Digit digit;

    // What all entries are still to be multiplied by, which changes no order: around a barrier, when time can be spared.
    DEVICE void begin_factor(Ranking& shared) const {
        if (SOURCE == NORMED) shared.block.begin_sum(squares);
    }
    DEVICE static float end_factor(const Ranking& shared, const Activation& activation) {
        return SOURCE == NORMED ? inverse_rms(shared.block.end_sum(), activation.width, activation.eps) : 1.0f;
    }

    // The bits after the first digit of entry i, of a thread whose entries begin with `first`.
    DEVICE unsigned rest(int i, int first) const { return (key[i] << INDEX_BITS) + (LAST - first) - i * 32; }
    DEVICE static unsigned index(unsigned rest) { return LAST - (rest & LAST); }
};

DEVICE Chosen choose(Ranking& shared, const Activation& activation, const Factors<SCORE>& scores, int k) {
    Chosen chosen;
    float up[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        chosen.x[i] = activation.load(i);
        up[i] = activation.load_up(i);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        chosen.squares = fmaf(chosen.x[i], chosen.x[i], chosen.squares);
        chosen.x[i] = activation.entry(i, chosen.x[i], up[i]);
        chosen.key[i] = magnitude(chosen.x[i], scores.at(i));
        atomicAdd(&shared.histogram[chosen.key[i] >> KEY_BITS], 1u);
    }
    chosen.digit = find(shared, static_cast<unsigned>(k));
    chosen.first_digit = chosen.digit.digit;

#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (chosen.key[i] >= chosen.digit.digit << KEY_BITS) chosen.open |= 1u << i;
        if (chosen.key[i] >= (chosen.digit.digit + 1u) << KEY_BITS) chosen.keep |= 1u << i;
    }
    chosen.open ^= chosen.keep;
    if (chosen.digit.there > MOST) {
        unsigned rests[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) rests[i] = chosen.rest(i, activation.first);
        chosen.digit = narrow(shared, chosen.digit, rests, chosen.open, chosen.keep);
    }
    return chosen;
}

// Lists a thread's candidates behind those of others, in no order; `shared` counts them.
template <class Shared>
DEVICE void list_open(Shared& shared, const Chosen& chosen, const Activation& activation) {
    if (chosen.open) {
        unsigned slot = atomicAdd(&shared.candidates, static_cast<unsigned>(__popc(chosen.open)));
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (chosen.open >> i & 1u) shared.ranking.candidates[slot++] = chosen.rest(i, activation.first);
    }
}

#endif

// The vector that entries are selected from: what makes it, and which thread has which of its entries.
#ifndef LAROSA_ACTIVATION
#define LAROSA_ACTIVATION

#include "block.cuh"
#include "values.cuh"

#ifndef SOURCE
#error "SOURCE (AS_IS, NORMED or GATED), GAIN and SCORE, formats, EACH, the entries of a thread, and FILLED are given"
#endif

using Threads = Block<THREADS>;  // whoever includes this says how many they are
enum Source { AS_IS, NORMED, GATED };

// The entries of a long vector do not fit in registers beside their keys and what they are made from.
constexpr bool IN_REGISTERS = EACH * THREADS <= (SOURCE == AS_IS ? 20480 : 16384);

// Entry i of lane l of warp w is number (w * EACH + i) * 32 + l: loads are contiguous, and warps follow each other.
DEVICE int first_of_thread() {
    return Threads::warp() * EACH * 32 + Threads::lane();
}

// The thread's entries of a gain or score in format T, read early where there is room for them. Of scores that entries have
// COLUMNS of, those of their first columns come first, and so on.
template <class T, int COLUMNS = 1>
struct Factors {
    static constexpr bool HELD = IN_REGISTERS && (COLUMNS == 1 || EACH * THREADS * COLUMNS <= 20480);

    const Vector vector;
    const int width;
    float early[COLUMNS][HELD ? EACH : 1];

    DEVICE Factors(Vector vector, int width) : vector(vector), width(width) {
        if constexpr (HELD)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
                vector.read<T, FILLED>(early[column], first_of_thread() + column * width, width + column * width);
        else if (threadIdx.x == 0)
            vector.fetch(COLUMNS * width);
    }

    DEVICE float at(int i, int column = 0) const {
        if constexpr (HELD) return early[column][i];
        const int at = first_of_thread() + i * 32;
        return at < width ? vector.at(at + column * width, 1.0f) : 1.0f;
    }
};

// What the entries are made from, and how, but for a norm's factor, which they have in common.
struct Activation {
    const float* input;  // of the row
    const int width;
    const int first = first_of_thread();
    const Factors<GAIN> gains;
    const float eps;

    DEVICE Activation(const float* input, long long row, int width, Vector gain, float eps)
        : input(input + row * width * (SOURCE == GATED ? 2 : 1)), width(width), gains(gain, width), eps(eps) {}

    // Beyond the end entries are 0, and come last in order. Where x is FILLED all are there: asking of each takes more
    // predicates than there are, so that some loads wait for others.
    DEVICE bool there(int i) const { return FILLED || i * 32 < width - first; }
    DEVICE float load(int i) const { return load_fresh(input + first + i * 32, there(i)); }
    DEVICE float load_up(int i) const {
        return SOURCE == GATED ? load_fresh(input + width + first + i * 32, there(i)) : 0.0f;
    }

    DEVICE float entry(int i, float loaded, float up) const {
        if (SOURCE == GATED) return silu_mul(loaded, up);
        if (SOURCE == NORMED && there(i)) return loaded * gains.at(i);
        return loaded;
    }
};

// Whether an entry is kept: NaN is.
DEVICE bool above(float x, float score, float threshold) {
    return !(fabsf(x * score) <= threshold);
}

// Has `put(i, place, kept)` called for each of the thread's entries: with its place among all that are kept, the warps
// before this one having `place` of them.
template <class Put>
DEVICE void place_kept(unsigned keep, unsigned place, Put put) {
    // Four rows of the warp's entries at a time, whose counts go side by side into one word.
#pragma unroll
    for (int row_0 = 0; row_0 < EACH; row_0 += 4) {
        const unsigned own = (keep >> row_0 & 15u) * 0x00204081u & 0x01010101u;
        const unsigned up_to = Threads::up_to(own);
        const unsigned rows = __shfl_sync(ALL_LANES, up_to, 31);
        const unsigned before = up_to - own + rows * 0x01010100u;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = row_0 + j;
            if (i >= EACH) break;
            put(i, __dp4a(before, 1u << 8 * j, place), keep & 1u << i);
        }
        place = __dp4a(rows, 0x01010101u, place);
    }
}

#endif

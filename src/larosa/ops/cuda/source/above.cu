// Which entries of a vector are above a threshold: their values and indices, in the order of indices, and how many.
//
// There is room for all entries; zeros stand behind those that are kept. Where an entry has COLUMNS_EACH columns each of
// them has a score of its own: indices are of columns, of which all entries' first ones come before their second ones.
#ifndef BLOCK
#error "BLOCK, the threads, EARLY and COLUMNS_EACH are given by the launcher"
#endif
constexpr int THREADS = BLOCK;

#include "activation.cuh"

struct Shared {
    Threads block;
    unsigned kept[COLUMNS_EACH][THREADS / 32];  // entries, by warp
};

SHARED(Shared);

KERNEL(THREADS, 1)
select_above(const float* input, int width, float threshold, Vector gain, float eps, Vector score, float* values,
             int* indices, long long* count) {
    Shared& shared = shared_memory<Shared>();
    const Factors<SCORE, COLUMNS_EACH> scores(score, width);
    const long long row = blockIdx.x;
    const Activation activation(input, row, width, gain, eps);
    values += row * width * COLUMNS_EACH;
    indices += row * width * COLUMNS_EACH;
    if (EARLY) release_dependents_early();
    wait_for_inputs();
    if (!EARLY) release_dependents();

    float x[EACH];
    float up[EACH];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        x[i] = activation.load(i);
        up[i] = activation.load_up(i);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        squares = fmaf(x[i], x[i], squares);
        x[i] = activation.entry(i, x[i], up[i]);
    }
    float factor = 1.0f;
    if (SOURCE == NORMED) factor = inverse_rms(shared.block.sum(squares), width, eps);
    unsigned keep[COLUMNS_EACH] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        x[i] *= factor;
#pragma unroll
        for (int c = 0; c < COLUMNS_EACH; ++c)
            if (activation.there(i) && above(x[i], scores.at(i, c), threshold)) keep[c] |= 1u << i;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS_EACH; ++c) {
        const unsigned own = __reduce_add_sync(ALL_LANES, __popc(keep[c]));
        if (Threads::lane() == 0) shared.kept[c][Threads::warp()] = own;
    }
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS_EACH; ++c) {
        place_kept(keep[c], total + Threads::before(shared.kept[c]), [&](int i, unsigned at, unsigned kept) {
            store(values + at, x[i], indices + at, activation.first + i * 32 + c * width, kept);
        });
        total += static_cast<int>(Threads::sum(shared.kept[c]));
    }
    if (threadIdx.x == 0) count[row] = total;
    for (int i = total + static_cast<int>(threadIdx.x); i < width * COLUMNS_EACH; i += THREADS) {
        values[i] = 0.0f;
        indices[i] = 0;
    }
}

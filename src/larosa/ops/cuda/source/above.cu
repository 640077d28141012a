// Which entries of a vector are above a threshold: their values and indices, in the order of indices, and how many.
//
// There is room for all entries; zeros stand behind those that are kept.
#ifndef BLOCK
#error "BLOCK, the threads, and EARLY are given by the launcher"
#endif
constexpr int THREADS = BLOCK;

#include "activation.cuh"

struct Shared {
    Threads block;
    unsigned kept[THREADS / 32];  // entries, by warp
};

SHARED(Shared);

KERNEL(THREADS, 1)
select_above(const float* input, int width, float threshold, Vector gain, float eps, Vector score, float* values,
             int* indices, long long* count) {
    Shared& shared = shared_memory<Shared>();
    const Factors<SCORE> scores(score, width);
    const long long row = blockIdx.x;
    const Activation activation(input, row, width, gain, eps);
    values += row * width;
    indices += row * width;
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
    unsigned keep = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        x[i] *= factor;
        if (activation.there(i) && above(x[i], scores.at(i), threshold)) keep |= 1u << i;
    }
    const unsigned own = __reduce_add_sync(ALL_LANES, __popc(keep));
    if (Threads::lane() == 0) shared.kept[Threads::warp()] = own;
    __syncthreads();
    place_kept(keep, Threads::before(shared.kept), [&](int i, unsigned at, unsigned kept) {
        store(values + at, x[i], indices + at, activation.first + i * 32, kept);
    });
    const int total = static_cast<int>(Threads::sum(shared.kept));
    if (threadIdx.x == 0) count[row] = total;
    for (int i = total + static_cast<int>(threadIdx.x); i < width; i += THREADS) {
        values[i] = 0.0f;
        indices[i] = 0;
    }
}

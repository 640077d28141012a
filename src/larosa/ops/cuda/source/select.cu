// Which entries of a vector the next product reads: their values and indices, in the order of indices.
#ifndef BLOCK
#error "BLOCK, the threads, and EARLY are given by the launcher"
#endif
constexpr int THREADS = BLOCK;

#include "selection.cuh"

struct Shared {
    Ranking ranking;
    unsigned candidates;          // how many are listed
    unsigned accepted[THREADS];   // candidates to be kept, as bits of the thread whose entries they are
    unsigned kept[THREADS / 32];  // entries to be kept, by warp
};

SHARED(Shared);

KERNEL(THREADS, 1)
select_top_k(const float* input, int width, int k, Vector gain, float eps, Vector score, float* values, int* indices) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.x;

    shared.accepted[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.candidates = 0;
    prepare(shared.ranking);
    const Factors<SCORE> scores(score, width);
    const Activation activation(input, row, width, gain, eps);
    if (EARLY) release_dependents_early();
    wait_for_inputs();
    if (!EARLY) release_dependents();

    const Chosen chosen = choose(shared.ranking, activation, scores, k);
    list_open(shared, chosen, activation);
    const unsigned kept = __reduce_add_sync(ALL_LANES, __popc(chosen.keep));
    if (Threads::lane() == 0) shared.kept[Threads::warp()] = kept;
    chosen.begin_factor(shared.ranking);
    __syncthreads();
    compare(shared.ranking, chosen.digit.there, chosen.digit.need, [&](unsigned, unsigned rest, unsigned) {
        const unsigned index = Chosen::index(rest);
        const unsigned warp = index / (EACH * 32);
        atomicAdd(&shared.accepted[warp * 32 + index % 32], 1u << index / 32 % EACH);
        atomicAdd(&shared.kept[warp], 1u);
    });
    __syncthreads();
    const unsigned keep = chosen.keep | shared.accepted[threadIdx.x];

    const float factor = Chosen::end_factor(shared.ranking, activation);
    values += row * k;
    indices += row * k;
    settle(values);
    settle(indices);
    place_kept(keep, Threads::before(shared.kept), [&](int i, unsigned at, unsigned kept) {
        float value = chosen.x[i];
        if (!IN_REGISTERS) value = kept ? activation.entry(i, activation.load(i), activation.load_up(i)) : 0.0f;
        store(values + at, value * factor, indices + at, activation.first + i * 32, kept);
    });
}

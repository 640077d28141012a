// Exact Top-K of one vector by one block, with what produces the vector.
//
// Every thread keeps its entries in registers. Once the k-th largest is known, entries are counted in the order of
// their indices, which makes ties go to the lowest and leaves the list ascending.
#include "top_k.cuh"
#include "values.cuh"

#ifndef SOURCE
#error "SOURCE (AS_IS, NORMED or GATED) and EACH, the entries of a thread, are given by the launcher"
#endif

constexpr int THREADS = 1024;
enum Source { AS_IS, NORMED, GATED };

// The entries of a long vector do not fit in registers beside their keys; each thread reads only its own.
constexpr bool IN_REGISTERS = EACH <= 16;

struct Shared {
    Block<THREADS> block;
    TopK<THREADS> top;
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

KERNEL(THREADS, 1)
select_top_k(const float* input, int width, int k, Vector gain, float eps, Vector score, float* values, int* indices) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const long long row = blockIdx.x;

    release_dependents();
    if (thread == 0) score.fetch(width);
    if (thread == 32) gain.fetch(width);
    shared.top.clear();
    wait_for_inputs();

    // Entry i of thread t is number i * THREADS + t: slab by slab.
    Entries entries;
    input += row * width * (SOURCE == GATED ? 2 : 1);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        // Beyond the end the last entry again: a load on a condition would wait for the one before it.
        const int at = min(i * THREADS + thread, width - 1);
        entries.at(i, shared) = SOURCE == GATED ? silu_mul_at(input, at, width) : load_fresh(input + at);
    }
    if (SOURCE == NORMED) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float x = entries.at(i, shared);
            if (i * THREADS + thread < width) squares = fmaf(x, x, squares);
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
        key[i] = key_of(entries.at(i, shared) * score.at(min(at, width - 1), 1.0f));
    }

    __syncthreads();  // the histograms are clear
    const Cut cut = shared.top.cut(shared.block, static_cast<unsigned>(k), [&](auto count) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (i * THREADS + thread < width) count(key[i]);
    });
    const unsigned threshold = cut.threshold;

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
        if (larger || (tied && tied_before < cut.need)) {
            const long long place = row * k + larger_before + min(tied_before, cut.need);
            values[place] = entries.at(i, shared);
            indices[place] = i * THREADS + thread;
        }
    }
}

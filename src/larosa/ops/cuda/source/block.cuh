// What a block of THREADS threads does together.
#ifndef LAROSA_BLOCK
#define LAROSA_BLOCK

#include "device.cuh"

template <int THREADS>
struct Block {
    static constexpr int WARPS = THREADS / 32;

    float sums[WARPS];

    // The sum over all threads, the same bits in each of them. Once a kernel.
    DEVICE float sum(float x) {
        begin_sum(x);
        __syncthreads();
        return end_sum();
    }

    // The same around a barrier.
    DEVICE void begin_sum(float x) {
        x = warp_sum(x);
        if (lane() == 0) sums[warp()] = x;
    }
    DEVICE float end_sum() const { return warp_sum(sums[lane() % WARPS], 1, WARPS); }

    // The sum of what the warps before this one have in `totals`.
    DEVICE static unsigned before(const unsigned (&totals)[WARPS]) {
        return __reduce_add_sync(ALL_LANES, lane() < warp() ? totals[lane()] : 0u);
    }

    // The sum of what all warps have in `totals`.
    DEVICE static unsigned sum(const unsigned (&totals)[WARPS]) {
        return __reduce_add_sync(ALL_LANES, lane() < WARPS ? totals[lane()] : 0u);
    }

    // The sum over the lanes up to this one.
    DEVICE static unsigned up_to(unsigned x) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) x = plus_below(x, distance);
        return x;
    }

    DEVICE static int lane() { return static_cast<int>(threadIdx.x % 32); }
    DEVICE static int warp() { return static_cast<int>(threadIdx.x / 32); }
};

#endif

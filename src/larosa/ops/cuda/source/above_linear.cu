// y = residual + x W^T + b for the entries of x above a threshold, which each block finds for itself: what an entry is
// compared with is known beforehand, so that no block waits for another.
//
// With an ADAPTER it is residual R^T instead of the residual. That reads memory while x is still being made, and goes
// into the same sums.
//
// Where an entry has COLUMNS_EACH columns, D of first ones before D of second ones, each of them has a score of its own.
#ifndef ADAPTER
#error "ADAPTER and COLUMNS_EACH are given by the launcher"
#endif
constexpr int DEPTH = 5;  // loads in flight in each thread

#include "adapter.cuh"
#include "activation.cuh"

// A block looks at all entries and lists its part of those above. Of a longer vector, of which that would take too long, it
// looks at every CLUSTER-th row of 32 and lists what it finds there. Beside an adapter's pieces there are registers for 16
// scores.
constexpr bool AT_ALL = EACH * (ADAPTER ? COLUMNS_EACH : 1) <= 16;
constexpr int ROW = 32 * (AT_ALL ? 1 : CLUSTER);
constexpr int SEEN = AT_ALL ? EACH : (EACH + CLUSTER - 1) / CLUSTER;    // by a thread
constexpr int ROOM = (EACH + CLUSTER - 1) / CLUSTER * THREADS * COLUMNS_EACH;  // for entries of the list
static_assert(SOURCE == AS_IS || (SOURCE == NORMED && AT_ALL && !ADAPTER), "a norm is over all entries, and of the residual");
static_assert(EACH <= 32, "a bit for each entry that a thread sees");

struct Shared {
    Entry entries[ROOM];
    unsigned kept[WARPS];
    Threads block;
    Sums sums;
};

SHARED(Shared);

// A thread's entries of x and what they are multiplied by, asked for with the adapter's last pieces, by when x should be
// there: to wait for it sooner would leave memory idle.
struct Asked {
    const float* x;
    const int width;
    const Vector gain;
    const Vector score;
    static constexpr bool ALL = FILLED && (AT_ALL || EACH % CLUSTER == 0);
    const int first = (AT_ALL ? 0 : cluster_rank<CLUSTER>() * 32) + Threads::warp() * SEEN * ROW + Threads::lane();
    float entry[SEEN];
    float gains[SEEN];
    float scores[COLUMNS_EACH][SEEN];

    DEVICE Asked(const float* x, int width, Vector gain, Vector score) : x(x), width(width), gain(gain), score(score) {}

    DEVICE int index(int i) const { return first + i * ROW; }
    DEVICE bool there(int i) const { return ALL || i * ROW < width - first; }

    DEVICE void at_last() {
        gain.read<GAIN, ALL, ROW>(gains, first, width);
#pragma unroll
        for (int c = 0; c < COLUMNS_EACH; ++c)
            score.read<SCORE, ALL, ROW>(scores[c], first + c * width, width + c * width);
        wait_for_inputs();
#pragma unroll
        for (int i = 0; i < SEEN; ++i) entry[i] = load_fresh(x + index(i), there(i));
    }
};

// Lists the block's entries above the threshold, in a fixed order, but for a norm's factor. Returns how many they are.
DEVICE int list(Shared& shared, Asked& asked, float threshold, float eps, unsigned stride, float& factor) {
    settle(stride);
    if (SOURCE == NORMED) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < SEEN; ++i) {
            squares = fmaf(asked.entry[i], asked.entry[i], squares);
            asked.entry[i] *= asked.gains[i];
        }
        factor = inverse_rms(shared.block.sum(squares), asked.width, eps);
    }
    unsigned keep[COLUMNS_EACH] = {};
#pragma unroll
    for (int i = 0; i < SEEN; ++i)
#pragma unroll
        for (int c = 0; c < COLUMNS_EACH; ++c)
            if (asked.there(i) && above(asked.entry[i] * factor, asked.scores[c][i], threshold)) keep[c] |= 1u << i;
    unsigned own = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS_EACH; ++c) own += __popc(keep[c]);
    const unsigned up_to = Threads::up_to(own);
    if (Threads::lane() == 31) shared.kept[Threads::warp()] = up_to;
    __syncthreads();  // the adapter's entries have been read, too
    const int total = static_cast<int>(Threads::sum(shared.kept));
    const Part part = AT_ALL ? Part::of_block(total) : Part{0, total};
    const unsigned size = part.size();
    unsigned place = Threads::before(shared.kept) + up_to - own - part.begin;
#pragma unroll
    for (int c = 0; c < COLUMNS_EACH; ++c)
#pragma unroll
        for (int i = 0; i < SEEN; ++i) {
            const bool kept = keep[c] & 1u << i;
            const Entry entry{asked.entry[i], (asked.index(i) + c * asked.width) * stride};
            entry.put(shared.entries + place, kept && place < size);
            if (kept) ++place;
        }
    __syncthreads();
    return part.size();
}

KERNEL(THREADS, 1)
above_linear(const float* x, int width, float threshold, Vector gain, float eps, Vector score, Matrices matrices,
             const float* residual, const void* adapter, unsigned adapter_stride, int carried,
             SCALE_PARAMETERS float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.y;
    const Outputs tile(matrices, static_cast<int>(blockIdx.x) / CLUSTER);
    begin(shared.sums);
    Sum sum = {};
    float factor = 1.0f;
    x += row * width;
    settle(x);
    Asked asked(x, width, gain, score);
    if constexpr (ADAPTER) {
        if (threadIdx.x == 0) score.fetch(COLUMNS_EACH * width);
        add_adapter<ROOM>(sum, shared.entries, residual + row * carried, adapter, adapter_stride, carried,
                          SCALE_ARGUMENTS tile, asked);
    } else {
        asked.at_last();
    }
    const int count = list(shared, asked, threshold, eps, tile.stride(), factor);
    auto columns = tile.columns();
    if (count > 0) add_listed<GROUPS>(sum, shared.entries, group(), count, columns);
    columns.end(sum);
    release_dependents();
    finish(shared.sums, tile, sum, factor, ADAPTER || !residual ? nullptr : residual + row * outputs,
           result + row * outputs, outputs);
}

// A whole site in one kernel: the norm, the selection, the product with the chosen columns, and what follows it.
//
// Each block takes a stretch of the outputs, as many for each as there are multiprocessors, and chooses the entries
// for itself: all of them reading one short vector costs less than another kernel's start. Outputs are counted in
// packs of 16 bytes. The threads of a block stand in `groups` rows of `lanes`, one lane a pack: a group reads one
// column's piece at a time, every groups-th of the list. Their sums meet in shared memory in a fixed order.
#include "top_k.cuh"
#include "values.cuh"

#ifndef WEIGHT
#error "WEIGHT, EACH (entries of a thread) and DENSE (whether every entry is kept) are given by the launcher"
#endif

constexpr int THREADS = 512;
constexpr int DEPTH = 8;                     // loads in flight in each thread
constexpr int PACK = WIDTH<WEIGHT>;          // outputs of a pack
constexpr unsigned AHEAD = 4096;             // bytes fetched ahead at once
constexpr bool IN_REGISTERS = EACH <= 24;    // keys, which are else worked out again at each look

using Packed = Pack<WEIGHT>;

struct Shared {
    Block<THREADS> block;
    float x[EACH * THREADS];
    unsigned short chosen[DENSE ? 1 : EACH * THREADS];
    unsigned ties[DENSE ? 1 : EACH][THREADS / 32];
    union {
        TopK<THREADS> top;
        float sums[THREADS * PACK];
    };
    float partial[THREADS];
};

SHARED(Shared);

// Leaves the vector in shared memory, normed if need be, zero beyond its end.
DEVICE void stage(Shared& shared, const float* x, int width, bool normed, const Vector& gain, float eps) {
    const int thread = static_cast<int>(threadIdx.x);
    // A load that depends on a condition would wait for the one before it.
    constexpr int AT_ONCE = 8;
    float squares = 0.0f;
#pragma unroll 1
    for (int first = 0; first < EACH; first += AT_ONCE) {
        float own[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) own[i] = load_fresh(x + min((first + i) * THREADS + thread, width - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = (first + i) * THREADS + thread;
            if (at < EACH * THREADS) shared.x[at] = own[i] = at < width ? own[i] : 0.0f;
            if (at < width) squares = fmaf(own[i], own[i], squares);
        }
    }
    if (normed) {
        const float inverse = inverse_rms(shared.block.sum(squares), width, eps);
        for (int at = thread; at < width; at += THREADS) shared.x[at] *= inverse * gain.at(at, 1.0f);
    }
}

// Lists the k entries with the largest |x * score|, ties to the lowest index.
DEVICE void choose(Shared& shared, int width, int k, const Vector& score) {
    const int thread = static_cast<int>(threadIdx.x);
    const auto look = [&](int at) { return key_of(shared.x[at] * score.at(at, 1.0f)); };
    unsigned held[IN_REGISTERS ? EACH : 1];
    if constexpr (IN_REGISTERS)
#pragma unroll
        for (int i = 0; i < EACH; ++i) held[i] = look(min(i * THREADS + thread, width - 1));
    // Calls visit(index, key, slab) for each of the thread's entries, in the order of their indices.
    const auto every = [&](auto visit) {
        if constexpr (IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (i * THREADS + thread < width) visit(i * THREADS + thread, held[i], i);
        } else {
#pragma unroll 1
            for (int i = 0; i * THREADS + thread < width; ++i) visit(i * THREADS + thread, look(i * THREADS + thread), i);
        }
    };
    const Cut cut = shared.top.cut(shared.block, static_cast<unsigned>(k),
                                   [&](auto count) { every([&](int, unsigned key, int) { count(key); }); });

    // Larger ones first, each thread's together; then those that equal the threshold, of which some may be left out.
    unsigned larger = 0;
    every([&](int, unsigned key, int) { larger += key > cut.threshold; });
    unsigned place = shared.block.before(larger);
    every([&](int at, unsigned key, int) {
        if (key > cut.threshold) shared.chosen[place++] = static_cast<unsigned short>(at);
    });
    const unsigned first_tied = static_cast<unsigned>(k) - cut.need;
    __syncthreads();
    if (cut.all) {
        unsigned tied = 0;
        every([&](int, unsigned key, int) { tied += key == cut.threshold; });
        place = first_tied + shared.block.before(tied);
        every([&](int at, unsigned key, int) {
            if (key == cut.threshold) shared.chosen[place++] = static_cast<unsigned short>(at);
        });
    } else {
        // In the order of their indices, which is slab by slab and warp by warp.
        const auto tied = [&](int i) {
            const int at = i * THREADS + thread;
            return at < width && look(at) == cut.threshold;
        };
#pragma unroll 1
        for (int i = 0; i < EACH; ++i) {
            const unsigned votes = __ballot_sync(ALL_LANES, tied(i));
            if (thread % 32 == 0) shared.ties[i][thread / 32] = __popc(votes);
        }
        unsigned* counts = &shared.ties[0][0];
        unsigned before = 0;
#pragma unroll 1
        for (int first = 0; first < EACH * THREADS / 32; first += THREADS) {
            __syncthreads();
            const int i = first + thread;
            const unsigned own = i < EACH * THREADS / 32 ? counts[i] : 0u;
            const unsigned sum = before + shared.block.before(own);
            if (i < EACH * THREADS / 32) counts[i] = sum;
            if (thread == THREADS - 1) shared.top.found.need = sum + own;
            __syncthreads();
            before = shared.top.found.need;
        }
        const unsigned below = (1u << thread % 32) - 1u;
#pragma unroll 1
        for (int i = 0; i < EACH; ++i) {
            const bool mine = tied(i);
            const unsigned rank = shared.ties[i][thread / 32] + __popc(__ballot_sync(ALL_LANES, mine) & below);
            if (mine && rank < cut.need)
                shared.chosen[first_tied + rank] = static_cast<unsigned short>(i * THREADS + thread);
        }
    }
    __syncthreads();
}

// Adds entries `first`, `first + step`, ... below `count`: `value(i)` of `column(i)`.
template <class Column, class Value>
DEVICE void add(float (&sum)[PACK], int first, int step, int count, const WEIGHT* weights, unsigned stride,
                Column column, Value value) {
    for (int start = first; start < count; start += DEPTH * step) {
        Packed pack[DEPTH];
        float x[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            // What is not there reads the last entry again, unconditionally: it must not wait for the loads before.
            const int i = min(start + j * step, count - 1);
            x[j] = value(i);
            pack[j].template load<true>(at_offset(weights, static_cast<unsigned>(column(i)) * stride), PACK);
        }
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            if (start + j * step >= count) {  // zero times infinity would not be zero
                x[j] = 0.0f;
                pack[j] = Packed();
            }
#pragma unroll
            for (int e = 0; e < PACK; ++e) sum[e] = fmaf(x[j], widen(pack[j].weight[e]), sum[e]);
        }
    }
}

// The sum over all groups of the output that stands `at` in each group's packs; outputs below `total` are asked for.
// Its result counts in the threads with t < total, t standing for the output.
DEVICE float gather(Shared& shared, int at, int total, int groups, int apart) {
    const int thread = static_cast<int>(threadIdx.x);
    const int parts = min(max(THREADS / total, 1), groups);
    const int part = thread / total;
    float sum = 0.0f;
    if (part < parts)
        for (int group = part; group < groups; group += parts) sum += shared.sums[group * apart + at + thread % total];
    shared.partial[thread] = sum;
    __syncthreads();
    if (thread < total)
        for (int p = 1; p < parts; ++p) sum += shared.partial[p * total + thread];
    return sum;
}

KERNEL(THREADS, 2)
site(const float* x, int width, int k, int normed, Vector gain, float eps, Vector score, Matrices matrices, int gated,
     int packs, int pass, const float* residual, const WEIGHT* adapter, int adapter_width, unsigned ahead, float* result,
     int outputs) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const long long row = blockIdx.y;
    const int begin = static_cast<int>(static_cast<long long>(packs) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<long long>(packs) * (blockIdx.x + 1) / gridDim.x);

    release_dependents();
    if (!DENSE) shared.top.clear();
    if (thread == 0) score.fetch(width);
    if (thread == 32) gain.fetch(width);
    // Memory idles until the entries are chosen. What is read in any case may come meanwhile.
    if (row == 0)
        for (unsigned at = (thread * gridDim.x + blockIdx.x) * AHEAD; at < ahead; at += THREADS * gridDim.x * AHEAD)
            prefetch(reinterpret_cast<const char*>(adapter) + at, min(AHEAD, ahead - at));
    wait_for_inputs();

    stage(shared, x + row * width, width, normed, gain, eps);
    __syncthreads();
    if (!DENSE && k > 0) choose(shared, width, k, score);

    for (int first = begin; first < end; first += pass) {
        const int here = min(pass, end - first);  // packs of outputs
        const int lanes = gated ? 2 * here : here;
        const int groups = THREADS / lanes;
        const int lane = thread % lanes;
        const int group = thread / lanes;
        // A gated output has a lane for its gate and one for its up.
        const int pack = gated ? first + lane % here + (lane < here ? 0 : packs) : first + lane;
        const Matrix& matrix = matrices.of(pack);
        const WEIGHT* weights = static_cast<const WEIGHT*>(matrix.weights) + (pack - matrix.tile) * PACK;
        const unsigned stride = static_cast<unsigned>(matrix.stride);
        float sum[PACK] = {};
        if (group < groups) {
            if (adapter)
                add(sum, group, groups, adapter_width, adapter + pack * PACK, static_cast<unsigned>(outputs),
                    [](int i) { return i; },
                    [&](int i) { return load_fresh(residual + row * adapter_width + i); });
            if constexpr (DENSE)
                add(sum, group, groups, width, weights, stride, [](int i) { return i; },
                    [&](int i) { return shared.x[i]; });
            else
                add(sum, group, groups, k, weights, stride, [&](int i) { return shared.chosen[i]; },
                    [&](int i) { return shared.x[shared.chosen[i]]; });
        }
        if (!DENSE || first > begin) __syncthreads();  // what stood where the sums go has been read
#pragma unroll
        for (int e = 0; e < PACK; ++e) shared.sums[thread * PACK + e] = sum[e];
        __syncthreads();
        const int total = here * PACK;
        const int apart = lanes * PACK;
        const long long place = row * outputs + first * PACK + thread;
        if (gated) {
            const float gate = gather(shared, 0, total, groups, apart);
            __syncthreads();
            const float up = gather(shared, total, total, groups, apart);
            if (thread < total) {
                const int output = first * PACK + thread;
                result[place] = silu_mul(gate + matrices.matrix[0].bias.at(output, 0.0f),
                                         up + matrices.matrix[1].bias.at(output, 0.0f));
            }
        } else {
            const float product = gather(shared, 0, total, groups, apart);
            if (thread < total) {
                const Matrix& of = matrices.of(first + thread / PACK);
                const int output = first * PACK + thread - static_cast<int>(of.first);
                const float before = residual && !adapter ? load_fresh(residual + place) : 0.0f;
                result[place] = before + (product + of.bias.at(output, 0.0f));
            }
        }
    }
}

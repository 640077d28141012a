// y = residual + x W^T + b, all of W read. W is row-major; a warp takes OUTPUTS of its rows at a time.
//
// Of several vectors, ROWS of them, what is read of W is added to all their sums, each made in the order of one alone.
#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT, ALIGNED, ROWS and CHUNK, of how many entries of x are held in shared memory, are given by the launcher"
#endif

constexpr int THREADS = ROWS == 1 ? 256 : 512;
constexpr int OUTPUTS = ROWS == 1 ? 2 : 4;     // of a warp: x is read from shared memory once for all of them
constexpr int TILE = OUTPUTS * THREADS / 32;   // outputs of a block
constexpr int DEPTH = ROWS == 1 ? 4 : 2;       // loads in flight for each output
constexpr unsigned AHEAD = 2048;            // bytes of a row fetched before x is there
constexpr int STEP = 32 * WIDTH<WEIGHT>;    // entries a warp reads at once
constexpr int PLANES = WIDTH<WEIGHT> / 4;   // x lies in planes of 4 entries out of WIDTH: no bank conflicts
static_assert(CHUNK % STEP == 0, "a lane has the same entries of x in chunks of every size");
static_assert(ROWS * OUTPUTS <= 32, "a lane finishes a result");

struct Vectors {
    float4 x[PLANES][CHUNK / WIDTH<WEIGHT>];

    DEVICE float& at(int i) {
        return reinterpret_cast<float*>(&x[i / 4 % PLANES][i / WIDTH<WEIGHT>])[i % 4];
    }
};

struct Shared {
    Vectors row[ROWS];
};

SHARED(Shared);

using Packed = Pack<WEIGHT>;

DEVICE void stage(Vectors& row, const float* x, int count) {
    constexpr int AT_ONCE = 8;  // loads in flight
    const int padded = (count + WIDTH<WEIGHT> - 1) / WIDTH<WEIGHT> * WIDTH<WEIGHT>;
    for (int first = static_cast<int>(threadIdx.x); first < padded; first += AT_ONCE * THREADS) {
        float own[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) own[i] = load_fresh(x + min(first + i * THREADS, count - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = first + i * THREADS;
            if (at < padded) row.at(at) = at < count ? own[i] : 0.0f;
        }
    }
}

DEVICE void add(float (&sum)[ROWS][OUTPUTS], const Packed (&pack)[OUTPUTS], const Shared& shared, int place) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 x = shared.row[r].x[plane][place];
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                sum[r][o] = fmaf(x.x, pack[o].at(4 * plane), sum[r][o]);
                sum[r][o] = fmaf(x.y, pack[o].at(4 * plane + 1), sum[r][o]);
                sum[r][o] = fmaf(x.z, pack[o].at(4 * plane + 2), sum[r][o]);
                sum[r][o] = fmaf(x.w, pack[o].at(4 * plane + 3), sum[r][o]);
            }
        }
}

KERNEL(THREADS, ROWS == 1 ? 3 : 1)
linear(const float* x, int inputs, Matrices matrices, const float* residual, float* result, int outputs, int tiles) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const long long vector = blockIdx.y;  // the first of ROWS

    // The beginnings of the first tile's rows, one a thread, about as much as memory gives until x is there.
    if (ALIGNED && static_cast<int>(blockIdx.x) < tiles && thread < TILE) {
        const Matrix& matrix = matrices.of(blockIdx.x);
        const long long row = (blockIdx.x - matrix.tile) * TILE + thread;
        if (row < matrix.outputs)
            prefetch(static_cast<const WEIGHT*>(matrix.weights) + row * matrix.stride,
                     min(AHEAD, static_cast<unsigned>(inputs * sizeof(WEIGHT))));
    }
    wait_for_inputs();
    release_dependents();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Matrix& matrix = matrices.of(tile);
        const int first = (tile - static_cast<int>(matrix.tile)) * TILE + thread / 32 * OUTPUTS;
        const WEIGHT* rows[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {  // a row of W that is not there stands in by the last one
            const int row = min(first + o, static_cast<int>(matrix.outputs) - 1);
            rows[o] = static_cast<const WEIGHT*>(matrix.weights) + row * matrix.stride;
        }
        // Each lane finishes one result of all rows; what it adds to the sum is on its way meanwhile.
        const int own = first + lane % OUTPUTS;
        const bool finishes = lane < ROWS * OUTPUTS && own < matrix.outputs;
        const long long place = (vector + lane / OUTPUTS) * outputs + matrix.first + own;
        float bias = 0.0f;
        float before = 0.0f;
        if (finishes && residual) before = load_fresh(residual + place);
        if (finishes) bias = matrix.bias.at(own, 0.0f);

        float sum[ROWS][OUTPUTS] = {};
        for (int start = 0; start < inputs; start += CHUNK) {
            const int count = min(CHUNK, inputs - start);
            if (inputs > CHUNK || tile == static_cast<int>(blockIdx.x)) {
                __syncthreads();
                for (int r = 0; r < ROWS; ++r) stage(shared.row[r], x + (vector + r) * inputs + start, count);
                __syncthreads();
            }
            for (int i = lane * WIDTH<WEIGHT>; i < count; i += DEPTH * STEP) {
                Packed pack[DEPTH][OUTPUTS];
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
#pragma unroll
                    for (int o = 0; o < OUTPUTS; ++o)
                        pack[j][o].template load<ALIGNED>(rows[o] + start + i + j * STEP, count - i - j * STEP);
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (i + j * STEP < count) add(sum, pack[j], shared, (i + j * STEP) / WIDTH<WEIGHT>);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                const float total = warp_sum(sum[r][o]);
                if (finishes && lane == r * OUTPUTS + o) result[place] = before + (total + bias);
            }
    }
}

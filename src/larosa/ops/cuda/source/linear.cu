// y = residual + x W^T + b, all of W read. W is row-major; a warp takes ROWS rows at a time.
#include "vectors.cuh"

#ifndef WEIGHT
#error "WEIGHT and ALIGNED are given by the launcher"
#endif

constexpr int THREADS = 256;
constexpr int ROWS = 2;                     // of a warp
constexpr int TILE = ROWS * THREADS / 32;   // rows of a block
constexpr int DEPTH = 4;                    // loads in flight for each row
constexpr int CHUNK = 8192;                 // entries of x held in shared memory
constexpr unsigned AHEAD = 2048;            // bytes of a row fetched before x is there
constexpr int STEP = 32 * WIDTH<WEIGHT>;    // entries a warp reads at once
constexpr int PLANES = WIDTH<WEIGHT> / 4;   // x lies in planes of 4 entries out of WIDTH: no bank conflicts

struct Shared {
    float4 x[PLANES][CHUNK / WIDTH<WEIGHT>];

    DEVICE float& at(int i) {
        return reinterpret_cast<float*>(&x[i / 4 % PLANES][i / WIDTH<WEIGHT>])[i % 4];
    }
};

SHARED(Shared);

using Packed = Pack<WEIGHT>;

DEVICE void stage(Shared& shared, const float* x, int count) {
    constexpr int AT_ONCE = 8;  // loads in flight
    const int padded = (count + WIDTH<WEIGHT> - 1) / WIDTH<WEIGHT> * WIDTH<WEIGHT>;
    for (int first = static_cast<int>(threadIdx.x); first < padded; first += AT_ONCE * THREADS) {
        float own[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) own[i] = load_fresh(x + min(first + i * THREADS, count - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = first + i * THREADS;
            if (at < padded) shared.at(at) = at < count ? own[i] : 0.0f;
        }
    }
}

DEVICE void add(float& sum, const Packed& pack, const Shared& shared, int place) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        const float4 x = shared.x[plane][place];
        sum = fmaf(x.x, pack.at(4 * plane), sum);
        sum = fmaf(x.y, pack.at(4 * plane + 1), sum);
        sum = fmaf(x.z, pack.at(4 * plane + 2), sum);
        sum = fmaf(x.w, pack.at(4 * plane + 3), sum);
    }
}

KERNEL(THREADS, 3)
linear(const float* x, int inputs, Matrices matrices, const float* residual, float* result, int outputs, int tiles) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const long long vector = blockIdx.y;

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
        const int first = (tile - static_cast<int>(matrix.tile)) * TILE + thread / 32 * ROWS;
        const WEIGHT* rows[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {  // a row that is not there stands in by the last one
            const int row = min(first + r, static_cast<int>(matrix.outputs) - 1);
            rows[r] = static_cast<const WEIGHT*>(matrix.weights) + row * matrix.stride;
        }
        // Lane r finishes row r; what it adds to the sum is on its way meanwhile.
        const bool finishes = lane < ROWS && first + lane < matrix.outputs;
        const long long place = vector * outputs + matrix.first + first + lane;
        float bias = 0.0f;
        float before = 0.0f;
        if (finishes && residual) before = load_fresh(residual + place);
        if (finishes) bias = matrix.bias.at(first + lane, 0.0f);

        float sum[ROWS] = {};
        for (int start = 0; start < inputs; start += CHUNK) {
            const int count = min(CHUNK, inputs - start);
            if (inputs > CHUNK || tile == static_cast<int>(blockIdx.x)) {
                __syncthreads();
                stage(shared, x + vector * inputs + start, count);
                __syncthreads();
            }
            for (int i = lane * WIDTH<WEIGHT>; i < count; i += DEPTH * STEP) {
                Packed pack[DEPTH][ROWS];
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
#pragma unroll
                    for (int r = 0; r < ROWS; ++r)
                        pack[j][r].template load<ALIGNED>(rows[r] + start + i + j * STEP, count - i - j * STEP);
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (i + j * STEP < count)
#pragma unroll
                        for (int r = 0; r < ROWS; ++r) add(sum[r], pack[j][r], shared, (i + j * STEP) / WIDTH<WEIGHT>);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float total = warp_sum(sum[r]);
            if (finishes && lane == r) result[place] = before + (total + bias);
        }
    }
}

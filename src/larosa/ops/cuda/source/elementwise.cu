// What is worked out entry by entry: a token's embedding, and the vectors that are sparsified elsewhere, in full, as a
// dense layer reads them.
#include "block.cuh"
#include "values.cuh"

constexpr int THREADS = 1024;

SHARED(Block<THREADS>);

// One block a vector.
KERNEL(THREADS, 1)
rms_norm(const float* input, int width, Vector gain, float eps, float* result) {
    Block<THREADS>& block = shared_memory<Block<THREADS>>();
    const long long row = blockIdx.x;
    input += row * width;

    if (threadIdx.x == 0) gain.fetch(width);
    wait_for_inputs();
    release_dependents();
    float squares = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < width; i += THREADS) {
        const float x = load_fresh(input + i);
        squares = fmaf(x, x, squares);
    }
    const float inverse = inverse_rms(block.sum(squares), width, eps);
    for (int i = static_cast<int>(threadIdx.x); i < width; i += THREADS)
        result[row * width + i] = load_fresh(input + i) * inverse * gain.at(i, 1.0f);
}

KERNEL(THREADS, 1)
silu_mul(const float* gate_up, int width, float* result) {
    const long long row = blockIdx.y;
    const int i = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);

    wait_for_inputs();
    release_dependents();
    gate_up += row * 2 * width;
    if (i < width) result[row * width + i] = silu_mul(load_fresh(gate_up + i), load_fresh(gate_up + width + i));
}

// A token below 0 is none, for which the first stands in; one that the table does not have gives NaN.
KERNEL(THREADS, 1)
embed(Vector table, long long vocabulary, int width, const long long* tokens, float* result) {
    const long long row = blockIdx.y;
    const int i = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);

    wait_for_inputs();
    release_dependents();
    const long long token = max(load_fresh(tokens + row), 0ll);
    if (i >= width) return;
    const Vector embedding = {static_cast<const char*>(table.data) + token * width * table.size(), table.type};
    result[row * width + i] = token < vocabulary ? embedding.at(i, 0.0f) : __uint_as_float(0x7fffffffu);
}

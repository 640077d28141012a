// y = residual + x W^T + b for an x that is given by its k entries: reads the columns of W at their indices.
//
// With an ADAPTER it is residual R^T instead of the residual. That reads memory while the list is still being made, and
// goes into the same sums.
#ifndef ADAPTER
#error "ADAPTER is given by the launcher"
#endif
constexpr int DEPTH = 5;     // loads in flight in each thread: as many as there are registers for
constexpr int CHUNK = 2048;  // entries of the list held in shared memory

#include "columns.cuh"

// The entries that a product reads, and how far apart columns are.
struct Listed {
    const float* values;
    const int* indices;
    unsigned stride;

    DEVICE Entry at(int i) const { return {load_fresh(values + i), load_fresh(indices + i) * stride}; }
};

// All entries of a vector, which was there before the kernel in front of this one began.
struct Carried {
    const float* values;
    unsigned stride;

    DEVICE Entry at(int i) const { return {load_earlier(values + i), i * stride}; }
};

struct Shared {
    Entry entries[CHUNK];
    Sums sums;
};

SHARED(Shared);

// Adds this block's part of `count` entries.
template <class Entries>
DEVICE void add(float (&sum)[WIDTH<WEIGHT>], Shared& shared, Entries entries, int count, const WEIGHT* weights,
                int there) {
    const int rank = cluster_rank<CLUSTER>();
    const int begin = static_cast<int>(static_cast<long long>(count) * rank / CLUSTER);
    const int end = static_cast<int>(static_cast<long long>(count) * (rank + 1) / CLUSTER);
    for (int start = begin; start < end; start += CHUNK) {
        const int here = min(CHUNK, end - start);
        __syncthreads();  // what stood here has been read
        for (int i = static_cast<int>(threadIdx.x); i < here; i += THREADS) shared.entries[i] = entries.at(start + i);
        __syncthreads();
        add_listed(sum, shared.entries, here, weights, there);
    }
}

KERNEL(THREADS, 2)
sparse_linear(const float* values, const int* indices, int k, Matrices matrices, const float* residual,
              const void* adapter, unsigned adapter_stride, int width, float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.y;
    const Outputs tile(matrices, static_cast<int>(blockIdx.x) / CLUSTER);

    cluster_begin<CLUSTER>();
    float sum[WIDTH<WEIGHT>] = {};
    if constexpr (ADAPTER)
        add(sum, shared, Carried{residual + row * width, adapter_stride}, width,
            static_cast<const WEIGHT*>(adapter) + tile.matrix.first + tile.mine, tile.there);
    wait_for_inputs();
    add(sum, shared, Listed{values + row * k, indices + row * k, tile.stride()}, k, tile.weights(), tile.there);
    release_dependents();
    finish(shared.sums, tile, sum, ADAPTER || !residual ? nullptr : residual + row * outputs, result + row * outputs);
}

// What each instruction set's copy of the kernels offers. None of these starts threads.
#pragma once

#include <stdint.h>

#include "../larosa_cpu.h"

namespace larosa {

constexpr int64_t kStrip = 8192;  // outputs of the sparse product summed up at once: 32 KiB of sums
constexpr int64_t kBlock = 16;    // columns of few bits whose activations are rounded by one unit
constexpr int64_t kChunk = 128;   // positions attended to
constexpr int64_t kTogether = 8;  // vectors that sparse products have in registers at once

// Whether columns that will be read next are fetched into the first-level cache, or into the second alone, where AMD's
// processors have more of them on the way at once.
extern const bool kFetchNear;

// Fetches a cache line. A loop that asked for kFetchNear itself would be slower: there is one of either kind.
template <bool near>
inline void fetch(const void *from) {
    __builtin_prefetch(from, 0, near ? 3 : 2);
}

// Room for `count` floats in whole vectors of any instruction set.
constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

struct Kernels {
    const char *isa;

    void (*rms_norm)(const float *x, const larosa_vector &gain, double eps, int64_t width, float *out);
    void (*silu_mul)(const float *gate, const float *up, int64_t width, float *out);

    // `magnitudes` has room for `width` words.
    void (*top_k)(const float *x, const larosa_vector &score, int64_t width, int64_t k, uint32_t *magnitudes,
                  float *values, int32_t *indices);
    int64_t (*above)(const float *x, const larosa_vector &score, int64_t width, float threshold, float *values,
                     int32_t *indices);

    bool (*all_below)(const int32_t *indices, int64_t count, int64_t bound);
    // Sums of columns, for outputs [first, first + count) of one matrix, count <= kStrip. Room for padded(count) sums.
    // Of the `listed` >= k indices those past k say what to fetch for the call that is likely to follow.
    void (*sparse_columns)(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                           const larosa_matrix &matrix, int64_t first, int64_t count, float *sums);
    // Adds columns to such sums of `rows` <= kTogether vectors, whose values for a column follow each other; one column
    // after the other, as sparse_columns does, so that a value of 0 changes nothing where the weight is finite. Meanwhile
    // the first `fetched` <= columns of `next` are fetched. The sums are left in an order of their own:
    void (*add_columns_of)(const float *values, int64_t rows, const int32_t *indices, int64_t columns,
                           const int32_t *next, int64_t fetched, const larosa_matrix &matrix, int64_t first,
                           int64_t count, float *const *sums);
    // puts them into that of the outputs.
    void (*order_sums)(int64_t dtype, int64_t count, float *sums);
    // sparse_columns of a matrix of few bits, with `depth` columns; first is a multiple of 128.
    void (*low_bit_columns)(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                            const larosa_low_bit &matrix, int64_t depth, int64_t first, int64_t count, float *sums);
    // residual + (sum of the `parts`, padded(count) apart, + bias) for those outputs; residual and out are of output 0.
    void (*finish)(const float *sums, int64_t parts, const larosa_vector &bias, int64_t first, int64_t count,
                   const float *residual, float *out);
    // x as dense_rows takes it for weights of this dtype.
    void (*arrange)(const float *x, int64_t depth, int64_t dtype, float *out);
    // The products with rows [first, first + count) of a matrix, of each of the `rows` vectors of x what it has alone.
    // Those of residual and out are `stride` apart.
    void (*dense_rows)(const float *x, int64_t rows, int64_t depth, const larosa_matrix &matrix, int64_t first,
                       int64_t count, const float *residual, float *out, int64_t stride);

    // Norm and rotation of one head of queries or keys; cos and sin are those of the position, or null.
    void (*prepare_head)(const float *head, int64_t size, const larosa_vector &gain, double eps, const float *cos,
                         const float *sin, float *out);
    // `scale` is written where the dtype is int8.
    void (*store_head)(const float *head, int64_t size, int64_t dtype, void *cache, uint16_t *scale);
    // One head's attention over `count` <= kChunk cached positions: part[0] is the largest score, part[1] the sum of
    // the weights relative to it, and the rest the sum of the values so weighted. An int8 position has two `scales`.
    void (*attend_chunk)(const float *query, const void *keys, const void *values, const uint16_t *scales, int64_t count,
                         int64_t size, int64_t dtype, float scale, float *part);
    void (*merge_chunks)(const float *parts, int64_t count, int64_t size, float *out);
};

namespace portable {
extern const Kernels kernels;
}
#ifdef LAROSA_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#endif
#ifdef LAROSA_AARCH64
namespace neon {
extern const Kernels kernels;
}
namespace neondotprod {
extern const Kernels kernels;
}
#endif

}  // namespace larosa

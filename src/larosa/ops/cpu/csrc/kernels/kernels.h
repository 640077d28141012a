// What each instruction set's copy of the kernels offers. None of these starts threads.
#pragma once

#include <stdint.h>

#include "../larosa_cpu.h"

namespace larosa {

constexpr int64_t kStrip = 8192;  // outputs of the sparse product summed up at once: 32 KiB of sums
constexpr int64_t kBlock = 16;    // columns of few bits whose activations are rounded by one unit
constexpr int64_t kChunk = 128;   // positions attended to

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
    // The same of a matrix of few bits, with `depth` columns; first is a multiple of 128.
    void (*low_bit_columns)(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                            const larosa_low_bit &matrix, int64_t depth, int64_t first, int64_t count, float *sums);
    // residual + (sum of the `parts`, padded(count) apart, + bias) for those outputs; residual and out are of output 0.
    void (*finish)(const float *sums, int64_t parts, const larosa_vector &bias, int64_t first, int64_t count,
                   const float *residual, float *out);
    // x as dense_rows takes it for weights of this dtype.
    void (*arrange)(const float *x, int64_t depth, int64_t dtype, float *out);
    void (*dense_rows)(const float *x, int64_t depth, const larosa_matrix &matrix, int64_t first, int64_t count,
                       const float *residual, float *out);

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
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#endif

}  // namespace larosa

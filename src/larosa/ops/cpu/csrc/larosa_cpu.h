/* The CPU kernels' C interface.
 *
 * Activations are float32 and contiguous. Tensors of weights come in the dtypes below. No pointer needs more alignment
 * than its elements. Every sum is taken in an order that depends on the shapes but for the number of rows and on the
 * instruction set alone, so results have the same bits whatever the number of threads, and a row's whatever other rows
 * there are. Functions that can fail return a larosa_status.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum larosa_dtype { LAROSA_FLOAT32 = 0, LAROSA_BFLOAT16 = 1, LAROSA_FLOAT16 = 2, LAROSA_INT8 = 3 };

enum larosa_status {
    LAROSA_OK = 0,
    LAROSA_BAD_INDEX = 1,    /* an index is outside [0, depth) */
    LAROSA_BAD_POSITION = 2, /* a position is outside [0, capacity), or two rows have the same one of one cache */
    LAROSA_MISALIGNED = 3,   /* a pointer is not a multiple of its element size */
    LAROSA_BAD_CACHE = 4     /* a row's cache is outside [0, caches) */
};

/* A vector of some dtype; data is null where there is none. */
struct larosa_vector {
    const void *data;
    int64_t dtype;
};

/* A weight [outputs, depth], row-major for larosa_linear and column-major for larosa_sparse_linear, its bias, and what
 * its rows are multiplied with. Only larosa_adapt's is int8, and only that has a scale. */
struct larosa_matrix {
    const void *weight;
    int64_t dtype;
    int64_t outputs;
    struct larosa_vector bias;
    struct larosa_vector scale;
};

/* A weight [outputs, depth] of 4, 5, 6 or 8 bits by columns: weight[n, d] = scales[d, n / group] * q[n, d], and its bias.
 * Codes of 8 bits are q; of 4 bits q + 8, two outputs a byte, the first of them in its low half. Codes c = q + 16 of 5 bits and
 * q + 32 of 6 are by 32 outputs, the last of which may be filling: 16 bytes with c & 15 likewise, and then n = 4 or 8 bytes with
 * c >> 4. Those of the outputs in byte b of the 16 are in byte b % n, at bit b / n * n / 2, those of the first output lower. */
struct larosa_low_bit {
    const uint8_t *codes;   /* [depth, outputs * bits / 8, rounded up; of 5 and 6 bits whole 32 outputs] */
    const uint16_t *scales; /* bfloat16 [depth, outputs / group, rounded up] */
    int64_t codes_stride;   /* bytes from column to column */
    int64_t scales_stride;  /* likewise, in elements */
    int64_t bits;
    int64_t group; /* a power of two, 32 or more */
    int64_t outputs;
    struct larosa_vector bias;
};

/* What this header says, as a number: another one whenever a declaration changes, so that a library that was built from
 * another header is told apart before anything else of it is called. */
enum { LAROSA_INTERFACE = 6 };
int64_t larosa_interface(void);

/* The instruction set in use, at first the widest that the processor has: "portable"; "avx2", "avxvnni", "avx512" or
 * "avx512vnni" on x86-64; "neon" or "neondotprod" on 64-bit Arm. */
const char *larosa_isa(void);
/* Use another one. 0, or 1: not known, or 2: known, but not to this processor or this build. */
int larosa_set_isa(const char *name);

/* Share the threads of an OpenMP run-time library that is loaded already: the address of its GOMP_parallel.
 * Null: threads of the library's own. */
void larosa_share_openmp(void *gomp_parallel);

/* out[rows, width] = x / sqrt(mean(x^2) + eps) * gain. */
void larosa_rms_norm(const float *x, const struct larosa_vector *gain, double eps, int64_t rows, int64_t width,
                     float *out);
/* out[rows, width] = silu(gate) * up, with gate_up[rows, 2 width]. */
void larosa_silu_mul(const float *gate_up, int64_t rows, int64_t width, float *out);

/* The k entries of largest |x| score in each row: values and indices [rows, k], indices ascending. Exactly k: ties go
 * to the lowest index, NaN is larger than infinity. */
void larosa_top_k(const float *x, int64_t rows, int64_t width, int64_t k, const struct larosa_vector *score,
                  float *values, int32_t *indices);
/* The same of rms_norm and of silu_mul, whose results are not kept. */
void larosa_rms_norm_top_k(const float *x, const struct larosa_vector *gain, double eps, int64_t rows, int64_t width,
                           int64_t k, const struct larosa_vector *score, float *values, int32_t *indices);
void larosa_silu_mul_top_k(const float *gate_up, int64_t rows, int64_t width, int64_t k,
                           const struct larosa_vector *score, float *values, int32_t *indices);
/* The entries of each row of x whose magnitude, times the score if any, is not up to the threshold, and how many they
 * are: values and indices [rows, columns] end in zeros in each row, counts [rows]. `columns` is the width, or a multiple of
 * it where an entry has several columns, each with one of as many scores: column c is of entry c % width, and indices are
 * of columns. */
void larosa_above(const float *x, int64_t rows, int64_t width, int64_t columns, float threshold,
                  const struct larosa_vector *score, float *values, int32_t *indices, int64_t *counts);
/* The same of rms_norm and of silu_mul, whose results are not kept. */
void larosa_rms_norm_above(const float *x, const struct larosa_vector *gain, double eps, int64_t rows, int64_t width,
                           int64_t columns, float threshold, const struct larosa_vector *score, float *values,
                           int32_t *indices, int64_t *counts);
void larosa_silu_mul_above(const float *gate_up, int64_t rows, int64_t width, int64_t columns, float threshold,
                           const struct larosa_vector *score, float *values, int32_t *indices, int64_t *counts);

/* out[rows, sum of outputs] = residual + x W^T + bias, the matrices' outputs side by side; residual may be null. */
int larosa_linear(const float *x, int64_t rows, int64_t depth, const struct larosa_matrix *matrices, int64_t count,
                  const float *residual, float *out, int64_t threads);
/* The same, put off: it is computed while this thread makes other calls, wherever threads would wait for each other in
 * them, and is there when a larosa_sparse_linear or larosa_low_bit_linear with `out` for its residual is. Until then nothing may read `out` or
 * change what this call was given. */
int larosa_linear_meanwhile(const float *x, int64_t rows, int64_t depth, const larosa_matrix *matrices, int64_t count,
                            const float *residual, float *out, int64_t threads);
/* out[rows, outputs] = scale * ([x, 128 x_leading] W^T), with x[rows, width] and an int8 matrix of depth >= width, whose
 * last depth - width columns are for the leading entries of x once more. Now, or put off likewise. */
int larosa_adapt(const float *x, int64_t rows, int64_t width, int64_t depth, const struct larosa_matrix *matrix,
                 float *out, int64_t threads);
int larosa_adapt_meanwhile(const float *x, int64_t rows, int64_t width, int64_t depth,
                           const struct larosa_matrix *matrix, float *out, int64_t threads);
/* larosa_linear of the vectors that have values[rows, k] at indices[rows, k] and are zero elsewhere. Where `listed` is not
 * null, the first listed[row] of a row's k entries are meant. Of several rows indices are to ascend for the weights to be
 * read once. */
int larosa_sparse_linear(const float *values, const int32_t *indices, int64_t rows, int64_t k, int64_t depth,
                         const struct larosa_matrix *matrices, int64_t count, const float *residual, float *out,
                         const int64_t *listed, int64_t threads);

/* The same by weights of few bits, in whole numbers: values times scales are rounded by one unit for 16 listed columns of
 * a group of outputs, to 8 bits for codes of 4 and to 15 for longer ones. Results have the same bits on every instruction set. A column whose value is not finite
 * makes NaN of all outputs. Null indices mean all columns where k is not 0: depth is k, or a multiple of it, and column c
 * is of value c % k. */
int larosa_low_bit_linear(const float *values, const int32_t *indices, int64_t rows, int64_t k, int64_t depth,
                          const struct larosa_low_bit *matrices, int64_t count, const float *residual, float *out,
                          const int64_t *listed, int64_t threads);

/* The attention of a position each of `rows` rows, over caches [caches, key_heads, capacity, size]. A row of qkv holds
 * `heads` query heads, then key_heads key heads, then as many value heads, of `size` each. */
struct larosa_attention {
    const float *qkv;
    void *keys;
    void *values;
    uint16_t *scales; /* [caches, key_heads, capacity, 2] bfloat16: what int8 keys and values are multiplied by, or null */
    const int64_t *position; /* [rows] */
    const int64_t *cache;    /* [rows], which cache each is of; null where all are of the first */
    const float *cos; /* [capacity, size], or null */
    const float *sin;
    struct larosa_vector q_gain;
    struct larosa_vector k_gain;
    int64_t heads;
    int64_t key_heads;
    int64_t capacity;
    int64_t size;
    int64_t dtype; /* of the cache */
    int64_t window; /* positions attended to, this one included; 0 for all */
    int64_t rows;
    int64_t caches;
    double eps;
    double scale;
};
/* Writes the keys and values of all rows to their places, and then out[rows, heads, size]: rows of one cache attend to
 * each other up to their own positions. */
int larosa_attend(const struct larosa_attention *attention, float *out, int64_t threads);

enum larosa_function {
    LAROSA_RMS_NORM = 0,
    LAROSA_SILU_MUL = 1,
    LAROSA_TOP_K = 2,
    LAROSA_RMS_NORM_TOP_K = 3,
    LAROSA_SILU_MUL_TOP_K = 4,
    LAROSA_LINEAR = 5,
    LAROSA_SPARSE_LINEAR = 6,
    LAROSA_ATTEND = 7,
    LAROSA_LINEAR_MEANWHILE = 8,
    LAROSA_ADAPT = 9,
    LAROSA_ADAPT_MEANWHILE = 10,
    LAROSA_ABOVE = 11,
    LAROSA_RMS_NORM_ABOVE = 12,
    LAROSA_SILU_MUL_ABOVE = 13,
    LAROSA_LOW_BIT_LINEAR = 14
};

/* An argument: an address or an integer, or a floating-point number of any size. */
union larosa_value {
    int64_t integer;
    double real;
};

enum { LAROSA_MOST_ARGUMENTS = 11 };

/* One of these functions, and its arguments in their order. */
struct larosa_call {
    int64_t function;
    union larosa_value arguments[LAROSA_MOST_ARGUMENTS];
};

/* Makes the calls in their order, up to the first that fails, whose status it returns. */
int larosa_replay(const struct larosa_call *calls, int64_t count);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

// What produces the vectors that are sparsified.
#pragma once

#include "vector.h"

namespace larosa {
namespace LAROSA_ISA {

// Squares are summed in double precision: there neither huge nor tiny entries get lost.
inline void rms_norm(const float *x, const larosa_vector &gain, double eps, int64_t width, float *out) {
    Doubles squares = {};
    for_vectors(width, [&](int64_t at, int64_t count) {
        const Doubles wide = __builtin_convertvector(load_at(x, at, count), Doubles);
        squares += wide * wide;
    });
    const double unit = 1 / __builtin_sqrt(sum(squares) / double(width) + eps);
    for_vectors(width, [&](int64_t at, int64_t count) {
        const Doubles wide = __builtin_convertvector(load_at(x, at, count), Doubles);
        Doubles normed = wide * unit;
        if (gain.data) normed *= __builtin_convertvector(load_vector(gain, at, count), Doubles);
        store_at(out, at, __builtin_convertvector(normed, Floats), count);
    });
}

inline void silu_mul(const float *gate, const float *up, int64_t width, float *out) {
    for_vectors(width, [&](int64_t at, int64_t count) {
        const Floats x = load_at(gate, at, count);
        store_at(out, at, x / (1.0f + exp(-x)) * load_at(up, at, count), count);
    });
}

}  // namespace LAROSA_ISA
}  // namespace larosa

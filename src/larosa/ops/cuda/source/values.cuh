// The vectors that are sparsified, one entry at a time: as they are, normed, or the MLP's gated activation.
#ifndef LAROSA_VALUES
#define LAROSA_VALUES

#include "vectors.cuh"

// gate / (1 + exp(-gate)) * up, without a power that overflows and without branches: to within 1e-6 for gates down to
// -10, and 7e-6 for all, because the exponent is rounded.
DEVICE float silu_mul(float gate, float up) {
    const float power = power_of_two(-LOG2_E * fabsf(gate));
    return gate * ((gate < 0.0f ? power : 1.0f) * reciprocal(1.0f + power)) * up;
}

// 1 / sqrt(mean(x^2) + eps)
DEVICE float inverse_rms(float sum_of_squares, int width, float eps) {
    return rsqrtf(sum_of_squares * reciprocal(static_cast<float>(width)) + eps);
}

#endif

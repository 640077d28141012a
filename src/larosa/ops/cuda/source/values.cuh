// The vectors that are sparsified, one entry at a time: as they are, normed, or the MLP's gated activation.
#ifndef LAROSA_VALUES
#define LAROSA_VALUES

#include "vectors.cuh"

// gate / (1 + exp(-gate)) * up, without a power that overflows and without branches.
DEVICE float silu_mul(float gate, float up) {
    const float power = expf(-fabsf(gate));
    return gate * ((gate < 0.0f ? power : 1.0f) * reciprocal(1.0f + power)) * up;
}

// 1 / sqrt(mean(x^2) + eps)
DEVICE float inverse_rms(float sum_of_squares, int width, float eps) {
    return rsqrtf(sum_of_squares * reciprocal(static_cast<float>(width)) + eps);
}

#endif

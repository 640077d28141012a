// The vectors that are sparsified, one entry at a time: as they are, normed, or the MLP's gated activation.
#ifndef LAROSA_VALUES
#define LAROSA_VALUES

#include "vectors.cuh"

DEVICE float silu_mul_at(const float* gate_up, int i, int width) {
    const float gate = load_fresh(gate_up + i);
    return gate / (1.0f + expf(-gate)) * load_fresh(gate_up + width + i);
}

// 1 / sqrt(mean(x^2) + eps)
DEVICE float inverse_rms(float sum_of_squares, int width, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

#endif

// Which entries of a vector the next product reads.
#pragma once

#include "vector.h"

namespace larosa {
namespace LAROSA_ISA {

// The bits of a non-negative float, read as an integer, sort like the float; all NaN count alike, above infinity.
inline Words magnitude(Floats x) {
    const Words word = bits<Words>(x) & 0x7fffffffu;
    const Words nan = Words{} + 0x7f800001u;
    return word > nan ? nan : word;
}

inline int64_t count_from(const uint32_t *magnitudes, int64_t width, uint32_t bound) {
    Words counts = {};
    for_vectors(width, [&](int64_t at, int64_t count) {
        Words word = {};
        if (count == kLanes) {
            __builtin_memcpy(&word, magnitudes + at, sizeof word);
        } else {
            for (int64_t i = 0; i < count; ++i) word[i] = magnitudes[at + i];
        }
        counts -= bits<Words>(word >= bound);  // true is -1; bound > 0, so the padding does not count
    });
    int64_t total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += counts[i];
    return total;
}

// The k-th largest magnitude is built from its highest bit down: a bit is set where k magnitudes reach that far.
// That is 31 passes over what the first-level cache holds, a few microseconds, whatever the values.
inline void top_k(const float *x, const larosa_vector &score, int64_t width, int64_t k, uint32_t *magnitudes,
                  float *values, int32_t *indices) {
    if (k == 0) return;
    if (k == width) {
        for (int64_t i = 0; i < width; ++i) indices[i] = int32_t(i);
        __builtin_memcpy(values, x, size_t(width) * sizeof *x);
        return;
    }
    for_vectors(width, [&](int64_t at, int64_t count) {
        Floats weighted = load_at(x, at, count);
        if (score.data) weighted *= load_vector(score, at, count);
        const Words word = magnitude(weighted);
        __builtin_memcpy(magnitudes + at, &word, size_t(count) * sizeof(uint32_t));
    });
    uint32_t threshold = 0;
    int64_t reaching = width;  // how many are at or above the threshold
    for (uint32_t bit = 1u << 30; bit != 0 && reaching != k; bit >>= 1) {
        const int64_t count = count_from(magnitudes, width, threshold | bit);
        if (count >= k) {
            threshold |= bit;
            reaching = count;
        }
    }
    // Of those equal to the threshold the first `room` are taken.
    int64_t room = reaching == k ? k : k - count_from(magnitudes, width, threshold + 1);
    int64_t taken = 0;
    for (int64_t i = 0; taken < k; ++i) {
        const bool tied = magnitudes[i] == threshold;
        values[taken] = x[i];
        indices[taken] = int32_t(i);
        taken += (magnitudes[i] > threshold) | (tied & (room > 0));
        room -= tied;
    }
}

inline int64_t above(const float *x, int64_t width, float threshold, float *values, int32_t *indices) {
    int64_t taken = 0;
    for (int64_t i = 0; i < width; ++i) {
        values[taken] = x[i];
        indices[taken] = int32_t(i);
        taken += !(__builtin_fabsf(x[i]) <= threshold);
    }
    return taken;
}

}  // namespace LAROSA_ISA
}  // namespace larosa

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

// The k entries above the threshold, or at it, of which the first `room` are taken.
inline void gather(const float *x, const uint32_t *magnitudes, int64_t width, int64_t k, uint32_t threshold,
                   int64_t room, float *values, int32_t *indices) {
    int64_t taken = 0, i = 0;
#if LAROSA_LANES == 16
    const __m512i bound = _mm512_set1_epi32(int32_t(threshold));
    __m512i where = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kLanes <= width; i += kLanes) {
        const __m512i word = _mm512_loadu_si512(magnitudes + i);
        uint32_t kept = _mm512_cmpgt_epu32_mask(word, bound);
        for (uint32_t tied = _mm512_cmpeq_epu32_mask(word, bound); tied && room > 0; tied &= tied - 1, --room)
            kept |= tied & -tied;
        const int count = __builtin_popcount(kept);
        const __mmask16 first = __mmask16((1u << count) - 1);
        const __m512 entries = _mm512_maskz_compress_ps(__mmask16(kept), _mm512_loadu_ps(x + i));
        _mm512_mask_storeu_ps(values + taken, first, entries);
        _mm512_mask_storeu_epi32(indices + taken, first, _mm512_maskz_compress_epi32(__mmask16(kept), where));
        where = _mm512_add_epi32(where, _mm512_set1_epi32(kLanes));
        taken += count;
    }
#endif
    // An entry is written before it is known to be kept: a branch would be guessed wrong half of the time.
    for (; taken < k; ++i) {
        const bool tied = magnitudes[i] == threshold;
        values[taken] = x[i];
        indices[taken] = int32_t(i);
        taken += (magnitudes[i] > threshold) | (tied & (room > 0));
        room -= tied;
    }
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
    const int64_t room = reaching == k ? k : k - count_from(magnitudes, width, threshold + 1);
    gather(x, magnitudes, width, k, threshold, room, values, indices);
}

inline int64_t above(const float *x, const larosa_vector &score, int64_t width, float threshold, float *values,
                     int32_t *indices) {
    int64_t taken = 0;
    for_vectors(width, [&](int64_t at, int64_t count) {
        Floats weighted = load_at(x, at, count);
        if (score.data) weighted *= load_vector(score, at, count);
        for (int64_t i = 0; i < count; ++i) {
            values[taken] = x[at + i];
            indices[taken] = int32_t(at + i);
            taken += !(__builtin_fabsf(weighted[i]) <= threshold);
        }
    });
    return taken;
}

}  // namespace LAROSA_ISA
}  // namespace larosa

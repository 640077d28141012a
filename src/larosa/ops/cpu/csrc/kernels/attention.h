// One position's attention over a cache, in chunks of positions that are merged afterwards.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "vector.h"

namespace larosa {
namespace LAROSA_ISA {

inline void prepare_head(const float *head, int64_t size, const larosa_vector &gain, double eps, const float *cos,
                         const float *sin, float *out) {
    if (gain.data) {
        rms_norm(head, gain, eps, size, out);
    } else {
        __builtin_memcpy(out, head, size_t(size) * sizeof *out);
    }
    if (!cos) return;
    const int64_t half = size / 2;
    for_vectors(half, [&](int64_t at, int64_t some) {
        const Floats first = load_at(out, at, some), second = load_at(out + half, at, some);
        const Floats cos_first = load_at(cos, at, some), cos_second = load_at(cos + half, at, some);
        const Floats sin_first = load_at(sin, at, some), sin_second = load_at(sin + half, at, some);
        store_at(out, at, multiply_add(first, cos_first, -(second * sin_first)), some);
        store_at(out + half, at, multiply_add(second, cos_second, first * sin_second), some);
    });
}

inline float bfloat16_at(const uint16_t *x) { return bits<float>(uint32_t(*x) << 16); }

// To the nearest, ties to even.
inline uint16_t round_to_bfloat16(float x) {
    if (x != x) return 0x7fc0;
    const uint32_t word = bits<uint32_t>(x);
    return uint16_t((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

inline uint16_t round_to_float16(float x) {
    if (x != x) return 0x7e00;
    const uint32_t word = bits<uint32_t>(x), sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {  // subnormal: a multiple of 2^-24, the last place of a half
        return uint16_t(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

// To digits of 8 bits, the largest magnitude to 127. What is not finite has a scale that says so, and digits of 0.
inline void store_digits(const float *head, int64_t size, int8_t *to, uint16_t *scale) {
    uint32_t largest = 0;  // bits of a magnitude: NaN's are above infinity's
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t magnitude = bits<uint32_t>(head[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    *scale = round_to_bfloat16(bits<float>(largest) / 127);
    const float wide = bfloat16_at(scale);
    const float inverse = wide > 1e-37f && wide < __builtin_inff() ? 1 / wide : 0;
    for (int64_t i = 0; i < size; ++i) {
        // Adding and taking off 1.5 * 2^23 leaves no places behind the point.
        const float digit = inverse == 0 ? 0 : (head[i] * inverse + 0x1.8p23f) - 0x1.8p23f;
        to[i] = int8_t(digit > 127 ? 127 : digit < -127 ? -127 : digit);
    }
}

inline void store_head(const float *head, int64_t size, int64_t dtype, void *cache, uint16_t *scale) {
    if (dtype == LAROSA_INT8) {
        store_digits(head, size, static_cast<int8_t *>(cache), scale);
        return;
    }
    if (dtype == LAROSA_FLOAT32) {
        __builtin_memcpy(cache, head, size_t(size) * sizeof *head);
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(cache);
    const auto round = dtype == LAROSA_BFLOAT16 ? round_to_bfloat16 : round_to_float16;
    for (int64_t i = 0; i < size; ++i) to[i] = round(head[i]);
}

template <class Type>
inline Floats load_at(const typename Type::Element *from, int64_t at, int64_t count) {
    return count == kLanes ? load<Type>(from + at) : load_some<Type>(from + at, count);
}

// The sum of the values times their weights; several vectors of it side by side hide the latency of an addition.
template <class Type>
inline void mix_values(const float *weights, const typename Type::Element *values, int64_t count, int64_t size,
                       float *out) {
    constexpr int64_t together = 4;
    int64_t at = 0;
    for (; at + together * kLanes <= size; at += together * kLanes) {
        Floats mixed[together] = {};
        for (int64_t t = 0; t < count; ++t)
            for (int64_t v = 0; v < together; ++v)
                mixed[v] = multiply_add(weights[t], load<Type>(values + t * size + at + v * kLanes), mixed[v]);
        for (int64_t v = 0; v < together; ++v) store(out + at + v * kLanes, mixed[v]);
    }
    for_vectors(size - at, [&](int64_t past, int64_t some) {
        Floats mixed = {};
        for (int64_t t = 0; t < count; ++t)
            mixed = multiply_add(weights[t], load_at<Type>(values + t * size + at, past, some), mixed);
        store_at(out + at, past, mixed, some);
    });
}

template <class Type>
inline void attend_typed(const float *query, const typename Type::Element *keys, const typename Type::Element *values,
                         const uint16_t *scales, int64_t count, int64_t size, float scale, float *part) {
    float weights[kChunk];
    float largest = -__builtin_inff();
    for (int64_t t = 0; t < count; ++t) {
        Floats products = {};
        for_vectors(size, [&](int64_t at, int64_t some) {
            products = multiply_add(load_at(query, at, some), load_at<Type>(keys + t * size, at, some), products);
        });
        weights[t] = scale * sum(products) * (scales ? bfloat16_at(scales + 2 * t) : 1);
        largest = weights[t] > largest ? weights[t] : largest;
    }
    // Where all scores are minus infinity or NaN, or one is infinite, the weights come out as softmax has them.
    const float base = largest == -__builtin_inff() ? 0 : largest;
    Floats total = {};
    for_vectors(count, [&](int64_t at, int64_t some) {
        Floats weight = exp(load_at(weights, at, some) - base);
        for (int64_t i = some; i < kLanes; ++i) weight[i] = 0;
        store_at(weights, at, weight, some);
        total += weight;
    });
    part[0] = largest;
    part[1] = sum(total);
    if (scales)
        for (int64_t t = 0; t < count; ++t) weights[t] *= bfloat16_at(scales + 2 * t + 1);
    mix_values<Type>(weights, values, count, size, part + 2);
}

inline void attend_chunk(const float *query, const void *keys, const void *values, const uint16_t *scales,
                         int64_t count, int64_t size, int64_t dtype, float scale, float *part) {
    with_any_type(dtype, [&](auto type) {
        using Type = decltype(type);
        using Element = typename Type::Element;
        attend_typed<Type>(query, static_cast<const Element *>(keys), static_cast<const Element *>(values), scales, count,
                           size, scale, part);
    });
}

inline void merge_chunks(const float *parts, int64_t count, int64_t size, float *out) {
    const int64_t stride = size + 2;
    float largest = -__builtin_inff();
    for (int64_t i = 0; i < count; ++i) largest = parts[i * stride] > largest ? parts[i * stride] : largest;
    const float base = largest == -__builtin_inff() ? 0 : largest;
    Floats total = {};
    for (int64_t at = 0; at < size; ++at) out[at] = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float *part = parts + i * stride;
        // A chunk's weights are relative to its largest score, or to 0 where that is minus infinity.
        const float own = part[0] == -__builtin_inff() ? 0 : part[0];
        const float factor = own == base ? 1 : exp(own - base);
        total = multiply_add(factor, splat(part[1]), total);
        for_vectors(size, [&](int64_t at, int64_t some) {
            store_at(out, at, multiply_add(factor, load_at(part + 2, at, some), load_at(out, at, some)), some);
        });
    }
    for (int64_t at = 0; at < size; ++at) out[at] /= total[0];
}

}  // namespace LAROSA_ISA
}  // namespace larosa

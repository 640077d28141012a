// Products of a vector with a matrix: dense by rows, sparse by columns. Both are bound by the reading of weights.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace larosa {
namespace LAROSA_ISA {

constexpr int64_t kCacheLine = 64;
// Columns of the weights added up together: few enough for the processor to follow their streams and those of the next
// ones, which shows while the memory is busy.
constexpr int kGroup = 4;

inline bool all_below(const int32_t *indices, int64_t count, int64_t bound) {
    const uint32_t limit = uint32_t(bound);
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= uint32_t(indices[i]) >= limit;
    return bad == 0;
}

// residual + (sum of the parts + bias), the same for all products.
inline void finish(const float *sums, int64_t parts, const larosa_vector &bias, int64_t first, int64_t count,
                   const float *residual, float *out) {
    for_vectors(count, [&](int64_t at, int64_t some) {
        Floats result = load_at(sums, at, some);
        for (int64_t part = 1; part < parts; ++part) result += load_at(sums + part * padded(count), at, some);
        if (bias.data) result += load_vector(bias, first + at, some);
        if (residual) result += load_at(residual + first, at, some);
        store_at(out + first, at, result, some);
    });
}

// `count` floats, a multiple of 2 kLanes, from the order that load_pair has elements of a mixed type in, to their own.
inline void unmix(float *x, int64_t count) {
    for (int64_t at = 0; at < count; at += 2 * kLanes) {
        float pair[2 * kLanes];
        __builtin_memcpy(pair, x + at, sizeof pair);
        for (int64_t i = 0; i < kLanes; ++i) {
            x[at + 2 * i] = pair[i];
            x[at + 2 * i + 1] = pair[kLanes + i];
        }
    }
}

// The other way round.
inline void mix(const float *x, int64_t count, float *out) {
    for (int64_t at = 0; at < count; at += 2 * kLanes)
        for (int64_t i = 0; i < kLanes; ++i) {
            out[at + i] = x[at + 2 * i];
            out[at + kLanes + i] = x[at + 2 * i + 1];
        }
}

// What add_columns takes at a time: whole cache lines and whole pairs of vectors.
template <class Type>
constexpr int64_t columns_step() {
    constexpr int64_t line = kCacheLine / int64_t(sizeof(typename Type::Element));
    return line > 2 * kLanes ? line : 2 * kLanes;
}

// sums[0 : count] += the group's columns times their values. The next group's columns are fetched meanwhile: each lies
// elsewhere, in too short a piece for the processor to foresee. Sums of whole steps of a mixed type stay mixed.
template <class Type, int group>
inline void add_columns(const typename Type::Element *const *columns, const typename Type::Element *const *next,
                        const float *values, int64_t count, float *sums) {
    using Element = typename Type::Element;
    constexpr int64_t line = kCacheLine / int64_t(sizeof(Element));
    constexpr int64_t step = columns_step<Type>();
    constexpr int64_t vectors = step / kLanes;
    int64_t at = 0;
    for (; at + step <= count; at += step) {
        Floats total[vectors];
        for (int64_t v = 0; v < vectors; ++v) total[v] = load(sums + at + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < group; ++i) {
            for (int64_t ahead = 0; ahead < step; ahead += line) __builtin_prefetch(next[i] + at + ahead, 0, 3);
            for (int64_t v = 0; v < vectors; v += 2) {
                Floats pair[2];
                load_pair<Type>(columns[i] + at + v * kLanes, pair);
                total[v] += values[i] * pair[0];
                total[v + 1] += values[i] * pair[1];
            }
        }
        for (int64_t v = 0; v < vectors; ++v) store(sums + at + v * kLanes, total[v]);
    }
    for (; at < count; at += kLanes) {
        const int64_t some = count - at < kLanes ? count - at : kLanes;
        Floats total = load(sums + at);
        for (int i = 0; i < group; ++i) {
            const Element *column = columns[i] + at;
            total += values[i] * (some == kLanes ? load<Type>(column) : load_some<Type>(column, some));
        }
        store(sums + at, total);
    }
}

template <class Type>
inline void sparse_strip(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                         const larosa_matrix &matrix, int64_t first, int64_t count, float *sums) {
    using Element = typename Type::Element;
    const Element *weight = static_cast<const Element *>(matrix.weight) + first;
    const auto column = [&](int64_t i) { return weight + int64_t(indices[i]) * matrix.outputs; };
    int64_t at = 0;
    for (; at + kGroup <= k; at += kGroup) {
        const Element *columns[kGroup], *next[kGroup];
        for (int64_t i = 0; i < kGroup; ++i) {
            columns[i] = column(at + i);
            next[i] = column(at + kGroup + i < listed ? at + kGroup + i : at + i);
        }
        add_columns<Type, kGroup>(columns, next, values + at, count, sums);
    }
    for (; at < k; ++at) {
        const Element *single = column(at);
        add_columns<Type, 1>(&single, &single, values + at, count, sums);
    }
}

inline void sparse_columns(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                           const larosa_matrix &matrix, int64_t first, int64_t count, float *sums) {
    for (int64_t at = 0; at < count; at += kLanes) store(sums + at, Floats{});
    with_type(matrix.dtype, [&](auto type) {
        using Type = decltype(type);
        sparse_strip<Type>(values, indices, k, listed, matrix, first, count, sums);
        if (Type::mixed) unmix(sums, count / columns_step<Type>() * columns_step<Type>());
    });
}

constexpr int kChains = 2;  // sums of one dot product side by side
constexpr int kRows = 4;    // dot products side by side; together they hide the latency of an addition

// x in the order that dot_rows reads it in, for weights of a dtype.
inline void arrange(const float *x, int64_t depth, int64_t dtype, float *out) {
    const int64_t whole = depth / (kChains * kLanes) * (kChains * kLanes);
    const int64_t mixed = with_any_type(dtype, [&](auto type) { return decltype(type)::mixed ? whole : 0; });
    mix(x, mixed, out);
    __builtin_memcpy(out + mixed, x + mixed, size_t(depth - mixed) * sizeof *x);
}

// The dot products of x with `group` rows that follow each other. As many rows after them are fetched meanwhile, in the
// order of memory, so that no row's beginning is waited for.
template <class Type, int group>
inline void dot_rows(const float *x, const typename Type::Element *rows, int64_t depth, float *sums) {
    constexpr int64_t line = kCacheLine / int64_t(sizeof(typename Type::Element));
    constexpr int64_t step = kChains * kLanes;
    Floats total[group][kChains] = {};
    int64_t at = 0;
    for (; at + step <= depth; at += step) {
        const auto *after = rows + group * (depth + at);
        for (int64_t ahead = 0; ahead < group * step; ahead += line) __builtin_prefetch(after + ahead, 0, 2);
        for (int i = 0; i < group; ++i)
            for (int c = 0; c < kChains; c += 2) {
                const int64_t from = at + c * kLanes;
                Floats pair[2];
                load_pair<Type>(rows + i * depth + from, pair);
                total[i][c] += load(x + from) * pair[0];
                total[i][c + 1] += load(x + from + kLanes) * pair[1];
            }
    }
    for (; at < depth; at += kLanes) {
        const int64_t some = depth - at < kLanes ? depth - at : kLanes;
        for (int i = 0; i < group; ++i) {
            const auto *row = rows + i * depth + at;
            total[i][0] += load_at(x, at, some) * (some == kLanes ? load<Type>(row) : load_some<Type>(row, some));
        }
    }
    for (int i = 0; i < group; ++i) {
        for (int c = 1; c < kChains; ++c) total[i][0] += total[i][c];
        sums[i] = sum(total[i][0]);
    }
}

inline void dense_rows(const float *x, int64_t depth, const larosa_matrix &matrix, int64_t first, int64_t count,
                       const float *residual, float *out) {
    with_any_type(matrix.dtype, [&](auto type) {
        using Type = decltype(type);
        const auto *weight = static_cast<const typename Type::Element *>(matrix.weight);
        for (int64_t done = 0; done < count; done += kLanes) {
            const int64_t some = count - done < kLanes ? count - done : kLanes;
            float sums[kLanes] = {};
            int64_t i = 0;
            const auto *rows = weight + (first + done) * depth;
            for (; i + kRows <= some; i += kRows) dot_rows<Type, kRows>(x, rows + i * depth, depth, sums + i);
            for (; i < some; ++i) dot_rows<Type, 1>(x, rows + i * depth, depth, sums + i);
            if (matrix.scale.data) store(sums, load(sums) * load_vector(matrix.scale, first + done, some));
            finish(sums, 1, matrix.bias, first + done, some, residual, out);
        }
    });
}

}  // namespace LAROSA_ISA
}  // namespace larosa

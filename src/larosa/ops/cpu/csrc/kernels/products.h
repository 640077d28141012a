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

// A number for a generic lambda to be compiled with.
template <int number>
struct Number {
    static constexpr int count = number;
};

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
template <class Type, int group, bool near>
inline void add_columns(const typename Type::Element *const *columns, const typename Type::Element *const *next,
                        const float *values, int64_t count, float *sums) {
    using Element = typename Type::Element;
    constexpr int64_t line = kCacheLine / int64_t(sizeof(Element));
    constexpr int64_t step = columns_step<Type>();
    constexpr int64_t vectors = step / kLanes;
    int64_t at = 0;
    for (; at + step <= count; at += step) {
        Floats total[vectors];
        LAROSA_UNROLLED for (int64_t v = 0; v < vectors; ++v) total[v] = load(sums + at + v * kLanes);
        LAROSA_UNROLLED for (int i = 0; i < group; ++i) {
            for (int64_t ahead = 0; ahead < step; ahead += line) fetch<near>(next[i] + at + ahead);
            LAROSA_UNROLLED for (int64_t v = 0; v < vectors; v += 2) {
                Floats pair[2];
                load_pair<Type>(columns[i] + at + v * kLanes, pair);
                total[v] = multiply_add(values[i], pair[0], total[v]);
                total[v + 1] = multiply_add(values[i], pair[1], total[v + 1]);
            }
        }
        LAROSA_UNROLLED for (int64_t v = 0; v < vectors; ++v) store(sums + at + v * kLanes, total[v]);
    }
    for (; at < count; at += kLanes) {
        const int64_t some = count - at < kLanes ? count - at : kLanes;
        Floats total = load(sums + at);
        LAROSA_UNROLLED for (int i = 0; i < group; ++i) {
            const Element *column = columns[i] + at;
            total = multiply_add(values[i], some == kLanes ? load<Type>(column) : load_some<Type>(column, some), total);
        }
        store(sums + at, total);
    }
}

template <class Type, bool near>
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
        add_columns<Type, kGroup, near>(columns, next, values + at, count, sums);
    }
    for (; at < k; ++at) {
        const Element *single = column(at);
        add_columns<Type, 1, near>(&single, &single, values + at, count, sums);
    }
}

inline void order_sums(int64_t dtype, int64_t count, float *sums) {
    with_type(dtype, [&](auto type) {
        using Type = decltype(type);
        if (Type::mixed) unmix(sums, count / columns_step<Type>() * columns_step<Type>());
    });
}

inline void sparse_columns(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                           const larosa_matrix &matrix, int64_t first, int64_t count, float *sums) {
    for (int64_t at = 0; at < count; at += kLanes) store(sums + at, Floats{});
    with_type(matrix.dtype, [&](auto type) {
        const auto run = kFetchNear ? sparse_strip<decltype(type), true> : sparse_strip<decltype(type), false>;
        run(values, indices, k, listed, matrix, first, count, sums);
    });
    order_sums(matrix.dtype, count, sums);
}

// add_columns_of for a number of vectors, whose sums of some outputs are in registers for all of the columns.
template <class Type, int rows>
inline void add_columns_of_rows(const float *values, const int32_t *indices, int64_t columns, const int32_t *next,
                                int64_t fetched, const larosa_matrix &matrix, int64_t first, int64_t count,
                                float *const *sums) {
    using Element = typename Type::Element;
    constexpr int64_t line = kCacheLine / int64_t(sizeof(Element));
    constexpr int pairs = kLanes == 16 && rows <= 4 ? 2 : 1;
    constexpr int64_t step = 2 * pairs * kLanes;
    const Element *weight = static_cast<const Element *>(matrix.weight) + first;
    const auto add = [&](int64_t at, auto number, auto load_weights) {
        constexpr int vectors = decltype(number)::count;
        Floats total[rows][vectors];
        LAROSA_UNROLLED for (int row = 0; row < rows; ++row)
            LAROSA_UNROLLED for (int v = 0; v < vectors; ++v) total[row][v] = load(sums[row] + at + v * kLanes);
        for (int64_t i = 0; i < columns; ++i) {
            if (i < fetched)
                for (int64_t ahead = 0; ahead < vectors * kLanes; ahead += line)
                    __builtin_prefetch(weight + int64_t(next[i]) * matrix.outputs + at + ahead, 0, 2);
            Floats column[vectors];
            load_weights(weight + int64_t(indices[i]) * matrix.outputs + at, column);
            LAROSA_UNROLLED for (int row = 0; row < rows; ++row)
                LAROSA_UNROLLED for (int v = 0; v < vectors; ++v)
                    total[row][v] = multiply_add(values[i * rows + row], column[v], total[row][v]);
        }
        LAROSA_UNROLLED for (int row = 0; row < rows; ++row)
            LAROSA_UNROLLED for (int v = 0; v < vectors; ++v) store(sums[row] + at + v * kLanes, total[row][v]);
    };
    const int64_t whole = count / columns_step<Type>() * columns_step<Type>();
    int64_t at = 0;
    for (; at + step <= whole; at += step)
        add(at, Number<2 * pairs>{}, [](const Element *from, Floats *column) {
            for (int pair = 0; pair < pairs; ++pair) load_pair<Type>(from + 2 * pair * kLanes, column + 2 * pair);
        });
    for (; at < whole; at += 2 * kLanes)
        add(at, Number<2>{}, [](const Element *from, Floats *column) { load_pair<Type>(from, column); });
    for (; at < count; at += kLanes) {
        const int64_t some = count - at < kLanes ? count - at : kLanes;
        add(at, Number<1>{}, [&](const Element *from, Floats *column) {
            column[0] = some == kLanes ? load<Type>(from) : load_some<Type>(from, some);
        });
    }
}

inline void add_columns_of(const float *values, int64_t rows, const int32_t *indices, int64_t columns,
                           const int32_t *next, int64_t fetched, const larosa_matrix &matrix, int64_t first,
                           int64_t count, float *const *sums) {
    with_type(matrix.dtype, [&](auto type) {
        const auto add = [&](auto number) {
            add_columns_of_rows<decltype(type), decltype(number)::count>(values, indices, columns, next, fetched,
                                                                          matrix, first, count, sums);
        };
        switch (rows) {
            case 1: return add(Number<1>{});
            case 2: return add(Number<2>{});
            case 3: return add(Number<3>{});
            case 4: return add(Number<4>{});
            case 5: return add(Number<5>{});
            case 6: return add(Number<6>{});
            case 7: return add(Number<7>{});
            case 8: return add(Number<8>{});
        }
        static_assert(kTogether == 8, "a case each");
    });
}

constexpr int kChains = 2;  // sums of one dot product side by side
constexpr int kRows = 4;    // dot products side by side; together they hide the latency of an addition
// Of several vectors at once, so many, and for each with so many rows: all of their sums are in registers.
constexpr int kVectors = kLanes == 16 ? 4 : 2, kRowsOfVectors = 2;

// x in the order that dot_rows reads it in, for weights of a dtype.
inline void arrange(const float *x, int64_t depth, int64_t dtype, float *out) {
    const int64_t whole = depth / (kChains * kLanes) * (kChains * kLanes);
    const int64_t mixed = with_any_type(dtype, [&](auto type) { return decltype(type)::mixed ? whole : 0; });
    mix(x, mixed, out);
    __builtin_memcpy(out + mixed, x + mixed, size_t(depth - mixed) * sizeof *x);
}

// The dot products of `vectors` vectors x, depth apart, with `group` rows that follow each other; sums[v * kLanes + i] is
// that of vector v and row i. As many rows after them are fetched meanwhile, in the order of memory, so that no row's
// beginning is waited for. Each product is summed up in one order, whatever stands beside it.
template <class Type, int group, int vectors>
inline void dot_rows(const float *x, const typename Type::Element *rows, int64_t depth, float *sums) {
    constexpr int64_t line = kCacheLine / int64_t(sizeof(typename Type::Element));
    constexpr int64_t step = kChains * kLanes;
    Floats total[vectors][group][kChains] = {};
    int64_t at = 0;
    for (; at + step <= depth; at += step) {
        const auto *after = rows + group * (depth + at);
        for (int64_t ahead = 0; ahead < group * step; ahead += line) __builtin_prefetch(after + ahead, 0, 2);
        LAROSA_UNROLLED for (int i = 0; i < group; ++i)
            LAROSA_UNROLLED for (int c = 0; c < kChains; c += 2) {
                const int64_t from = at + c * kLanes;
                Floats pair[2];
                load_pair<Type>(rows + i * depth + from, pair);
                LAROSA_UNROLLED for (int v = 0; v < vectors; ++v) {
                    const float *entries = x + v * depth + from;
                    total[v][i][c] = multiply_add(load(entries), pair[0], total[v][i][c]);
                    total[v][i][c + 1] = multiply_add(load(entries + kLanes), pair[1], total[v][i][c + 1]);
                }
            }
    }
    for (; at < depth; at += kLanes) {
        const int64_t some = depth - at < kLanes ? depth - at : kLanes;
        LAROSA_UNROLLED for (int i = 0; i < group; ++i) {
            const auto *row = rows + i * depth + at;
            const Floats weights = some == kLanes ? load<Type>(row) : load_some<Type>(row, some);
            LAROSA_UNROLLED for (int v = 0; v < vectors; ++v)
                total[v][i][0] = multiply_add(load_at(x + v * depth, at, some), weights, total[v][i][0]);
        }
    }
    LAROSA_UNROLLED for (int v = 0; v < vectors; ++v)
        LAROSA_UNROLLED for (int i = 0; i < group; ++i) {
            LAROSA_UNROLLED for (int c = 1; c < kChains; ++c) total[v][i][0] += total[v][i][c];
            sums[v * kLanes + i] = sum(total[v][i][0]);
        }
}

// dense_rows of `vectors` vectors and up to kLanes rows of the matrix.
template <class Type, int vectors>
inline void dense_tile(const float *x, int64_t depth, const larosa_matrix &matrix, int64_t first, int64_t count,
                       const float *residual, float *out, int64_t stride) {
    constexpr int group = vectors == 1 ? kRows : kRowsOfVectors;
    const auto *rows = static_cast<const typename Type::Element *>(matrix.weight) + first * depth;
    float sums[vectors * kLanes] = {};
    int64_t i = 0;
    for (; i + group <= count; i += group) dot_rows<Type, group, vectors>(x, rows + i * depth, depth, sums + i);
    for (; i < count; ++i) dot_rows<Type, 1, vectors>(x, rows + i * depth, depth, sums + i);
    for (int v = 0; v < vectors; ++v) {
        float *own = sums + v * kLanes;
        if (matrix.scale.data) store(own, load(own) * load_vector(matrix.scale, first, count));
        finish(own, 1, matrix.bias, first, count, residual ? residual + v * stride : nullptr, out + v * stride);
    }
}

inline void dense_rows(const float *x, int64_t rows, int64_t depth, const larosa_matrix &matrix, int64_t first,
                       int64_t count, const float *residual, float *out, int64_t stride) {
    with_any_type(matrix.dtype, [&](auto type) {
        using Type = decltype(type);
        for (int64_t done = 0; done < count; done += kLanes) {
            const int64_t some = count - done < kLanes ? count - done : kLanes;
            for (int64_t row = 0; row < rows;) {
                const float *added = residual ? residual + row * stride : nullptr;
                const auto tile = [&](auto vectors) {
                    constexpr int together = decltype(vectors)::count;
                    dense_tile<Type, together>(x + row * depth, depth, matrix, first + done, some, added,
                                               out + row * stride, stride);
                    row += together;
                };
                const int64_t left = rows - row;
                if (left >= kVectors) {
                    tile(Number<kVectors>{});
                } else if (kVectors > 3 && left == 3) {
                    tile(Number<3>{});
                } else if (left >= 2) {
                    tile(Number<2>{});
                } else {
                    tile(Number<1>{});
                }
            }
        }
    });
}

}  // namespace LAROSA_ISA
}  // namespace larosa

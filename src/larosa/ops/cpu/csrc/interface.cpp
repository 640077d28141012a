// The C interface: checks what could lead outside of memory, and cuts the work into tasks for the threads.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "dispatch.h"
#include "larosa_cpu.h"
#include "threads.h"

namespace larosa {
namespace {

// Bytes of weights that are worth waking another thread for.
constexpr int64_t kWorthSharing = 128 << 10;

// The indices of a sparse product are cut into up to kSegments segments of at least kSegment.
constexpr int64_t kSegments = 4, kSegment = 64;

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

constexpr float kHigh = 128;  // how much more an entry's high digit counts than its low one, in larosa_adapt

int64_t element_size(int64_t dtype) { return dtype == LAROSA_FLOAT32 ? 4 : dtype == LAROSA_INT8 ? 1 : 2; }

bool misaligned(const void *pointer, int64_t size) { return reinterpret_cast<uintptr_t>(pointer) % size != 0; }

bool misaligned(const larosa_vector &vector) { return misaligned(vector.data, element_size(vector.dtype)); }

bool misaligned(const larosa_matrix &matrix) {
    return misaligned(matrix.weight, element_size(matrix.dtype)) || misaligned(matrix.bias) || misaligned(matrix.scale);
}

bool misaligned(const larosa_low_bit &matrix) { return misaligned(matrix.scales, 2) || misaligned(matrix.bias); }

template <class Matrix>
bool any_misaligned(const Matrix *matrices, int64_t count) {
    return std::any_of(matrices, matrices + count, [](const Matrix &matrix) { return misaligned(matrix); });
}

// The caller's thread keeps its scratch memory from call to call.
template <class T>
T *scratch(int64_t count) {
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// Likewise. Atomics cannot be moved, so more of them are new ones.
std::vector<std::atomic<int64_t>> &counters(int64_t count) {
    static thread_local std::vector<std::atomic<int64_t>> memory;
    if (int64_t(memory.size()) < count) memory = std::vector<std::atomic<int64_t>>(size_t(count));
    return memory;
}

// A piece of one row of a product's output.
template <class Matrix>
struct Block {
    int64_t row;
    const Matrix *matrix;
    int64_t offset;  // of the matrix's outputs in the row
    int64_t first;
    int64_t count;
};

// The outputs of several matrices, cut into blocks of up to `size` that do not cross from one matrix to the next.
template <class Matrix>
class Blocks {
  public:
    Blocks(const Matrix *matrices, int64_t count, int64_t size)
        : matrices_(matrices), count_(count), size_(size) {
        for (int64_t i = 0; i < count; ++i) {
            outputs += matrices[i].outputs;
            of_row += blocks(matrices[i]);
            largest = clamp(matrices[i].outputs, largest, size);
        }
    }

    Block<Matrix> at(int64_t index) const {
        Block<Matrix> block{index / of_row, matrices_, 0, 0, 0};
        int64_t left = index % of_row;
        for (; left >= blocks(*block.matrix); ++block.matrix) {
            left -= blocks(*block.matrix);
            block.offset += block.matrix->outputs;
        }
        block.first = left * size_;
        const int64_t rest = block.matrix->outputs - block.first;
        block.count = rest < size_ ? rest : size_;
        return block;
    }

    int64_t outputs = 0;  // of all matrices
    int64_t of_row = 0;   // blocks
    int64_t largest = 0;  // block's outputs

  private:
    int64_t blocks(const Matrix &matrix) const { return (matrix.outputs + size_ - 1) / size_; }

    const Matrix *matrices_;
    int64_t count_;
    int64_t size_;
};

// Where the product that this thread has put off will be.
thread_local const float *put_off = nullptr;

int linear(const float *x, int64_t rows, int64_t depth, const larosa_matrix *matrices, int64_t count,
           const float *residual, float *out, int64_t threads, bool later) {
    if (any_misaligned(matrices, count)) return LAROSA_MISALIGNED;
    const int64_t row_bytes = clamp(depth, 1, depth) * element_size(matrices->dtype);
    // At least 16 rows, or 64 KiB, which the second-level cache holds for all rows of x.
    const Blocks blocks(matrices, count, 16 * clamp((4 << 10) / row_bytes, 1, 64));
    if (blocks.outputs * row_bytes < 2 * kWorthSharing) threads = 1;
    later = later && threads > 1;
    static thread_local std::vector<float> kept;  // from one call to others
    if (later) kept.resize(size_t(rows * depth));
    float *arranged = later ? kept.data() : scratch<float>(rows * depth);
    for (int64_t row = 0; row < rows; ++row)
        kernels().arrange(x + row * depth, depth, matrices->dtype, arranged + row * depth);
    const auto run = [=](int64_t task) {
        const auto block = blocks.at(task);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t offset = row * blocks.outputs + block.offset;
            kernels().dense_rows(arranged + row * depth, depth, *block.matrix, block.first, block.count,
                                 residual ? residual + offset : nullptr, out + offset);
        }
    };
    if (later) {
        defer(blocks.of_row, threads, run);
        put_off = out;
    } else {
        parallel(blocks.of_row, threads, run);
    }
    return LAROSA_OK;
}

// A product by columns: sum(first entry, entries, block, sums) sums those of one segment up, whose bounds are multiples
// of `step`.
template <class Matrix, class Sum>
void by_columns(const Matrix *matrices, int64_t count, int64_t rows, int64_t k, int64_t step, int64_t bits,
                const float *residual, float *out, int64_t threads, Sum sum) {
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; ++i) outputs += matrices[i].outputs;
    if (rows * outputs * k * bits / 8 < 2 * kWorthSharing) threads = 1;
    // The longer the piece of a column, the better memory delivers it. So threads share the indices first, in segments
    // that depend on k alone, for the bits to be the same on any number of threads; and then the outputs, in strips.
    const int64_t steps = (k + step - 1) / step, segments = clamp(k / kSegment, 1, kSegments);
    const int64_t strips = (threads + segments - 1) / segments;
    const int64_t size = clamp(round_up((rows * outputs + strips - 1) / strips, 128), 512, kStrip);
    const Blocks<Matrix> blocks(matrices, count, size);
    const int64_t all = rows * blocks.of_row;
    std::vector<std::atomic<int64_t>> &left = counters(all);
    for (int64_t i = 0; i < all; ++i) left[size_t(i)].store(segments, std::memory_order_relaxed);
    float *sums = scratch<float>(all * segments * padded(blocks.largest));
    const float *late = residual == put_off ? residual : nullptr;  // not there yet
    if (late) residual = nullptr;
    parallel(all * segments, threads, [&](int64_t task) {
        const int64_t index = task / segments, segment = task % segments;
        const auto block = blocks.at(index);
        float *parts = sums + index * segments * padded(blocks.largest);
        const int64_t from = step * (steps * segment / segments);
        const int64_t to = clamp(step * (steps * (segment + 1) / segments), 0, k);
        sum(block.row * k + from, to - from, block, parts + segment * padded(block.count));
        // Who completes the last segment adds them up, always in the same order.
        if (left[size_t(index)].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        const int64_t offset = block.row * blocks.outputs + block.offset;
        kernels().finish(parts, segments, block.matrix->bias, block.first, block.count,
                         residual ? residual + offset : nullptr, out + offset);
    });
    if (late) {
        finish_deferred();
        put_off = nullptr;
        for (int64_t i = 0; i < rows * blocks.outputs; ++i) out[i] += late[i];
    }
}

// 0, 1, 2 and so on, `count` of them, for the caller's thread and those that work for it.
const int32_t *counting(int64_t count) {
    static thread_local std::vector<int32_t> memory;
    for (int64_t i = int64_t(memory.size()); i < count; ++i) memory.push_back(int32_t(i));
    return memory.data();
}

// `kept` has room for one more than x: an entry is written before it is known to be kept.
int64_t keep_above(const float *x, int64_t width, float threshold, const larosa_vector &score, float *kept,
                   float *values, int32_t *indices) {
    int32_t *where = scratch<int32_t>(width + 1);
    const int64_t count = kernels().above(x, score, width, threshold, kept, where);
    std::fill_n(std::copy_n(kept, count, values), width - count, 0.0f);
    std::fill_n(std::copy_n(where, count, indices), width - count, 0);
    return count;
}

int adapt(const float *x, int64_t rows, int64_t width, int64_t depth, const larosa_matrix *matrix, float *out,
          int64_t threads, bool later) {
    static thread_local std::vector<float> digits;
    digits.resize(size_t(rows * depth));
    for (int64_t row = 0; row < rows; ++row) {
        float *at = digits.data() + row * depth;
        for (int64_t i = 0; i < width; ++i) at[i] = x[row * width + i];
        for (int64_t i = width; i < depth; ++i) at[i] = kHigh * x[row * width + i - width];
    }
    return linear(digits.data(), rows, depth, matrix, 1, nullptr, out, threads, later);
}

}  // namespace
}  // namespace larosa

using namespace larosa;

int64_t larosa_interface(void) { return LAROSA_INTERFACE; }

void larosa_rms_norm(const float *x, const larosa_vector *gain, double eps, int64_t rows, int64_t width, float *out) {
    for (int64_t row = 0; row < rows; ++row) kernels().rms_norm(x + row * width, *gain, eps, width, out + row * width);
}

void larosa_silu_mul(const float *gate_up, int64_t rows, int64_t width, float *out) {
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width;
        kernels().silu_mul(gate, gate + width, width, out + row * width);
    }
}

void larosa_top_k(const float *x, int64_t rows, int64_t width, int64_t k, const larosa_vector *score, float *values,
                  int32_t *indices) {
    uint32_t *magnitudes = scratch<uint32_t>(width);
    for (int64_t row = 0; row < rows; ++row)
        kernels().top_k(x + row * width, *score, width, k, magnitudes, values + row * k, indices + row * k);
}

void larosa_rms_norm_top_k(const float *x, const larosa_vector *gain, double eps, int64_t rows, int64_t width,
                           int64_t k, const larosa_vector *score, float *values, int32_t *indices) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *normed = scratch<float>(width);
        for (int64_t row = 0; row < rows; ++row) {
            kernels().rms_norm(x + row * width, *gain, eps, width, normed);
            larosa_top_k(normed, 1, width, k, score, values + row * k, indices + row * k);
        }
    });
}

void larosa_silu_mul_top_k(const float *gate_up, int64_t rows, int64_t width, int64_t k, const larosa_vector *score,
                           float *values, int32_t *indices) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *product = scratch<float>(width);
        for (int64_t row = 0; row < rows; ++row) {
            larosa_silu_mul(gate_up + row * 2 * width, 1, width, product);
            larosa_top_k(product, 1, width, k, score, values + row * k, indices + row * k);
        }
    });
}

void larosa_above(const float *x, int64_t width, float threshold, const larosa_vector *score, float *values,
                  int32_t *indices, int64_t *count) {
    *count = keep_above(x, width, threshold, *score, scratch<float>(width + 1), values, indices);
}

void larosa_rms_norm_above(const float *x, const larosa_vector *gain, double eps, int64_t width, float threshold,
                           const larosa_vector *score, float *values, int32_t *indices, int64_t *count) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *normed = scratch<float>(2 * width + 1);
        kernels().rms_norm(x, *gain, eps, width, normed);
        *count = keep_above(normed, width, threshold, *score, normed + width, values, indices);
    });
}

void larosa_silu_mul_above(const float *gate_up, int64_t width, float threshold, const larosa_vector *score,
                           float *values, int32_t *indices, int64_t *count) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *product = scratch<float>(2 * width + 1);
        larosa_silu_mul(gate_up, 1, width, product);
        *count = keep_above(product, width, threshold, *score, product + width, values, indices);
    });
}

int larosa_linear(const float *x, int64_t rows, int64_t depth, const larosa_matrix *matrices, int64_t count,
                  const float *residual, float *out, int64_t threads) {
    return linear(x, rows, depth, matrices, count, residual, out, threads, false);
}

int larosa_linear_meanwhile(const float *x, int64_t rows, int64_t depth, const larosa_matrix *matrices, int64_t count,
                            const float *residual, float *out, int64_t threads) {
    finish_deferred();
    return linear(x, rows, depth, matrices, count, residual, out, threads, true);
}

int larosa_adapt(const float *x, int64_t rows, int64_t width, int64_t depth, const larosa_matrix *matrix, float *out,
                 int64_t threads) {
    return adapt(x, rows, width, depth, matrix, out, threads, false);
}

int larosa_adapt_meanwhile(const float *x, int64_t rows, int64_t width, int64_t depth, const larosa_matrix *matrix,
                           float *out, int64_t threads) {
    finish_deferred();
    return adapt(x, rows, width, depth, matrix, out, threads, true);
}

int larosa_sparse_linear(const float *values, const int32_t *indices, int64_t rows, int64_t k, int64_t depth,
                         const larosa_matrix *matrices, int64_t count, const float *residual, float *out,
                         const int64_t *listed, int64_t threads) {
    if (any_misaligned(matrices, count)) return LAROSA_MISALIGNED;
    if (listed) k = clamp(*listed, 0, k);
    if (!kernels().all_below(indices, rows * k, depth)) return LAROSA_BAD_INDEX;
    const int64_t bits = 8 * element_size(matrices->dtype);
    by_columns(matrices, count, rows, k, 1, bits, residual, out, threads,
               [=](int64_t from, int64_t some, const Block<larosa_matrix> &block, float *sums) {
                   kernels().sparse_columns(values + from, indices + from, some, (block.row + 1) * k - from,
                                            *block.matrix, block.first, block.count, sums);
               });
    return LAROSA_OK;
}

int larosa_low_bit_linear(const float *values, const int32_t *indices, int64_t rows, int64_t k, int64_t depth,
                          const larosa_low_bit *matrices, int64_t count, const float *residual, float *out,
                          const int64_t *listed, int64_t threads) {
    if (any_misaligned(matrices, count)) return LAROSA_MISALIGNED;
    if (listed) k = clamp(*listed, 0, k);
    if (indices && !kernels().all_below(indices, rows * k, depth)) return LAROSA_BAD_INDEX;
    const int32_t *every = indices ? nullptr : counting(k);
    by_columns(matrices, count, rows, k, kBlock, matrices->bits, residual, out, threads,
               [=](int64_t from, int64_t some, const Block<larosa_low_bit> &block, float *sums) {
                   const int64_t left = (block.row + 1) * k - from;
                   const int32_t *columns = every ? every + k - left : indices + from;
                   kernels().low_bit_columns(values + from, columns, some, left, *block.matrix, depth, block.first,
                                             block.count, sums);
               });
    return LAROSA_OK;
}

int larosa_attend(const larosa_attention *attention, float *out, int64_t threads) {
    const larosa_attention &a = *attention;
    const int64_t bytes = element_size(a.dtype);
    if (misaligned(a.keys, bytes) || misaligned(a.values, bytes) || misaligned(a.scales, 2) ||
        misaligned(a.q_gain) || misaligned(a.k_gain))
        return LAROSA_MISALIGNED;
    const int64_t position = *a.position;
    if (position < 0 || position >= a.capacity) return LAROSA_BAD_POSITION;

    const int64_t start = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    const int64_t seen = position + 1 - start;
    const int64_t chunks = (seen + kChunk - 1) / kChunk;
    const int64_t sharing = a.key_heads ? a.heads / a.key_heads : 0;  // query heads that read one key head
    const int64_t part_size = a.size + 2;
    float *queries = scratch<float>(a.heads * a.size + a.size + a.heads * chunks * part_size);
    float *key = queries + a.heads * a.size;
    float *parts = key + a.size;
    const float *cos = a.cos ? a.cos + position * a.size : nullptr;
    const float *sin = a.sin ? a.sin + position * a.size : nullptr;
    const auto row = [&](void *cache, int64_t head, int64_t at) {
        return static_cast<char *>(cache) + (head * a.capacity + at) * a.size * bytes;
    };
    const auto scales = [&](int64_t head, int64_t at, int64_t which) {
        return a.scales ? a.scales + 2 * (head * a.capacity + at) + which : nullptr;
    };

    for (int64_t head = 0; head < a.heads; ++head)
        kernels().prepare_head(a.qkv + head * a.size, a.size, a.q_gain, a.eps, cos, sin, queries + head * a.size);
    for (int64_t head = 0; head < a.key_heads; ++head) {
        const float *raw = a.qkv + (a.heads + head) * a.size;
        kernels().prepare_head(raw, a.size, a.k_gain, a.eps, cos, sin, key);
        const float *value = raw + a.key_heads * a.size;
        kernels().store_head(key, a.size, a.dtype, row(a.keys, head, position), scales(head, position, 0));
        kernels().store_head(value, a.size, a.dtype, row(a.values, head, position), scales(head, position, 1));
    }
    if (2 * seen * a.key_heads * a.size * bytes < 2 * kWorthSharing) threads = 1;
    parallel(a.key_heads * chunks, threads, [&](int64_t task) {
        const int64_t key_head = task / chunks, chunk = task % chunks;
        const int64_t from = start + chunk * kChunk;
        const int64_t count = clamp(position + 1 - from, 0, kChunk);
        for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; ++head)
            kernels().attend_chunk(queries + head * a.size, row(a.keys, key_head, from), row(a.values, key_head, from),
                                   scales(key_head, from, 0), count, a.size, a.dtype, float(a.scale),
                                   parts + (head * chunks + chunk) * part_size);
    });
    for (int64_t head = 0; head < a.heads; ++head)
        kernels().merge_chunks(parts + head * chunks * part_size, chunks, a.size, out + head * a.size);
    return LAROSA_OK;
}

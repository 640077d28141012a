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

// Of several rows, weights of so many columns and outputs are read while as many are fetched to the second-level cache.
constexpr int64_t kColumnsOfRows = 16, kStripOfRows = 2048;

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
        kernels().dense_rows(arranged, rows, depth, *block.matrix, block.first, block.count,
                             residual ? residual + block.offset : nullptr, out + block.offset, blocks.outputs);
    };
    if (later) {
        defer(blocks.of_row, threads, run);
        put_off = out;
    } else {
        parallel(blocks.of_row, threads, run);
    }
    return LAROSA_OK;
}

int64_t segments_of(int64_t k) { return clamp(k / kSegment, 1, kSegments); }

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
    const int64_t steps = (k + step - 1) / step, segments = segments_of(k);
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

// `kept` has room for one more than the columns: a value is written before it is known to be kept.
int64_t keep_above(const float *x, int64_t width, int64_t columns, float threshold, larosa_vector score, float *kept,
                   float *values, int32_t *indices) {
    int32_t *where = scratch<int32_t>(columns + 1);
    int64_t count = kernels().above(x, score, width, threshold, kept, where);
    for (int64_t from = width; from < columns; from += width) {  // the next column of each entry
        score.data = static_cast<const char *>(score.data) + width * element_size(score.dtype);
        const int64_t more = kernels().above(x, score, width, threshold, kept + count, where + count);
        for (const int64_t end = count + more; count < end; ++count) where[count] += int32_t(from);
    }
    std::fill_n(std::copy_n(kept, count, values), columns - count, 0.0f);
    std::fill_n(std::copy_n(where, count, indices), columns - count, 0);
    return count;
}

// Each row's k values over and over, `columns` of them, for the caller's thread and those that work for it.
const float *repeated(const float *values, int64_t rows, int64_t k, int64_t columns) {
    static thread_local std::vector<float> memory;
    memory.clear();
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t from = 0; from < columns; from += k)
            memory.insert(memory.end(), values + row * k, values + (row + 1) * k);
    return memory.data();
}

// What up to kTogether rows keep of `depth` columns: the columns that any of them keeps, each with a value for every row.
class Kept {
  public:
    // Indices ascend. The memory is kept for the next time.
    void set(const float *values, const int32_t *indices, int64_t rows, int64_t k, const int64_t *listed, int64_t depth,
             int64_t threads) {
        const auto count = [&](int64_t row) { return listed ? clamp(listed[row], 0, k) : k; };
        rows_ = rows;
        rank_.assign(size_t(depth), 0);  // of a column: first whether any row keeps it
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < count(row); ++i) rank_[size_t(indices[row * k + i])] = 1;
        columns_.resize(size_t(depth));
        int32_t found = 0;
        for (int64_t column = 0; column < depth; ++column) {
            const int32_t kept = rank_[size_t(column)];
            rank_[size_t(column)] = found;
            columns_[size_t(found)] = int32_t(column);  // written before it is known to be kept
            found += kept;
        }
        columns_.resize(size_t(found));
        values_.assign(size_t(found * rows), 0.0f);
        parallel(rows, threads, [&](int64_t row) {
            segments[row] = segments_of(count(row));
            for (int64_t segment = 0, i = 0; segment < segments[row]; ++segment) {
                const int64_t end = count(row) * (segment + 1) / segments[row];
                for (; i < end; ++i)
                    values_[size_t(rank_[size_t(indices[row * k + i])] * rows + row)] = values[row * k + i];
                ends[row][segment] = i < count(row) ? rank_[size_t(indices[row * k + i])] : size();
            }
        });
        cuts.clear();
        for (int64_t row = 0; row < rows; ++row) cuts.insert(cuts.end(), ends[row], ends[row] + segments[row]);
        for (int64_t cut = 0; cut < size(); cut += kColumnsOfRows) cuts.push_back(cut);
        std::sort(cuts.begin(), cuts.end());
        cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    }

    int64_t size() const { return int64_t(columns_.size()); }
    const int32_t *columns(int64_t from) const { return columns_.data() + from; }
    const float *values(int64_t from) const { return values_.data() + from * rows_; }

    // Each row's sums are taken in segments, as if alone: how many, and which column each ends before.
    int64_t segments[kTogether];
    int64_t ends[kTogether][kSegments];
    // Between two of these no segment ends, and there are no more than kColumnsOfRows columns.
    std::vector<int64_t> cuts;

  private:
    int64_t rows_ = 0;
    std::vector<int32_t> rank_, columns_;
    std::vector<float> values_;
};

// One strip of the outputs of a sparse product of several rows, each with the sums that it has alone. Only where a weight
// that a row does not keep is not finite does it get NaN: whether a row has any is told.
void sparse_strip(int64_t rows, const Kept &kept, const Block<larosa_matrix> &block, const float *residual, float *out,
                  int64_t outputs, std::atomic<bool> *nan) {
    const larosa_matrix &matrix = *block.matrix;
    const int64_t room = padded(block.count), of_row = kSegments * room;
    float *sums = scratch<float>(rows * of_row);
    std::fill_n(sums, rows * of_row, 0.0f);
    int64_t segment[kTogether] = {};
    for (size_t cut = 0; cut + 1 < kept.cuts.size(); ++cut) {
        const int64_t from = kept.cuts[cut], to = kept.cuts[cut + 1];
        float *now[kTogether];
        for (int64_t row = 0; row < rows; ++row) {
            // Past its last segment a row keeps none of the columns.
            while (segment[row] + 1 < kept.segments[row] && kept.ends[row][segment[row]] <= from) ++segment[row];
            now[row] = sums + row * of_row + segment[row] * room;
        }
        kernels().add_columns_of(kept.values(from), rows, kept.columns(from), to - from, kept.columns(to),
                                 std::min(to - from, kept.size() - to), matrix, block.first, block.count, now);
    }
    for (int64_t row = 0; row < rows; ++row) {
        float *parts = sums + row * of_row;
        for (int64_t part = 0; part < kept.segments[row]; ++part)
            kernels().order_sums(matrix.dtype, block.count, parts + part * room);
        const int64_t offset = row * outputs + block.offset;
        kernels().finish(parts, kept.segments[row], matrix.bias, block.first, block.count,
                         residual ? residual + offset : nullptr, out + offset);
        int64_t found = 0;
        for (int64_t i = 0; i < block.count; ++i) found += out[offset + block.first + i] != out[offset + block.first + i];
        if (found) nan[row].store(true, std::memory_order_relaxed);
    }
}

// larosa_sparse_linear of one row.
void sparse_row(const float *values, const int32_t *indices, int64_t k, const larosa_matrix *matrices, int64_t count,
                const float *residual, float *out, int64_t threads) {
    by_columns(matrices, count, 1, k, 1, 8 * element_size(matrices->dtype), residual, out, threads,
               [=](int64_t from, int64_t some, const Block<larosa_matrix> &block, float *sums) {
                   kernels().sparse_columns(values + from, indices + from, some, k - from, *block.matrix, block.first,
                                            block.count, sums);
               });
}

bool ascend(const int32_t *indices, int64_t count) {
    int64_t wrong = 0;
    for (int64_t i = 1; i < count; ++i) wrong += indices[i] <= indices[i - 1];
    return wrong == 0;
}

// larosa_sparse_linear of up to kTogether rows, which come to what each of them does alone.
void sparse_rows(const float *values, const int32_t *indices, int64_t rows, int64_t k, const int64_t *listed,
                 int64_t depth, const larosa_matrix *matrices, int64_t count, int64_t outputs, const float *residual,
                 float *out, int64_t threads) {
    const auto length = [&](int64_t row) { return listed ? clamp(listed[row], 0, k) : k; };
    bool together = rows > 1;
    for (int64_t row = 0; row < rows; ++row) together = together && ascend(indices + row * k, length(row));
    std::atomic<bool> alone[kTogether];
    for (std::atomic<bool> &each : alone) each.store(!together, std::memory_order_relaxed);
    if (together) {
        static thread_local Kept memory;
        Kept &kept = memory;  // the caller's, for all threads
        kept.set(values, indices, rows, k, listed, depth, threads);
        const int64_t share = round_up((outputs + 2 * threads - 1) / (2 * threads), 64);
        const Blocks<larosa_matrix> blocks(matrices, count, clamp(share, 64, kStripOfRows));
        parallel(blocks.of_row, threads, [&](int64_t task) {
            sparse_strip(rows, kept, blocks.at(task), residual, out, outputs, alone);
        });
    }
    for (int64_t row = 0; row < rows; ++row)
        if (alone[row].load(std::memory_order_relaxed))
            sparse_row(values + row * k, indices + row * k, length(row), matrices, count,
                       residual ? residual + row * outputs : nullptr, out + row * outputs, threads);
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

void larosa_above(const float *x, int64_t rows, int64_t width, int64_t columns, float threshold,
                  const larosa_vector *score, float *values, int32_t *indices, int64_t *counts) {
    for (int64_t row = 0; row < rows; ++row)
        counts[row] = keep_above(x + row * width, width, columns, threshold, *score, scratch<float>(columns + 1),
                                 values + row * columns, indices + row * columns);
}

void larosa_rms_norm_above(const float *x, const larosa_vector *gain, double eps, int64_t rows, int64_t width,
                           int64_t columns, float threshold, const larosa_vector *score, float *values,
                           int32_t *indices, int64_t *counts) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *normed = scratch<float>(width + columns + 1);
        for (int64_t row = 0; row < rows; ++row) {
            kernels().rms_norm(x + row * width, *gain, eps, width, normed);
            counts[row] = keep_above(normed, width, columns, threshold, *score, normed + width, values + row * columns,
                                     indices + row * columns);
        }
    });
}

void larosa_silu_mul_above(const float *gate_up, int64_t rows, int64_t width, int64_t columns, float threshold,
                           const larosa_vector *score, float *values, int32_t *indices, int64_t *counts) {
    parallel(1, deferred_threads(), [&](int64_t) {
        float *product = scratch<float>(width + columns + 1);
        for (int64_t row = 0; row < rows; ++row) {
            larosa_silu_mul(gate_up + row * 2 * width, 1, width, product);
            counts[row] = keep_above(product, width, columns, threshold, *score, product + width,
                                     values + row * columns, indices + row * columns);
        }
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
    if (listed && rows == 1) k = clamp(*listed, 0, k), listed = nullptr;  // what stands behind them may be anything
    if (!kernels().all_below(indices, rows * k, depth)) return LAROSA_BAD_INDEX;
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; ++i) outputs += matrices[i].outputs;
    if (rows * outputs * k * element_size(matrices->dtype) < 2 * kWorthSharing) threads = 1;
    const float *late = residual == put_off ? residual : nullptr;  // not there yet
    if (late) residual = nullptr;
    for (int64_t row = 0; row < rows; row += kTogether)
        sparse_rows(values + row * k, indices + row * k, std::min(rows - row, kTogether), k,
                    listed ? listed + row : nullptr, depth, matrices, count, outputs,
                    residual ? residual + row * outputs : nullptr, out + row * outputs, threads);
    if (late) {
        finish_deferred();
        put_off = nullptr;
        for (int64_t i = 0; i < rows * outputs; ++i) out[i] += late[i];
    }
    return LAROSA_OK;
}

int larosa_low_bit_linear(const float *values, const int32_t *indices, int64_t rows, int64_t k, int64_t depth,
                          const larosa_low_bit *matrices, int64_t count, const float *residual, float *out,
                          const int64_t *listed, int64_t threads) {
    if (any_misaligned(matrices, count)) return LAROSA_MISALIGNED;
    if (listed && rows > 1) {  // one after the other: they have segments of their own
        int64_t outputs = 0;
        for (int64_t i = 0; i < count; ++i) outputs += matrices[i].outputs;
        int status = LAROSA_OK;
        for (int64_t row = 0; row < rows && status == LAROSA_OK; ++row)
            status = larosa_low_bit_linear(values + row * k, indices ? indices + row * k : nullptr, 1, k, depth, matrices,
                                           count, residual ? residual + row * outputs : nullptr, out + row * outputs,
                                           listed + row, threads);
        return status;
    }
    if (listed) k = clamp(*listed, 0, k);
    if (indices && !kernels().all_below(indices, rows * k, depth)) return LAROSA_BAD_INDEX;
    // An empty list may have no indices either.
    if (!indices && k > 0 && k < depth) values = repeated(values, rows, k, depth), k = depth;
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
    const auto cache_of = [&](int64_t row) { return a.cache ? a.cache[row] : 0; };
    for (int64_t row = 0; row < a.rows; ++row) {
        if (a.position[row] < 0 || a.position[row] >= a.capacity) return LAROSA_BAD_POSITION;
        if (cache_of(row) < 0 || cache_of(row) >= a.caches) return LAROSA_BAD_CACHE;
        for (int64_t other = 0; other < row; ++other)
            if (a.position[other] == a.position[row] && cache_of(other) == cache_of(row)) return LAROSA_BAD_POSITION;
    }

    const auto start = [&](int64_t row) { return a.window ? std::max<int64_t>(a.position[row] + 1 - a.window, 0) : 0; };
    const auto chunks_of = [&](int64_t row) { return (a.position[row] + 1 - start(row) + kChunk - 1) / kChunk; };
    int64_t chunks = 0, seen = 0;  // of the row with most; of all rows
    for (int64_t row = 0; row < a.rows; ++row) {
        chunks = std::max(chunks, chunks_of(row));
        seen += a.position[row] + 1 - start(row);
    }
    const int64_t sharing = a.key_heads ? a.heads / a.key_heads : 0;  // query heads that read one key head
    const int64_t part_size = a.size + 2, width = a.heads * a.size, row_parts = a.heads * chunks * part_size;
    float *queries = scratch<float>(a.rows * (width + row_parts) + a.size);
    float *key = queries + a.rows * width;
    float *parts = key + a.size;
    const auto entry = [&](void *cache, int64_t row, int64_t head, int64_t at) {
        return static_cast<char *>(cache) + ((cache_of(row) * a.key_heads + head) * a.capacity + at) * a.size * bytes;
    };
    const auto scales = [&](int64_t row, int64_t head, int64_t at, int64_t which) {
        return a.scales ? a.scales + 2 * ((cache_of(row) * a.key_heads + head) * a.capacity + at) + which : nullptr;
    };

    for (int64_t row = 0; row < a.rows; ++row) {
        const float *qkv = a.qkv + row * (a.heads + 2 * a.key_heads) * a.size;
        const int64_t at = a.position[row];
        const float *cos = a.cos ? a.cos + at * a.size : nullptr;
        const float *sin = a.sin ? a.sin + at * a.size : nullptr;
        for (int64_t head = 0; head < a.heads; ++head)
            kernels().prepare_head(qkv + head * a.size, a.size, a.q_gain, a.eps, cos, sin,
                                   queries + row * width + head * a.size);
        for (int64_t head = 0; head < a.key_heads; ++head) {
            const float *raw = qkv + (a.heads + head) * a.size;
            kernels().prepare_head(raw, a.size, a.k_gain, a.eps, cos, sin, key);
            const float *value = raw + a.key_heads * a.size;
            kernels().store_head(key, a.size, a.dtype, entry(a.keys, row, head, at), scales(row, head, at, 0));
            kernels().store_head(value, a.size, a.dtype, entry(a.values, row, head, at), scales(row, head, at, 1));
        }
    }
    if (2 * seen * a.key_heads * a.size * bytes < 2 * kWorthSharing) threads = 1;
    // Rows innermost: those of one cache find its chunk in a processor's own cache.
    parallel(a.key_heads * chunks * a.rows, threads, [&](int64_t task) {
        const int64_t row = task % a.rows, chunk = task / a.rows % chunks, key_head = task / a.rows / chunks;
        const int64_t from = start(row) + chunk * kChunk;
        const int64_t count = clamp(a.position[row] + 1 - from, 0, kChunk);
        if (count == 0) return;
        for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; ++head)
            kernels().attend_chunk(queries + row * width + head * a.size, entry(a.keys, row, key_head, from),
                                   entry(a.values, row, key_head, from), scales(row, key_head, from, 0), count, a.size,
                                   a.dtype, float(a.scale), parts + row * row_parts + (head * chunks + chunk) * part_size);
    });
    for (int64_t row = 0; row < a.rows; ++row)
        for (int64_t head = 0; head < a.heads; ++head)
            kernels().merge_chunks(parts + row * row_parts + head * chunks * part_size, chunks_of(row), a.size,
                                   out + row * width + head * a.size);
    return LAROSA_OK;
}

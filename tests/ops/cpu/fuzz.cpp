// Random calls of the C interface on heap blocks of exactly the size that each takes, so that the address sanitizer
// sees every step outside; results against plain loops in double precision.
//
// Usage: fuzz CASES SEED [digests]. With digests a line for each case has the instruction set, what the case is, and a
// digest of the results, to be compared with those of another build; some cases have NaN and infinities in them then, for
// which there is no other check.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "larosa_cpu.h"

namespace {

std::mt19937_64 engine;
std::string what;  // the case, for the message
bool special = false;  // whether it has NaN and infinities, of which there are digests alone
uint64_t digest = 0;   // of the case's results (FNV-1a), all NaN being one

int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }

int64_t width() {
    static const int64_t about[] = {1, 4, 8, 16, 32, 64, 512};  // vectors, cache lines, strips
    return integer(0, 1) ? integer(1, 40) : std::max<int64_t>(1, about[integer(0, 6)] * integer(1, 3) + integer(-1, 1));
}

[[noreturn]] void fail(const std::string &why) {
    std::printf("%s: %s: %s\n", larosa_isa(), what.c_str(), why.c_str());
    std::exit(1);
}

void check(bool good, const char *why) {
    if (!good && !special) fail(why);
}

void check_near(double result, double exact, double bound) {
    if (!special && !(std::fabs(result - exact) <= bound)) fail(std::to_string(result) + " is not " + std::to_string(exact));
}

// Exactly as large as asked for, which std::vector does not promise; malloc's alignment is given up for the element's.
template <class T>
class Heap {
  public:
    explicit Heap(int64_t count) : count_(count), memory_(std::malloc((count + 1) * sizeof(T))) {
        check(memory_ != nullptr, "out of memory");
        // The block ends where the memory ends and begins one element late: aligned as an element only.
        data_ = static_cast<T *>(memory_.get()) + 1;
        for (int64_t i = 0; i < count; ++i) std::memset(&data_[i], 0xff, sizeof(T));  // NaN, or -1
    }
    T *get() const { return data_; }
    T &operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return count_; }

  private:
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    int64_t count_;
    std::unique_ptr<void, Free> memory_;
    T *data_;
};

template <class T>
void add_digest(const Heap<T> &results) {
    for (int64_t i = 0; i < results.size(); ++i) {
        uint64_t word = 0;
        if (results[i] == results[i]) std::memcpy(&word, &results[i], sizeof(T));
        else word = 0x7fc00000;
        digest = (digest ^ word) * 0x100000001b3;
    }
}

// About normal, the same on every machine.
float normal() {
    int64_t sum = 0;
    for (int i = 0; i < 3; ++i) sum += integer(-(1 << 20), 1 << 20);
    return std::ldexp(float(sum), -20);
}

constexpr float kSpecial[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, 3.4e38f};

Heap<float> floats(int64_t count) {
    Heap<float> heap(count);
    const bool ties = integer(0, 2) == 0;
    for (int64_t i = 0; i < count; ++i) heap[i] = ties ? std::round(2 * normal()) : normal();
    if (special)
        for (int64_t i = integer(0, 2); i > 0 && count > 0; --i) heap[integer(0, count - 1)] = kSpecial[integer(0, 7)];
    return heap;
}

double half(uint16_t word) {
    const int exponent = word >> 10 & 31, mantissa = word & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return word >> 15 ? -magnitude : magnitude;
}

// Elements of a dtype, and what they are worth.
struct Typed {
    Typed(int64_t count, int64_t dtype)
        : dtype(dtype), wide(count), narrow(dtype == LAROSA_FLOAT32 ? 0 : count) {
        const Heap<float> random = floats(count);
        for (int64_t i = 0; i < count; ++i) {
            uint32_t word;
            std::memcpy(&word, &random[i], sizeof word);
            if (dtype == LAROSA_BFLOAT16) {
                narrow[i] = uint16_t(word >> 16);
                word &= 0xffff0000u;
                std::memcpy(&wide[i], &word, sizeof word);
            } else if (dtype == LAROSA_FLOAT16) {  // subnormal ones included
                const bool infinite = special && integer(0, 999) == 0;
                narrow[i] = uint16_t(integer(0, 1) << 15 | (infinite ? integer(0x7c00, 0x7fff) : integer(0, 0x43ff)));
                wide[i] = float(half(narrow[i]));
            } else {
                wide[i] = random[i];
            }
        }
    }
    const void *data() const {
        if (dtype == LAROSA_FLOAT32) return wide.get();
        return narrow.get();
    }
    larosa_vector vector() const { return {data(), dtype}; }

    int64_t dtype;
    Heap<float> wide;
    Heap<uint16_t> narrow;
};

std::unique_ptr<Typed> maybe(int64_t count) {
    return integer(0, 1) ? std::make_unique<Typed>(count, integer(0, 2)) : nullptr;
}

// Such numbers, none negative.
std::unique_ptr<Typed> maybe_scores(int64_t count) {
    std::unique_ptr<Typed> scores = maybe(count);
    if (!scores) return scores;
    for (int64_t i = 0; i < count; ++i) scores->wide[i] = std::fabs(scores->wide[i]);
    for (int64_t i = 0; i < scores->narrow.size(); ++i) scores->narrow[i] &= 0x7fff;
    return scores;
}

larosa_vector vector_of(const std::unique_ptr<Typed> &typed) {
    return typed ? typed->vector() : larosa_vector{nullptr, 0};
}

void products() {
    const int64_t rows = integer(0, 2) ? integer(0, 2) : integer(3, 9), depth = width(), k = integer(0, 4) ? integer(0, depth) : depth;
    const int64_t dtype = integer(0, 2), threads = integer(1, 5), count = integer(1, 3);
    const bool sparse = integer(0, 1);
    what = std::string(sparse ? "sparse_linear" : "linear") + " rows " + std::to_string(rows) + " depth " +
           std::to_string(depth) + " k " + std::to_string(k) + " dtype " + std::to_string(dtype);
    std::vector<std::unique_ptr<Typed>> weights, biases;
    std::vector<larosa_matrix> matrices;
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t some = width();
        weights.push_back(std::make_unique<Typed>(some * depth, dtype));
        biases.push_back(maybe(some));
        matrices.push_back({weights.back()->data(), dtype, some, vector_of(biases.back())});
        outputs += some;
    }
    const Heap<float> x = floats(rows * (sparse ? k : depth));
    const Heap<float> residual = floats(rows * outputs);
    const Heap<float> out(rows * outputs);
    Heap<int32_t> indices(rows * k);
    const float *added = integer(0, 1) ? residual.get() : nullptr;
    if (sparse) {
        for (int64_t i = 0; i < indices.size(); ++i) indices[i] = int32_t(integer(0, depth - 1));
        for (int64_t row = 0; integer(0, 1) && row < rows; ++row)
            std::sort(indices.get() + row * k, indices.get() + (row + 1) * k);
        check(larosa_sparse_linear(x.get(), indices.get(), rows, k, depth, matrices.data(), count, added, out.get(),
                                   nullptr, threads) == LAROSA_OK,
              "refused");
        // Of longer lists so many, and what stands behind them is nothing, alone and beside other rows.
        const Heap<float> counted(rows * outputs), longer(rows * (k + 3));
        const Heap<int32_t> where(rows * (k + 3));
        const Heap<int64_t> meant(rows);
        std::fill_n(longer.get(), longer.size(), NAN);
        std::fill_n(where.get(), where.size(), rows == 1 ? -1 : 0);
        std::fill_n(meant.get(), rows, k);
        for (int64_t row = 0; row < rows; ++row) {
            std::copy_n(x.get() + row * k, k, longer.get() + row * (k + 3));
            std::copy_n(indices.get() + row * k, k, where.get() + row * (k + 3));
        }
        check(larosa_sparse_linear(longer.get(), where.get(), rows, k + 3, depth, matrices.data(), count, added,
                                   counted.get(), meant.get(), threads) == LAROSA_OK,
              "refused");
        check(std::memcmp(counted.get(), out.get(), size_t(rows * outputs) * sizeof(float)) == 0, "by count another");
    } else {
        check(larosa_linear(x.get(), rows, depth, matrices.data(), count, added, out.get(), threads) == LAROSA_OK,
              "refused");
    }
    add_digest(out);
    for (int64_t row = 0; row < rows; ++row) {
        const Heap<float> alone(outputs);
        const float *of_row = added ? added + row * outputs : nullptr;
        const int status = sparse ? larosa_sparse_linear(x.get() + row * k, indices.get() + row * k, 1, k, depth,
                                                         matrices.data(), count, of_row, alone.get(), nullptr, threads)
                                  : larosa_linear(x.get() + row * depth, 1, depth, matrices.data(), count, of_row,
                                                  alone.get(), threads);
        check(status == LAROSA_OK, "refused");
        check(std::memcmp(alone.get(), out.get() + row * outputs, size_t(outputs) * sizeof(float)) == 0,
              "another one alone");
    }
    int64_t offset = 0;
    for (int64_t m = 0; m < count; offset += matrices[m++].outputs)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t n = 0; n < matrices[m].outputs; ++n) {
                const int64_t at = row * outputs + offset + n;
                double total = biases[m] ? biases[m]->wide[n] : 0, bound = std::fabs(total);
                if (added) total += residual[at], bound += std::fabs(residual[at]);
                for (int64_t i = 0; i < (sparse ? k : depth); ++i) {
                    const double term = sparse ? double(x[row * k + i]) *
                                                     weights[m]->wide[indices[row * k + i] * matrices[m].outputs + n]
                                               : double(x[row * depth + i]) * weights[m]->wide[n * depth + i];
                    total += term, bound += std::fabs(term);
                }
                check_near(out[at], total, (depth + 4) * 1.2e-7 * bound);
            }
}

void selections() {
    const int64_t rows = integer(0, 3), width = ::width(), k = integer(0, 4) ? integer(0, width) : width;
    what = "top_k rows " + std::to_string(rows) + " width " + std::to_string(width) + " k " + std::to_string(k);
    const Heap<float> x = floats(rows * width);
    for (int64_t i = 0; i < x.size() / 8; ++i) x[integer(0, x.size() - 1)] = kSpecial[integer(0, 7)];
    const std::unique_ptr<Typed> score = maybe_scores(width);
    const larosa_vector weights = vector_of(score);
    const Heap<float> values(rows * k);
    const Heap<int32_t> indices(rows * k);
    larosa_top_k(x.get(), rows, width, k, &weights, values.get(), indices.get());
    add_digest(values), add_digest(indices);
    const auto rank = [&](int64_t row, int64_t i) {
        const float magnitude = std::fabs(x[row * width + i] * (score ? score->wide[i] : 1));
        return std::isnan(magnitude) ? INFINITY : std::isinf(magnitude) ? 1e39 : double(magnitude);
    };
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<bool> kept(width, false);
        for (int64_t i = 0; i < k; ++i) {
            const int64_t at = indices[row * k + i];
            check(at >= 0 && at < width && (i == 0 || at > indices[row * k + i - 1]), "indices do not ascend");
            check(std::memcmp(&values[row * k + i], &x[row * width + at], sizeof(float)) == 0, "not the value");
            kept[at] = true;
        }
        double lowest = INFINITY;
        int64_t last = -1;  // of the kept ones equal to the lowest
        for (int64_t i = 0; i < width; ++i)
            if (kept[i] && rank(row, i) <= lowest) lowest = rank(row, i), last = i;
        for (int64_t i = 0; i < width; ++i)
            check(kept[i] || k == 0 || rank(row, i) < lowest || (rank(row, i) == lowest && i > last), "a larger one");
    }
    const int64_t each = integer(1, 3);  // columns of an entry
    const std::unique_ptr<Typed> scores = maybe_scores(each * width);
    const int64_t columns = scores ? each * width : width;
    const larosa_vector scored = vector_of(scores);
    const Heap<float> kept(rows * columns);
    const Heap<int32_t> where(rows * columns);
    const Heap<int64_t> counts(rows);
    larosa_above(x.get(), rows, width, columns, 1.0f, &scored, kept.get(), where.get(), counts.get());
    add_digest(kept), add_digest(where), add_digest(counts);
    for (int64_t row = 0; row < rows; ++row) {
        const float *values_of = kept.get() + row * columns;
        const int32_t *columns_of = where.get() + row * columns;
        int64_t expected = 0;
        for (int64_t i = 0; i < columns; ++i) {
            const float &entry = x[row * width + i % width];
            if (std::fabs(entry * (scores ? scores->wide[i] : 1)) <= 1) continue;
            check(expected < counts[row] && columns_of[expected] == i, "not above");
            check(std::memcmp(&values_of[expected++], &entry, sizeof entry) == 0, "not the value above");
        }
        check(expected == counts[row], "too many");
        for (int64_t i = expected; i < columns; ++i) check(values_of[i] == 0 && columns_of[i] == 0, "no zeros behind");
    }
}

// Two calls at once, the second on what the first leaves, with arguments of each kind.
void replays(const Heap<float> &x, const larosa_vector &gains, int64_t rows, int64_t width) {
    const int64_t k = integer(0, width);
    const larosa_vector none = {nullptr, 0};
    const Heap<float> normed(rows * width), values(rows * k), expected(rows * k);
    const Heap<int32_t> indices(rows * k), where(rows * k);
    larosa_rms_norm_top_k(x.get(), &gains, 1e-5, rows, width, k, &none, expected.get(), where.get());
    const auto address = [](const void *memory) { return larosa_value{reinterpret_cast<int64_t>(memory)}; };
    const auto number = [](int64_t integer) { return larosa_value{integer}; };
    larosa_value eps;
    eps.real = 1e-5;
    const larosa_call calls[] = {
        {LAROSA_RMS_NORM, {address(x.get()), address(&gains), eps, number(rows), number(width), address(normed.get())}},
        {LAROSA_TOP_K,
         {address(normed.get()), number(rows), number(width), number(k), address(&none), address(values.get()),
          address(indices.get())}},
    };
    check(larosa_replay(calls, 2) == LAROSA_OK, "refused");
    for (int64_t i = 0; i < rows * k; ++i)
        check(values[i] == expected[i] && indices[i] == where[i], "replayed otherwise");
}

// A product, large enough to be shared, computed beside another one and a selection: the same bits as before them.
void put_off() {
    const int64_t width = integer(363, 380), depth = ::width(), k = integer(0, depth), threads = integer(1, 5);
    const int64_t dtype = integer(0, 2);
    what = "linear_meanwhile width " + std::to_string(width) + " dtype " + std::to_string(dtype);
    const Typed adapter(width * width, dtype), columns(width * depth, dtype);
    const larosa_matrix carries = {adapter.data(), dtype, width, {nullptr, 0}};
    const larosa_matrix product = {columns.data(), dtype, width, {nullptr, 0}};
    const Heap<float> x = floats(width), y = floats(depth), values(k);
    const Heap<int32_t> indices(k);
    const larosa_vector none = {nullptr, 0};
    const auto run = [&](decltype(&larosa_linear) first, const Heap<float> &carried, const Heap<float> &out) {
        check(first(x.get(), 1, width, &carries, 1, nullptr, carried.get(), threads) == LAROSA_OK, "refused");
        larosa_rms_norm_top_k(y.get(), &none, 1e-5, 1, depth, k, &none, values.get(), indices.get());
        check(larosa_sparse_linear(values.get(), indices.get(), 1, k, depth, &product, 1, nullptr, out.get(),
                                   nullptr, threads) == LAROSA_OK, "refused");
        check(larosa_sparse_linear(values.get(), indices.get(), 1, k, depth, &product, 1, carried.get(), out.get(),
                                   nullptr, threads) == LAROSA_OK, "refused");
    };
    const Heap<float> carried(width), out(width), later(width), result(width);
    run(larosa_linear, carried, out);
    run(larosa_linear_meanwhile, later, result);
    add_digest(result);
    check(std::memcmp(later.get(), carried.get(), width * sizeof(float)) == 0, "put off, the product is another");
    check(std::memcmp(result.get(), out.get(), width * sizeof(float)) == 0, "put off, the sum is another");
}

// 8-bit numbers with two digits for some entries, at once and put off, where they are enough to be shared.
void adapters() {
    const int64_t rows = integer(1, 2), width = integer(0, 3) ? ::width() : integer(400, 500);
    const int64_t outputs = integer(0, 3) ? ::width() : integer(500, 700), threads = integer(1, 5);
    const int64_t leading = integer(0, width), depth = width + leading;
    what = "adapt width " + std::to_string(width) + " outputs " + std::to_string(outputs);
    const Heap<float> x = floats(rows * width), out(rows * outputs), later(rows * outputs);
    const Heap<int8_t> weight(outputs * depth);
    for (int64_t i = 0; i < weight.size(); ++i) weight[i] = int8_t(integer(-128, 127));
    const std::unique_ptr<Typed> scale(new Typed(outputs, integer(0, 2)));
    const larosa_matrix matrix = {weight.get(), LAROSA_INT8, outputs, {nullptr, 0}, vector_of(scale)};
    check(larosa_adapt(x.get(), rows, width, depth, &matrix, out.get(), threads) == LAROSA_OK, "refused");
    add_digest(out);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < outputs; ++n) {
            double total = 0, bound = 0;
            for (int64_t i = 0; i < depth; ++i) {
                const double entry = i < width ? x[row * width + i] : 128.0 * x[row * width + i - width];
                total += entry * weight[n * depth + i], bound += std::fabs(entry * weight[n * depth + i]);
            }
            const double by = scale->wide[n];
            check_near(out[row * outputs + n], total * by, (depth + 4) * 1.2e-7 * bound * std::fabs(by) + 1e-44);
        }
    const larosa_matrix nothing = {nullptr, LAROSA_FLOAT32, outputs, {nullptr, 0}, {nullptr, 0}};
    check(larosa_adapt_meanwhile(x.get(), rows, width, depth, &matrix, later.get(), threads) == LAROSA_OK, "refused");
    const Heap<float> sum(rows * outputs);
    check(larosa_sparse_linear(nullptr, nullptr, rows, 0, 1, &nothing, 1, later.get(), sum.get(), nullptr, threads) ==
              LAROSA_OK,
          "refused");
    check(std::memcmp(later.get(), out.get(), size_t(rows * outputs) * sizeof(float)) == 0, "put off, it is another");
    for (int64_t i = 0; i < rows * outputs; ++i) check(sum[i] == out[i], "put off, the sum is another");
}

// The whole number of output n in a column of codes.
int whole_number(const uint8_t *column, int64_t bits, int64_t n) {
    if (bits == 8) return int8_t(column[n]);
    if (bits == 4) return (n % 2 ? column[n / 2] >> 4 : column[n / 2] & 15) - 8;
    const uint8_t *piece = column + n / 32 * 4 * bits;
    const int64_t byte = n % 32 / 2, leading = bits - 4;
    const int64_t bit = byte / (4 * leading) * 2 * leading + n % 2 * leading;
    const int high = piece[16 + byte % (4 * leading)] >> bit & ((1 << leading) - 1);
    return (n % 2 ? piece[byte] >> 4 : piece[byte] & 15) + 16 * high - (8 << leading);
}

// Products by 4 to 8 bits, side by side: off by no more than what rounding a block's activations does.
void low_bits() {
    const int64_t rows = integer(0, 2), entries = width(), each = integer(1, 3);  // columns of an entry
    const int64_t depth = each * entries, k = integer(0, 2) ? integer(0, depth) : depth;
    const int64_t threads = integer(1, 5), count = integer(1, 3), group = int64_t(32) << integer(0, 3);
    const bool every = k == depth && integer(0, 1);
    const int64_t given = every ? entries : k;  // values of a row
    const bool largest = integer(0, 4) == 0;  // whole numbers and codes of the largest magnitude alone
    static const uint8_t extreme[] = {0x80, 0x7f, 0x00, 0xff};
    what = "low_bit_linear rows " + std::to_string(rows) + " depth " + std::to_string(depth) + " k " +
           std::to_string(k) + " group " + std::to_string(group);
    std::vector<Heap<uint8_t>> codes;
    std::vector<Typed> scales;
    std::vector<std::unique_ptr<Typed>> biases;
    std::vector<larosa_low_bit> matrices;
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t some = width(), bits = std::array{4, 5, 6, 8}[size_t(integer(0, 3))];
        const int64_t groups = (some + group - 1) / group;
        const bool whole = bits % 4 == 0;  // bytes
        const int64_t bytes = whole ? (some * bits + 7) / 8 : (some + 31) / 32 * 4 * bits, stride = bytes + integer(0, 3), apart = groups + integer(0, 3);
        // The last column has no gap behind it.
        codes.emplace_back((depth - 1) * stride + bytes);
        const uint8_t same = extreme[integer(0, 3)];
        for (int64_t j = 0; j < codes.back().size(); ++j) codes.back()[j] = largest ? same : uint8_t(integer(0, 255));
        scales.emplace_back((depth - 1) * apart + groups, LAROSA_BFLOAT16);
        for (int64_t j = 0; largest && j < scales.back().wide.size(); ++j)
            scales.back().wide[j] = 1, scales.back().narrow[j] = 0x3f80;
        biases.push_back(maybe(some));
        matrices.push_back({codes.back().get(), scales.back().narrow.get(), stride, apart, bits, group, some,
                            vector_of(biases.back())});
        outputs += some;
    }
    const Heap<float> x = floats(rows * given), residual = floats(rows * outputs), out(rows * outputs);
    if (largest) std::fill_n(x.get(), x.size(), integer(0, 1) ? 1.0f : -1.0f);
    Heap<int32_t> indices(every ? 0 : rows * k);
    for (int64_t i = 0; i < indices.size(); ++i) indices[i] = int32_t(integer(0, depth - 1));
    const float *added = integer(0, 1) ? residual.get() : nullptr;
    check(larosa_low_bit_linear(x.get(), every ? nullptr : indices.get(), rows, given, depth, matrices.data(), count,
                                added, out.get(), nullptr, threads) == LAROSA_OK,
          "refused");
    add_digest(out);
    int64_t offset = 0;
    for (int64_t m = 0; m < count; offset += matrices[m++].outputs)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t n = 0; n < matrices[m].outputs; ++n) {
                const larosa_low_bit &matrix = matrices[m];
                const int64_t at = row * outputs + offset + n;
                double total = biases[m] ? biases[m]->wide[n] : 0, bound = 1e-5 * std::fabs(total) + 1e-26;
                if (added) total += residual[at], bound += 1e-5 * std::fabs(residual[at]);
                for (int64_t from = 0; from < k; from += 16) {
                    double largest = 0, whole = 0;
                    for (int64_t i = from; i < std::min(from + 16, k); ++i) {
                        const int64_t column = every ? i : indices[row * k + i];
                        const double scale = scales[m].wide[column * matrix.scales_stride + n / group];
                        const double scaled = scale * x[row * given + i % given];
                        const int q = whole_number(codes[m].get() + column * matrix.codes_stride, matrix.bits, n);
                        total += scaled * q, bound += 1e-5 * std::fabs(scaled * q);
                        largest = std::max(largest, std::fabs(scaled)), whole += std::abs(q);
                    }
                    bound += 0.501 * largest / (matrix.bits == 4 ? 127 : 16256) * whole;
                }
                check_near(out[at], total, bound);
            }
}

void norms() {
    const int64_t rows = integer(0, 3), width = ::width();
    what = "rms_norm and silu_mul width " + std::to_string(width);
    const Heap<float> x = floats(rows * width), gate_up = floats(rows * 2 * width);
    const std::unique_ptr<Typed> gain = maybe(width);
    const larosa_vector gains = vector_of(gain);
    const Heap<float> out(rows * width);
    larosa_rms_norm(x.get(), &gains, 1e-5, rows, width, out.get());
    add_digest(out);
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += double(x[row * width + i]) * x[row * width + i];
        for (int64_t i = 0; i < width; ++i) {
            const double exact = x[row * width + i] / std::sqrt(squares / width + 1e-5) * (gain ? gain->wide[i] : 1);
            check_near(out[row * width + i], exact, 3e-7 * std::fabs(exact));
        }
    }
    larosa_silu_mul(gate_up.get(), rows, width, out.get());
    add_digest(out);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < width; ++i) {
            const double gate = gate_up[row * 2 * width + i], up = gate_up[row * 2 * width + width + i];
            const double exact = gate / (1 + std::exp(-gate)) * up;
            check_near(out[row * width + i], exact, 1e-6 * std::fabs(exact));
        }
    const int64_t k = integer(0, width);
    const larosa_vector none = {nullptr, 0};
    const Heap<float> values(rows * k);
    const Heap<int32_t> indices(rows * k);
    larosa_rms_norm_top_k(x.get(), &gains, 1e-5, rows, width, k, &none, values.get(), indices.get());
    larosa_silu_mul_top_k(gate_up.get(), rows, width, k, &none, values.get(), indices.get());
    for (int64_t i = 0; i < rows * k; ++i)
        check(values[i] == out[i / k * width + indices[i]], "not a value of silu_mul");
    const int64_t columns = width * integer(1, 3);  // of which entries have as many each
    const Typed score(columns, integer(0, 2));
    const larosa_vector scores = score.vector();
    const Heap<float> kept(rows * columns), expected(rows * columns);
    const Heap<int32_t> where(rows * columns), at(rows * columns);
    const Heap<int64_t> counts(rows), many(rows);
    const auto same = [&] {
        check(std::memcmp(kept.get(), expected.get(), size_t(rows * columns) * sizeof(float)) == 0 &&
                  std::memcmp(where.get(), at.get(), size_t(rows * columns) * sizeof(int32_t)) == 0 &&
                  std::memcmp(counts.get(), many.get(), size_t(rows) * sizeof(int64_t)) == 0,
              "fused, what is above is another");
    };
    larosa_silu_mul_above(gate_up.get(), rows, width, columns, 0.5f, &scores, kept.get(), where.get(), counts.get());
    larosa_above(out.get(), rows, width, columns, 0.5f, &scores, expected.get(), at.get(), many.get());
    same();
    larosa_rms_norm_above(x.get(), &gains, 1e-5, rows, width, columns, 0.5f, &scores, kept.get(), where.get(),
                          counts.get());
    larosa_rms_norm(x.get(), &gains, 1e-5, rows, width, out.get());
    larosa_above(out.get(), rows, width, columns, 0.5f, &scores, expected.get(), at.get(), many.get());
    same();
    replays(x, gains, rows, width);
}

void attention() {
    const int64_t key_heads = integer(1, 3), shared = integer(1, 3), size = 2 * integer(1, 40);
    const int64_t capacity = integer(0, 3) ? integer(1, 40) : integer(100, 400), threads = integer(1, 5);
    const int64_t heads = shared * key_heads, window = integer(0, 2) ? 0 : integer(1, 300), dtype = integer(0, 3);
    const int64_t caches = integer(1, 3), rows = integer(0, std::min<int64_t>(capacity, 4));
    what = "attend dtype " + std::to_string(dtype) + " size " + std::to_string(size) + " capacity " +
           std::to_string(capacity) + " rows " + std::to_string(rows);
    const int64_t width = (heads + 2 * key_heads) * size;
    const Heap<float> qkv = floats(rows * width);
    const bool rounded = dtype == LAROSA_INT8;
    const int64_t places = caches * key_heads * capacity;
    const int64_t exact = rounded ? 0 : places * size, codes = rounded ? places * size : 0;
    const Typed numbers[2] = {{exact, dtype}, {exact, dtype}};
    const Heap<int8_t> digits[2] = {Heap<int8_t>(codes), Heap<int8_t>(codes)};
    const Heap<uint16_t> scales(rounded ? 2 * places : 0);
    for (const Heap<int8_t> &each : digits)
        for (int64_t i = 0; i < each.size(); ++i) each[i] = int8_t(integer(-127, 127));
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = uint16_t(integer(0x3c00, 0x3c7f));  // about a hundredth
    const auto data = [&](int which) -> void * {
        return rounded ? digits[which].get() : const_cast<void *>(numbers[which].data());
    };
    const Heap<float> cos = floats(capacity * size), sin = floats(capacity * size), out(rows * heads * size);
    const Heap<int64_t> position(rows), cache(rows);
    const int64_t last = integer(std::max<int64_t>(rows - 1, 0), capacity - 1);
    for (int64_t row = 0; row < rows; ++row) {  // positions that follow each other, of whatever caches
        position[row] = last - rows + 1 + row;
        cache[row] = integer(0, caches - 1);
    }
    const std::unique_ptr<Typed> q_gain = maybe(size), k_gain = maybe(size);
    const bool rotate = integer(0, 1), several = caches > 1 || integer(0, 1);
    const double scale = 1 / std::sqrt(double(size));
    const larosa_attention attention = {
        qkv.get(), data(0), data(1), rounded ? scales.get() : nullptr, position.get(), several ? cache.get() : nullptr,
        rotate ? cos.get() : nullptr, rotate ? sin.get() : nullptr, vector_of(q_gain), vector_of(k_gain),
        heads, key_heads, capacity, size, dtype, window, rows, caches, 1e-6, scale};
    check(larosa_attend(&attention, out.get(), threads) == LAROSA_OK, "refused");
    add_digest(out), add_digest(scales);
    for (int which = 0; which < 2; ++which)
        add_digest(digits[which]), add_digest(numbers[which].narrow), add_digest(numbers[which].wide);
    const auto bfloat16 = [](uint16_t bits) {
        const uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return double(value);
    };
    const auto cached = [&](int which, int64_t place, int64_t i) {  // entry i at a place of keys (0) or values (1)
        const Typed &typed = numbers[which];
        const int64_t at = place * size + i;
        if (rounded) return digits[which][at] * bfloat16(scales[2 * place + which]);
        if (dtype == LAROSA_FLOAT32) return double(typed.wide[at]);
        if (dtype == LAROSA_FLOAT16) return half(typed.narrow[at]);
        return bfloat16(typed.narrow[at]);
    };
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = position[row];
        const float *own = qkv.get() + row * width;
        const auto place = [&](int64_t head, int64_t t) { return (cache[row] * key_heads + head) * capacity + t; };
        for (int64_t head = 0; rounded && head < key_heads; ++head)
            for (int64_t i = 0; i < size; ++i) {
                const double value = own[(heads + key_heads + head) * size + i];
                check_near(float(cached(1, place(head, at), i)), value, 0.8 * bfloat16(scales[2 * place(head, at) + 1]));
            }
        const int64_t start = window && at + 1 > window ? at + 1 - window : 0;
        for (int64_t head = 0; head < heads; ++head) {
            std::vector<double> query(size), mixed(size, 0.0);
            double squares = 0;
            for (int64_t i = 0; i < size; ++i) squares += std::pow(double(own[head * size + i]), 2);
            for (int64_t i = 0; i < size; ++i)
                query[i] = q_gain ? own[head * size + i] / std::sqrt(squares / size + 1e-6) * q_gain->wide[i]
                                  : double(own[head * size + i]);
            if (rotate)
                for (int64_t i = 0; i < size / 2; ++i) {
                    const double first = query[i], second = query[size / 2 + i];
                    const float *c = &cos[at * size], *s = &sin[at * size];
                    query[i] = first * c[i] - second * s[i];
                    query[size / 2 + i] = second * c[size / 2 + i] + first * s[size / 2 + i];
                }
            std::vector<double> scores;
            double largest = -INFINITY, total = 0, span = 0;
            for (int64_t t = start; t <= at; ++t) {
                double score = 0;
                for (int64_t i = 0; i < size; ++i) score += query[i] * cached(0, place(head / shared, t), i);
                scores.push_back(scale * score);
                largest = std::max(largest, scores.back());
                span = std::max(span, std::fabs(scores.back()));
            }
            for (int64_t t = start; t <= at; ++t) {
                const double weight = std::exp(scores[t - start] - largest);
                total += weight;
                for (int64_t i = 0; i < size; ++i) mixed[i] += weight * cached(1, place(head / shared, t), i);
            }
            for (int64_t i = 0; i < size; ++i)
                check_near(out[(row * heads + head) * size + i], mixed[i] / total,
                           1e-4 * (1 + span) * (1 + std::fabs(mixed[i] / total)));
        }
    }
}

}  // namespace

int main(int argc, char **argv) {
    const bool digests = argc == 4 && std::strcmp(argv[3], "digests") == 0;
    if (argc != 3 && !digests) return std::printf("usage: fuzz CASES SEED [digests]\n"), 2;
    const int64_t cases = std::atoll(argv[1]);
    check(larosa_set_isa("nonsense") == 1, "nonsense is an instruction set");
    int64_t run = 0;
    for (const char *isa : {"portable", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondotprod"}) {
        if (larosa_set_isa(isa) != 0) continue;
        engine.seed(std::strtoull(argv[2], nullptr, 10));
        for (int64_t i = 0; i < cases; ++i, ++run) {
            void (*const tests[])() = {products, products, selections, norms, attention, put_off, adapters, low_bits};
            special = digests && integer(0, 2) == 0;
            digest = 0xcbf29ce484222325;
            tests[i % 8]();
            if (digests)
                std::printf("%s %s %016llx\n", isa, what.c_str(), static_cast<unsigned long long>(digest));
        }
    }
    std::printf("%lld cases\n", static_cast<long long>(run));
    return 0;
}

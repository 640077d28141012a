// Compiled once for each instruction set, with LAROSA_ISA its name and LAROSA_LANES its floats a vector.
#include "kernels.h"

#include "activations.h"
#include "attention.h"
#include "products.h"
#include "selection.h"

#define LAROSA_TEXT(name) #name
#define LAROSA_NAME(name) LAROSA_TEXT(name)

namespace larosa {
namespace LAROSA_ISA {

// Of low_bit.cpp.
void low_bit_columns(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                     const larosa_low_bit &matrix, int64_t depth, int64_t first, int64_t count, float *sums);

extern const Kernels kernels = {
    LAROSA_NAME(LAROSA_ISA),
    rms_norm,
    silu_mul,
    top_k,
    above,
    all_below,
    sparse_columns,
    add_columns_of,
    order_sums,
    low_bit_columns,
    finish,
    arrange,
    dense_rows,
    prepare_head,
    store_head,
    attend_chunk,
    merge_chunks,
};

}  // namespace LAROSA_ISA
}  // namespace larosa

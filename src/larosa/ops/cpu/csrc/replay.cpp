// Calls of the C interface one after the other, with nothing in between.
#include <cstddef>
#include <type_traits>
#include <utility>

#include "larosa_cpu.h"
#include "threads.h"

namespace larosa {
namespace {

template <class Argument>
Argument as(const larosa_value &value) {
    if constexpr (std::is_floating_point_v<Argument>) {
        return Argument(value.real);
    } else if constexpr (std::is_pointer_v<Argument>) {
        return reinterpret_cast<Argument>(value.integer);
    } else {
        return value.integer;
    }
}

template <class Result, class... Arguments, size_t... at>
int apply(Result (*function)(Arguments...), const larosa_value *values, std::index_sequence<at...>) {
    static_assert(sizeof...(at) <= LAROSA_MOST_ARGUMENTS, "room for all arguments");
    if constexpr (std::is_void_v<Result>) {
        function(as<Arguments>(values[at])...);
        return LAROSA_OK;
    } else {
        return function(as<Arguments>(values[at])...);
    }
}

template <class Result, class... Arguments>
int spread(Result (*function)(Arguments...), const larosa_value *values) {
    return apply(function, values, std::index_sequence_for<Arguments...>{});
}

template <auto function>
int call(const larosa_value *values) {
    return spread(function, values);
}

// In the order of larosa_function.
constexpr int (*kFunctions[])(const larosa_value *) = {
    call<larosa_rms_norm>,       call<larosa_silu_mul>, call<larosa_top_k>,         call<larosa_rms_norm_top_k>,
    call<larosa_silu_mul_top_k>, call<larosa_linear>,   call<larosa_sparse_linear>, call<larosa_attend>,
    call<larosa_linear_meanwhile>, call<larosa_adapt>,  call<larosa_adapt_meanwhile>, call<larosa_above>,
    call<larosa_rms_norm_above>, call<larosa_silu_mul_above>, call<larosa_low_bit_linear>,
};

}  // namespace
}  // namespace larosa

int larosa_replay(const larosa_call *calls, int64_t count) {
    int status = LAROSA_OK;
    for (int64_t i = 0; i < count && status == LAROSA_OK; ++i)
        status = larosa::kFunctions[calls[i].function](calls[i].arguments);
    larosa::finish_deferred();  // where a call failed before the one that would have
    return status;
}

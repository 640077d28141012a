// Which copy of the kernels runs.
#pragma once

#include "kernels/kernels.h"

namespace larosa {

const Kernels &kernels();

}  // namespace larosa

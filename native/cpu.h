// The instruction set in use: the best one that this processor supports, or the one that was selected.
#pragma once
#include "isa/tables.h"

namespace fledge {

const Kernels& kernels();

}  // namespace fledge

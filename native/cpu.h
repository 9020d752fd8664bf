// Which instruction set is used: the best this processor has, or the one that was asked for.
#pragma once
#include "isa/tables.h"

namespace fledge {
const Kernels& kernels();
}

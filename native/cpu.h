// The kernels in use. Everything uses the best instruction set that this processor supports, except that the products
// of each kind of activations may use another one, which is faster for them on this processor.
#pragma once
#include "isa/tables.h"

namespace fledge {

const Kernels& kernels();
const Kernels& product_kernels(ActivationKind kind);

}  // namespace fledge

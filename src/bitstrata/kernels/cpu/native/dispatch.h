// The instruction sets in this binary, and whether this processor has them.
#pragma once
#include <vector>

#include "generic/call.h"

namespace bitstrata {

struct Choice {
  const Kernels* kernels;
  bool runs;            // this processor has it
  const char* needs;    // the instruction sets it uses, in words
};

// The fastest first.
const std::vector<Choice>& choices();

}  // namespace bitstrata

// The instruction sets in this binary, and whether this processor has them.
#pragma once
#include <string>
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

// Throws std::invalid_argument if this build or this processor lacks it.
const Kernels& kernels_named(const std::string& name);

}  // namespace bitstrata

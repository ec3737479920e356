// What the files of bindings share: tensors come as addresses and numbers of types.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "generic/call.h"

namespace bitstrata {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Type type_of(int number) {
  if (number < 0 || number > 2) throw std::invalid_argument("unknown type");
  return static_cast<Type>(number);
}

}  // namespace bitstrata

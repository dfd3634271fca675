// Which kernels the emulated driver knows, and how it reads the arguments of each.
#pragma once

#include <functional>
#include <tuple>
#include <utility>

namespace layca::emulator {

// A launch's arguments, as the driver is given them, copied into a call that each thread makes.
using Bind = std::function<std::function<void()>(void** arguments)>;

void add_kernel(const void* kernel, const char* verb, Bind bind);

template <class... Parameter, std::size_t... place>
Bind binder(void (*kernel)(Parameter...), std::index_sequence<place...>) {
  return [kernel](void** arguments) -> std::function<void()> {
    const std::tuple<Parameter...> copies(*static_cast<Parameter*>(arguments[place])...);
    return [kernel, copies] { std::apply(kernel, copies); };
  };
}

// As the CUDA compiler does for every kernel that it meets.
template <class... Parameter>
void add_kernel(const char* verb, void (*kernel)(Parameter...)) {
  add_kernel(reinterpret_cast<const void*>(kernel), verb, binder(kernel, std::index_sequence_for<Parameter...>{}));
}

}  // namespace layca::emulator

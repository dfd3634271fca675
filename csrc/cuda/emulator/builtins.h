// What the CUDA compiler knows by itself and kernels.cuh uses of it, for the host's compiler: this is included before
// anything else, and the kernels are compiled as they stand.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "blocks.h"

// Of device code: packs.h then takes the intrinsics below.
#define __CUDA_ARCH__ 1000
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::layca::emulator::current->thread)
#define blockIdx (::layca::emulator::current->block)
#define gridDim (::layca::emulator::current->grid_size)
#define blockDim (::layca::emulator::current->block_size)

// In place of __shared__, which must say where in memory each block has it.
#define LAYCA_SHARED(Type, name) \
  static char shared_##name;     \
  auto& name = *static_cast<Shared<Type>*>(::layca::emulator::shared_memory(&shared_##name, sizeof(Shared<Type>)))

inline void __syncthreads(int line = __builtin_LINE()) { ::layca::emulator::wait_for_block(line); }

template <class T>
T __shfl_down_sync(std::uint32_t lanes, T value, unsigned offset, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::layca::emulator::shuffle_down(lanes, bits, offset, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

using std::memcpy;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace layca::emulator {

// A GPU takes no address that is not a multiple of what is read or written there.
template <class T>
inline void expect_aligned(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) throw std::logic_error("a misaligned address");
}

template <class T>
T load(const T* address) {
  expect_aligned(address);
  return *address;
}

template <class T>
void store(T* address, T value) {
  expect_aligned(address);
  *address = value;
}

}  // namespace layca::emulator

// Which caches they go through makes no difference here.
template <class T>
T __ldca(const T* address) {
  return ::layca::emulator::load(address);
}
template <class T>
T __ldcg(const T* address) {
  return ::layca::emulator::load(address);
}
template <class T>
T __ldcs(const T* address) {
  return ::layca::emulator::load(address);
}
template <class T>
void __stcg(T* address, T value) {
  ::layca::emulator::store(address, value);
}
template <class T>
void __stcs(T* address, T value) {
  ::layca::emulator::store(address, value);
}

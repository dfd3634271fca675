// Packs of 16 bytes, how they come from memory and go back: as one vector, or element by element. Host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../portable.h"

#ifdef __CUDACC__
#define LAYCA_UNROLL _Pragma("unroll")
#else
#define LAYCA_UNROLL
#endif

namespace layca::cuda {

constexpr int pack_bytes = 16;

template <class T>
constexpr int pack_width = pack_bytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(pack_bytes) Pack {
  T of[pack_width<T>];
};

// Whether a later kernel of this step reads the memory again. What none does leaves the caches first.
enum class Reuse { AGAIN, NEVER };

// Loads and stores by intrinsics: addresses come out of a table, and the compiler would have to test at run time
// whether they are global memory.
#ifdef __CUDA_ARCH__

template <Reuse reuse, class T>
__device__ inline Pack<T> load_pack(const T* from) {
  const int4* const address = reinterpret_cast<const int4*>(from);
  const int4 bits = reuse == Reuse::AGAIN ? __ldcg(address) : __ldcs(address);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <Reuse reuse, class T>
__device__ inline void store_pack(T* to, const Pack<T>& pack) {
  int4 bits;
  memcpy(&bits, &pack, sizeof(pack));
  reuse == Reuse::AGAIN ? __stcg(reinterpret_cast<int4*>(to), bits) : __stcs(reinterpret_cast<int4*>(to), bits);
}

// Through the first-level cache: the next elements of the pack are in the same line.
template <Reuse reuse, class T>
__device__ inline T load_element(const T* from) {
  return reuse == Reuse::AGAIN ? __ldca(from) : __ldcs(from);
}

template <Reuse reuse, class T>
__device__ inline void store_element(T* to, T value) {
  reuse == Reuse::AGAIN ? __stcg(to, value) : __stcs(to, value);
}

#else

inline void expect_aligned(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % pack_bytes != 0) throw std::logic_error("a misaligned pack");
}

template <Reuse reuse, class T>
inline Pack<T> load_pack(const T* from) {
  expect_aligned(from);
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <Reuse reuse, class T>
inline void store_pack(T* to, const Pack<T>& pack) {
  expect_aligned(to);
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

template <Reuse reuse, class T>
inline T load_element(const T* from) {
  return *from;
}

template <Reuse reuse, class T>
inline void store_element(T* to, T value) {
  *to = value;
}

#endif

// `whole`: as one vector; otherwise the first `count` elements, the rest of the pack being zero.
template <bool whole, Reuse reuse, class T>
LAYCA_INLINE Pack<T> load(const T* from, int count) {
  if constexpr (whole) {
    return load_pack<reuse>(from);
  } else {
    Pack<T> pack;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<T>; ++i) pack.of[i] = i < count ? load_element<reuse>(from + i) : T(0);
    return pack;
  }
}

template <bool whole, Reuse reuse, class T>
LAYCA_INLINE void store(T* to, const Pack<T>& pack, int count) {
  if constexpr (whole) {
    store_pack<reuse>(to, pack);
  } else {
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<T>; ++i) {
      if (i < count) store_element<reuse>(to + i, pack.of[i]);
    }
  }
}

}  // namespace layca::cuda

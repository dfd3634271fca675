// Packs of elements, how they come from memory and go back: as one vector, or element by element. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "../portable.h"

namespace layca::cuda {

constexpr int pack_bytes = 16;

template <class T>
constexpr int pack_width = pack_bytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(pack_bytes) Pack {
  T of[pack_width<T>];
};

// As many 16-bit numbers as a pack has of float32, the first in the lower half of the first word: 8 bytes.
struct alignas(pack_bytes / 2) HalfPack {
  std::uint32_t words[2];

  LAYCA_INLINE std::uint16_t at(int i) const { return static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16)); }
  // In the order of their places.
  LAYCA_INLINE void set(int i, std::uint16_t half) {
    words[i / 2] = (i % 2 == 0 ? 0 : words[i / 2]) | static_cast<std::uint32_t>(half) << (i % 2 * 16);
  }
};

// Whether a later kernel of this step reads the memory again. What none does leaves the caches first.
enum class Reuse { AGAIN, NEVER };

// Loads and stores by intrinsics: addresses come out of a table, and the compiler would have to test at run time
// whether they are global memory. The emulator has the intrinsics, too.
#ifdef __CUDA_ARCH__

template <int bytes>
struct Vector;
template <>
struct Vector<8> {
  using Type = int2;
};
template <>
struct Vector<16> {
  using Type = int4;
};

template <class AnyPack, Reuse reuse>
__device__ inline AnyPack load_pack(const void* from) {
  using Bits = typename Vector<sizeof(AnyPack)>::Type;
  const Bits* const address = static_cast<const Bits*>(from);
  const Bits bits = reuse == Reuse::AGAIN ? __ldcg(address) : __ldcs(address);
  AnyPack pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <Reuse reuse, class AnyPack>
__device__ inline void store_pack(void* to, const AnyPack& pack) {
  using Bits = typename Vector<sizeof(AnyPack)>::Type;
  Bits bits;
  memcpy(&bits, &pack, sizeof(pack));
  reuse == Reuse::AGAIN ? __stcg(static_cast<Bits*>(to), bits) : __stcs(static_cast<Bits*>(to), bits);
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

// For compilers' passes over host code, in which no kernel is compiled.
template <class AnyPack, Reuse reuse>
AnyPack load_pack(const void* from);
template <Reuse reuse, class AnyPack>
void store_pack(void* to, const AnyPack& pack);
template <Reuse reuse, class T>
T load_element(const T* from);
template <Reuse reuse, class T>
void store_element(T* to, T value);

#endif

// `whole`: as one vector; otherwise the first `count` elements, the rest of the pack being zero.
template <bool whole, Reuse reuse, class T>
LAYCA_INLINE Pack<T> load(const T* from, int count) {
  if constexpr (whole) {
    return load_pack<Pack<T>, reuse>(from);
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

template <bool whole, Reuse reuse>
LAYCA_INLINE HalfPack load_halves(const std::uint16_t* from, int count) {
  if constexpr (whole) {
    return load_pack<HalfPack, reuse>(from);
  } else {
    HalfPack pack;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<float>; ++i) pack.set(i, i < count ? load_element<reuse>(from + i) : 0);
    return pack;
  }
}

template <bool whole, Reuse reuse>
LAYCA_INLINE void store_halves(std::uint16_t* to, const HalfPack& pack, int count) {
  if constexpr (whole) {
    store_pack<reuse>(to, pack);
  } else {
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<float>; ++i) {
      if (i < count) store_element<reuse>(to + i, pack.at(i));
    }
  }
}

}  // namespace layca::cuda

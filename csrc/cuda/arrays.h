// The arrays of a run: where they lie, of which types, and how packs of their elements are read and written.
//
// Kernels are compiled for arrays of the type that formulas compute in, and once more, for 16-bit parameters, for all
// combinations of types: which it is they find out when they run, by tests that come out the same for all threads.
// Loads return what lies in memory. It is decoded where it is used, so that no load waits for another.
#pragma once

#include <cstdint>

#include "../batch.h"
#include "../halves.h"
#include "packs.h"

namespace layca::cuda {

// In place of a type of parameters: bfloat16 or float16, as Batch::types says, with a remainder or without.
struct Halves;

// The type that formulas compute in.
template <class T>
struct ElementOf {
  using Type = T;
};
template <>
struct ElementOf<Halves> {
  using Type = float;
};
template <class T>
using Element = typename ElementOf<T>::Type;

// Numbers of that type: parameters, gradients, states.
template <class T>
struct Numbers {
  using Loaded = Pack<T>;
  T* first;

  static LAYCA_INLINE Numbers at(const TensorRow& tensor, int column, Type, std::int64_t offset) {
    return {tensor.pointer<T>(column) + offset};
  }
  static LAYCA_INLINE Numbers weights(const TensorRow& tensor, Type type, std::int64_t offset) {
    return at(tensor, Column::PARAM, type, offset);
  }

  // Whether every pack can be read as a vector shows in the lower bits.
  LAYCA_INLINE std::uintptr_t alignment() const { return reinterpret_cast<std::uintptr_t>(first); }

  template <bool whole, Reuse reuse>
  LAYCA_INLINE Loaded load(int start, int count) const {
    return cuda::load<whole, reuse>(first + start, count);
  }
  LAYCA_INLINE Pack<T> decode(const Loaded& loaded) const { return loaded; }
  template <bool whole, Reuse reuse>
  LAYCA_INLINE void store(int start, const Pack<T>& pack, int count) const {
    cuda::store<whole, reuse>(first + start, pack, count);
  }
  // What memory keeps of a state.
  LAYCA_INLINE T stored(T state) const { return state; }
};

template <class Half>
LAYCA_INLINE Pack<float> widen(const HalfPack& halves) {
  Pack<float> pack;
  LAYCA_UNROLL
  for (int i = 0; i < pack_width<float>; ++i) pack.of[i] = Half::widen(halves.at(i));
  return pack;
}

template <class Half>
LAYCA_INLINE HalfPack narrow(const Pack<float>& pack) {
  HalfPack halves;
  LAYCA_UNROLL
  for (int i = 0; i < pack_width<float>; ++i) halves.set(i, Half::narrow(pack.of[i]));
  return halves;
}

// Gradients or states, of float32 or of 16 bits; states of float16 there are none.
struct TypedNumbers {
  using Loaded = Pack<std::uint32_t>;  // of 16-bit numbers a HalfPack, in the first words
  std::uintptr_t first;
  Type type;

  static LAYCA_INLINE TypedNumbers at(const TensorRow& tensor, int column, Type type, std::int64_t offset) {
    return {static_cast<std::uintptr_t>(tensor.columns[column] + offset * size_of(type)), type};
  }

  LAYCA_INLINE std::uintptr_t alignment() const { return type == Type::FLOAT32 ? first : first * 2; }

  template <bool whole, Reuse reuse>
  LAYCA_INLINE Loaded load(int start, int count) const {
    if (type == Type::FLOAT32) return cuda::load<whole, reuse>(array<std::uint32_t>() + start, count);
    const HalfPack halves = load_halves<whole, reuse>(array<std::uint16_t>() + start, count);
    return {{halves.words[0], halves.words[1]}};
  }

  LAYCA_INLINE Pack<float> decode(const Loaded& loaded) const {
    const HalfPack halves{{loaded.of[0], loaded.of[1]}};
    if (type == Type::BFLOAT16) return widen<Bfloat16>(halves);
    if (type == Type::FLOAT16) return widen<Float16>(halves);
    Pack<float> pack;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<float>; ++i) pack.of[i] = float_of(loaded.of[i]);
    return pack;
  }

  template <bool whole, Reuse reuse>
  LAYCA_INLINE void store(int start, const Pack<float>& pack, int count) const {
    if (type == Type::FLOAT32) {
      cuda::store<whole, reuse>(array<float>() + start, pack, count);
    } else {
      store_halves<whole, reuse>(array<std::uint16_t>() + start, narrow<Bfloat16>(pack), count);
    }
  }

  // Rounded at once where memory holds a bfloat16, so that measure makes its step of what rotate will find.
  LAYCA_INLINE float stored(float state) const {
    const float rounded = Bfloat16::widen(Bfloat16::narrow(state));
    return type == Type::FLOAT32 ? state : rounded;
  }

 private:
  template <class T>
  LAYCA_INLINE T* array() const {
    return reinterpret_cast<T*>(first);
  }
};

// 16-bit parameters, with their remainders where they have some.
struct HalfWeights {
  struct Loaded {
    HalfPack halves, remainders;
  };
  std::uint16_t* halves;
  std::uint16_t* remainders;  // bits of int16; null where there are none
  Type type;

  static LAYCA_INLINE HalfWeights weights(const TensorRow& tensor, Type type, std::int64_t offset) {
    std::uint16_t* const remainders = tensor.pointer<std::uint16_t>(Column::REMAINDER);
    return {tensor.pointer<std::uint16_t>(Column::PARAM) + offset, remainders ? remainders + offset : nullptr, type};
  }

  LAYCA_INLINE std::uintptr_t alignment() const {
    return (reinterpret_cast<std::uintptr_t>(halves) | reinterpret_cast<std::uintptr_t>(remainders)) * 2;
  }

  template <bool whole, Reuse reuse>
  LAYCA_INLINE Loaded load(int start, int count) const {
    Loaded loaded;
    loaded.halves = load_halves<whole, reuse>(halves + start, count);
    if (remainders) loaded.remainders = load_halves<whole, reuse>(remainders + start, count);
    return loaded;
  }

  LAYCA_INLINE Pack<float> decode(const Loaded& loaded) const {
    return type == Type::BFLOAT16 ? decode_as<Bfloat16>(loaded) : decode_as<Float16>(loaded);
  }

  template <bool whole, Reuse reuse>
  LAYCA_INLINE void store(int start, const Pack<float>& pack, int count) const {
    const Loaded bits = type == Type::BFLOAT16 ? encode_as<Bfloat16>(pack) : encode_as<Float16>(pack);
    store_halves<whole, reuse>(halves + start, bits.halves, count);
    if (remainders) store_halves<whole, reuse>(remainders + start, bits.remainders, count);
  }

 private:
  template <class Half>
  LAYCA_INLINE Pack<float> decode_as(const Loaded& loaded) const {
    if (!remainders) return widen<Half>(loaded.halves);
    Pack<float> pack;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<float>; ++i) {
      pack.of[i] = Half::join(loaded.halves.at(i), static_cast<std::int16_t>(loaded.remainders.at(i)));
    }
    return pack;
  }

  template <class Half>
  LAYCA_INLINE Loaded encode_as(const Pack<float>& pack) const {
    if (!remainders) return {narrow<Half>(pack), {}};
    Loaded bits;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<float>; ++i) {
      const std::uint16_t upper = Half::upper(pack.of[i]);
      bits.halves.set(i, upper);
      bits.remainders.set(i, static_cast<std::uint16_t>(Half::remainder(pack.of[i], upper)));
    }
    return bits;
  }
};

// What a run's gradients and states, and its weights, are held by.
template <class T>
struct ArraysOf {
  using Others = Numbers<T>;
  using Weights = Numbers<T>;
};
template <>
struct ArraysOf<Halves> {
  using Others = TypedNumbers;
  using Weights = HalfWeights;
};

}  // namespace layca::cuda

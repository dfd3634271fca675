// 16-bit numbers, one at a time: what they stand for alone and with a remainder, as layca_fast/state/compensation.py
// says.
//
// Written with integers and without branches, so that loops over them are vectorised for any instruction set. Nothing
// here makes or needs a denormal float32, which kernels flush to zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace layca {

LAYCA_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LAYCA_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The upper half of a float32.
struct Bfloat16 {
  static LAYCA_INLINE float widen(std::uint16_t half) { return float_of(static_cast<std::uint32_t>(half) << 16); }

  // Halves to even.
  static LAYCA_INLINE std::uint16_t narrow(float x) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<std::uint16_t>(x == x ? rounded : 0x7FC0);
  }

  static LAYCA_INLINE float join(std::uint16_t half, std::int16_t remainder) {
    const std::int32_t rest = remainder, negative = rest < 0 ? rest : 0;
    // A zero or an infinity that somebody else wrote, with a remainder that was not meant for it.
    const std::int32_t admitted = ((half - 1) & 0x7FFF) >= 0x7F7F ? rest - negative : rest;
    return float_of((static_cast<std::uint32_t>(half) << 16) + static_cast<std::uint32_t>(admitted));
  }

  // Halves away from zero. Rounding some of the bits that stand for NaN would make a zero of them.
  static LAYCA_INLINE std::uint16_t upper(float x) {
    return static_cast<std::uint16_t>(x == x ? (bits_of(x) + 0x8000) >> 16 : 0x7FC0);
  }
  static LAYCA_INLINE std::int16_t remainder(float x, std::uint16_t) {
    return static_cast<std::int16_t>(x == x ? bits_of(x) & 0xFFFF : 0);
  }
};

struct Float16 {
  static LAYCA_INLINE float widen(std::uint16_t half) {
    const std::uint32_t magnitude = half & 0x7FFF, sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
    const std::uint32_t infinite = magnitude >= 0x7C00 ? rebias : 0;
    const std::uint32_t normal = (magnitude << 13) + rebias + infinite;
    const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
    return float_of(sign | (magnitude < 0x400 ? bits_of(denormal) : normal));
  }

  // Halves to even.
  static LAYCA_INLINE std::uint16_t narrow(float x) {
    const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF, sign = (bits >> 16) & 0x8000;
    const std::uint32_t normal = (magnitude - rebias + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    // The ulp of 0.5 is that of the float16 numbers which are denormal.
    const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const std::uint32_t rounded = magnitude < smallest_normal ? denormal : normal < 0x7C00 ? normal : 0x7C00;
    return static_cast<std::uint16_t>(sign | (x == x ? rounded : 0x7E00));
  }

  static LAYCA_INLINE float join(std::uint16_t half, std::int16_t remainder) {
    const float wide = widen(half);
    return wide + static_cast<float>(remainder) * float_of(unit_exponent(wide));
  }

  static LAYCA_INLINE std::uint16_t upper(float x) { return narrow(x); }
  static LAYCA_INLINE std::int16_t remainder(float x, std::uint16_t half) {
    const float wide = widen(half);
    // Times the reciprocal of the unit, a power of two as well.
    const float rest = (x - wide) * float_of((254u << 23) - unit_exponent(wide));
    const float bounded = rest < 0x7FFFp0f ? rest : 0x7FFFp0f;
    // Of an infinite parameter, and of NaN, nothing is left.
    const float admitted = rest >= -0x1p15f && rest <= 0x1p15f ? bounded : 0;
    // A float32 of that size has whole numbers only: adding it rounds to one, which the lower bits then hold.
    return static_cast<std::int16_t>(bits_of(admitted + 0x1.8p23f) & 0xFFFF);
  }

 private:
  static constexpr std::uint32_t rebias = 112u << 23, smallest_normal = 113u << 23;

  // Of what one unit of the remainder is worth: 2^-16 of an ulp, which is 2^-10 of the power of two below.
  static LAYCA_INLINE std::uint32_t unit_exponent(float wide) {
    const std::uint32_t exponent = bits_of(wide) & 0x7F800000;
    return (exponent < smallest_normal ? smallest_normal : exponent) - (26u << 23);
  }
};

}  // namespace layca

// Three steps under every formula, type and instruction set, and a hash of the bits that they leave, for comparing
// processors: tests/backends/cpu/test_aarch64.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../bindings.h"
#include "driver_tables.h"
#include "runner.h"

using namespace layca;
using namespace layca::driver;

namespace {

// Knuth's generator: the same numbers everywhere, unlike the standard library's distributions.
class Numbers {
 public:
  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 32);
  }
  // Of a size between 1/8 and 16, with as many bits as a float has.
  float positive() { return number((124 + (bits() & 7)) << 23 | (bits() & 0x7fffffu)); }
  // Of either sign, and denormal now and then.
  float weight() {
    const std::uint32_t b = bits();
    const float size = b % 61 == 0 ? number((b >> 12 | 1u) & 0x7fffffu) : positive();
    return b & 1 ? size : -size;
  }

 private:
  static float number(std::uint32_t pattern) {
    float value;
    std::memcpy(&value, &pattern, sizeof value);
    return value;
  }
  std::uint64_t state_ = 2026;
};

template <class T>
void put(std::vector<char>& buffer, std::int64_t index, T value) {
  std::memcpy(buffer.data() + index * static_cast<std::int64_t>(sizeof value), &value, sizeof value);
}

// Weights or gradients of `type`, 16-bit ones with any bits that give a finite number of ordinary size; or states,
// which are positive, as squares are, and never denormal, as no step leaves such a number (the larger of two of them
// would be kept on one processor and be zero on another).
std::vector<char> elements(Type type, std::int64_t length, bool are_states, Numbers& numbers) {
  std::vector<char> buffer(static_cast<std::size_t>(length * size_of(type)));
  for (std::int64_t i = 0; i < length; ++i) {
    const float value = are_states ? numbers.positive() : numbers.weight();
    std::uint32_t pattern;
    std::memcpy(&pattern, &value, sizeof pattern);
    switch (type) {
      case Type::FLOAT32:
        put(buffer, i, value);
        break;
      case Type::FLOAT64:
        put(buffer, i, static_cast<double>(value) * (1 + numbers.bits() * 0x1p-60));
        break;
      case Type::BFLOAT16:
        put(buffer, i, static_cast<std::uint16_t>(pattern >> 16));
        break;
      case Type::FLOAT16:
        put(buffer, i, static_cast<std::uint16_t>((pattern >> 16 & 0x8000u) | (numbers.bits() % 0x1800u + 0x3000u)));
        break;
    }
  }
  return buffer;
}

// FNV-1a, of the bytes in order.
template <class T>
void add(std::uint64_t& hash, const std::vector<T>& values) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
}

std::uint64_t bits_after_steps(const std::string& formula, const char* dtype, const std::string& instructions) {
  Setup setup;
  Numbers numbers;
  const Type type = find_type(dtype);
  const bool is_half = size_of(type) == 2;
  const Type state = is_half ? Type::FLOAT32 : type;
  setup.batch.types = {type, type, state};
  std::vector<std::vector<char>> memory;
  for (std::int64_t tensor = 0; tensor < setup.n; ++tensor) {
    std::int64_t* row = setup.tables.tensors.data() + tensor * Column::WIDTH;
    const auto point = [&](int column, std::vector<char> values) {
      memory.push_back(std::move(values));
      row[column] = address(memory.back().data());
    };
    const std::int64_t length = row[Column::NUMEL];
    point(Column::PARAM, elements(type, length, false, numbers));
    // Of every fifth tensor the gradient is nearly the weights: what is left to turn in is then summed again.
    std::vector<char> grad = tensor % 5 == 4 ? memory.back() : elements(type, length, false, numbers);
    if (tensor % 5 == 4) std::memcpy(grad.data(), grad.data() + size_of(type), static_cast<std::size_t>(size_of(type)));
    point(Column::GRAD, std::move(grad));
    for (int index = 0; index < max_states; ++index) {
      point(Column::STATE + index, elements(state, length, true, numbers));
    }
    if (is_half) point(Column::REMAINDER, std::vector<char>(static_cast<std::size_t>(2 * length), 0));
    row[Column::RULE] = tensor % 2;
  }
  cpu::Runner runner(setup.batch, formula, dtype, instructions);
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (int step = 0; step < 3; ++step) {
    runner.step(1);
    add(hash, setup.dots);
    add(hash, setup.coefficients);
  }
  for (const std::vector<char>& values : memory) add(hash, values);
  add(hash, setup.tables.radii);
  add(hash, setup.counts);
  return hash;
}

}  // namespace

int main() {
  for (const std::string& formula : cpu::formula_names()) {
    for (const char* dtype : {"float32", "float64", "bfloat16", "float16"}) {
      for (const std::string& instructions : cpu::instruction_sets()) {
        const std::uint64_t hash = bits_after_steps(formula, dtype, instructions);
        std::printf("%s %s %s %016llx\n", formula.c_str(), dtype, instructions.c_str(),
                    static_cast<unsigned long long>(hash));
      }
    }
  }
  return 0;
}

// What a loop that does nothing else takes for a step on the same addresses: bench/bare.py compiles it and calls it.
//
// No other types, no options, no care for numbers that are not finite, and sums in whatever order is fastest: what is
// left is the arithmetic and the memory.
#include <cmath>
#include <cstdint>

namespace {

// As bench/bare.py lays it out.
struct Tensor {
  float* w;
  const float* g;
  float *m, *v;  // the state, as far as there is one
  std::int64_t length, rotates;
};

struct Options {
  double lr;
  // Momentum; or Adam's betas, the roots of its corrections, and eps.
  float momentum, beta1, beta2, over_correction1, over_root_correction2, eps;
};

struct Sgd {
  static constexpr bool keeps = false;
  static float advance(const Tensor& t, std::int64_t i, const Options&) { return t.g[i]; }
  static float again(const Tensor& t, std::int64_t i, const Options&) { return t.g[i]; }
};

struct Momentum {
  static constexpr bool keeps = false;
  static float advance(const Tensor& t, std::int64_t i, const Options& o) {
    return t.m[i] = o.momentum * t.m[i] + t.g[i];
  }
  static float again(const Tensor& t, std::int64_t i, const Options&) { return t.m[i]; }
};

struct Adam {
  static constexpr bool keeps = true;
  static float advance(const Tensor& t, std::int64_t i, const Options& o) {
    const float g = t.g[i];
    t.m[i] += (1 - o.beta1) * (g - t.m[i]);
    t.v[i] = o.beta2 * t.v[i] + (1 - o.beta2) * g * g;
    return again(t, i, o);
  }
  static float again(const Tensor& t, std::int64_t i, const Options& o) {
    return t.m[i] * o.over_correction1 / (std::sqrt(t.v[i]) * o.over_root_correction2 + o.eps);
  }
};

struct Dots {
  double n2 = 0, d = 0, q = 0;

  void add(const Dots& other) {
    n2 += other.n2;
    d += other.d;
    q += other.q;
  }
};

struct Turn {
  float a, b;
};

// Layca's closed form that keeps the norm which the weights have.
Turn turn_of(const Dots& dots, double lr) {
  const double n = std::sqrt(dots.n2), sigma = std::sqrt(dots.q - dots.d * dots.d / dots.n2);
  const double cosine = 1 / std::sqrt(1 + lr * lr);
  return {static_cast<float>(cosine * (1 + lr * dots.d / (n * sigma))), static_cast<float>(-lr * n * cosine / sigma)};
}

template <class Base>
void step_plainly(const Tensor& t, std::int64_t first, std::int64_t last, const Options& o) {
  const auto lr = static_cast<float>(o.lr);
#pragma omp simd
  for (std::int64_t i = first; i < last; ++i) t.w[i] -= lr * Base::advance(t, i, o);
}

// `steps`: where to keep them, for elements from `first`, or null.
template <class Base, bool keep>
Dots measure(const Tensor& t, std::int64_t first, std::int64_t last, const Options& o, float* steps) {
  // Compilers make vectors of such sums more willingly than of a reduction of two types.
  constexpr int lanes = 16;
  double n2[lanes] = {}, d[lanes] = {}, q[lanes] = {};
  const auto add = [&](std::int64_t i, int lane) {
    const float step = Base::advance(t, i, o);
    if (keep) steps[i - first] = step;
    const double w = t.w[i], u = step;
    n2[lane] += w * w;
    d[lane] += w * u;
    q[lane] += u * u;
  };
  std::int64_t i = first;
  for (; i + lanes <= last; i += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < last; ++lane) add(i + lane, lane);
  Dots dots;
  for (int lane = 0; lane < lanes; ++lane) dots.add({n2[lane], d[lane], q[lane]});
  return dots;
}

template <class Base, bool kept>
void rotate(const Tensor& t, std::int64_t first, std::int64_t last, const Options& o, const float* steps, Turn turn) {
#pragma omp simd
  for (std::int64_t i = first; i < last; ++i) {
    t.w[i] = turn.a * t.w[i] + turn.b * (kept ? steps[i - first] : Base::again(t, i, o));
  }
}

// Tensors up to this length one thread does whole, with both passes in its cache; of longer ones each thread does a
// half, in blocks, and goes back over them from the last.
constexpr std::int64_t longest_small = 1 << 16, block = 1 << 15;

template <class Base>
void step_large(const Tensor& t, const Options& o, Dots& shared) {
  const std::int64_t blocks = (t.length + block - 1) / block;
  std::int64_t first = blocks, last = 0;
  Dots own;
  const auto end = [&](std::int64_t b) { return b * block + block < t.length ? b * block + block : t.length; };
#pragma omp single
  shared = Dots();
#pragma omp for schedule(static) nowait
  for (std::int64_t b = 0; b < blocks; ++b) {
    if (!t.rotates) {
      step_plainly<Base>(t, b * block, end(b), o);
      continue;
    }
    own.add(measure<Base, false>(t, b * block, end(b), o, nullptr));
    first = b < first ? b : first;
    last = b + 1;
  }
  if (!t.rotates) return;
#pragma omp critical(sum)
  shared.add(own);
#pragma omp barrier
  const Turn turn = turn_of(shared, o.lr);
  for (std::int64_t b = last - 1; b >= first; --b) rotate<Base, false>(t, b * block, end(b), o, nullptr, turn);
#pragma omp barrier
}

template <class Base>
void step_all(const Tensor* tensors, std::int64_t n, const Options& o, int threads) {
  Dots shared;
#pragma omp parallel num_threads(threads)
  {
    for (std::int64_t k = 0; k < n; ++k) {
      if (tensors[k].length > longest_small) step_large<Base>(tensors[k], o, shared);
    }
    alignas(64) static thread_local float steps[longest_small];
#pragma omp for schedule(dynamic)
    for (std::int64_t k = 0; k < n; ++k) {
      const Tensor& t = tensors[k];
      if (t.length > longest_small) continue;
      if (!t.rotates) {
        step_plainly<Base>(t, 0, t.length, o);
        continue;
      }
      const Dots dots = measure<Base, Base::keeps>(t, 0, t.length, o, steps);
      rotate<Base, Base::keeps>(t, 0, t.length, o, steps, turn_of(dots, o.lr));
    }
  }
}

}  // namespace

extern "C" void bare_sgd(const Tensor* tensors, std::int64_t n, const Options* o, int threads) {
  step_all<Sgd>(tensors, n, *o, threads);
}
extern "C" void bare_momentum(const Tensor* tensors, std::int64_t n, const Options* o, int threads) {
  step_all<Momentum>(tensors, n, *o, threads);
}
extern "C" void bare_adam(const Tensor* tensors, std::int64_t n, const Options* o, int threads) {
  step_all<Adam>(tensors, n, *o, threads);
}

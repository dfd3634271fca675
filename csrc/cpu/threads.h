// Threads: the only file that knows OpenMP. Without it everything runs on the calling thread.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef LAYCA_STD_THREADS
#include <thread>
#include <vector>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define LAYCA_X86 1
#endif

namespace layca::cpu {

// What the processor makes of denormal numbers: it takes them for zero, or as they are.
enum class Denormals { FLUSHED, KEPT };

// Treats denormal numbers as zero on this thread while it lives. A momentum that decays under zero gradients passes
// through them, and each costs the processor over a hundred cycles.
class FlushDenormals {
 public:
  explicit FlushDenormals(Denormals denormals) : saved_(read()) {
    if (denormals == Denormals::FLUSHED) write(saved_ | flush_bits);
  }
  ~FlushDenormals() { write(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(LAYCA_X86)
  using Register = unsigned int;
  static constexpr Register flush_bits = 0x8040;  // flush to zero, denormals are zero
  static Register read() { return _mm_getcsr(); }
  static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = std::uint64_t;
  static constexpr Register flush_bits = Register{1} << 24;  // flush to zero, inputs and outputs
  static Register read() {
    Register value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Register = int;
  static constexpr Register flush_bits = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif
  Register saved_;
};

// Run `body(thread)` once on each of at most `threads` threads, the caller's among them, numbered from 0.
template <class Body>
void in_parallel([[maybe_unused]] int threads, Denormals denormals, const Body& body) {
#ifdef _OPENMP
  // A team of one goes around OpenMP: it would tear down its pool to that size and build it again for the next caller.
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const FlushDenormals guard(denormals);
      body(omp_get_thread_num());
    }
    return;
  }
#endif
#ifdef LAYCA_STD_THREADS
  // ThreadSanitizer sees how these wait for each other, and not how OpenMP's do.
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) {
    team.emplace_back([&body, denormals, thread] {
      const FlushDenormals guard(denormals);
      body(thread);
    });
  }
  {
    const FlushDenormals guard(denormals);
    body(0);
  }
  for (std::thread& thread : team) thread.join();
#else
  const FlushDenormals guard(denormals);
  body(0);
#endif
}

// A hint to the processor that this thread is waiting for another.
inline void relax() {
#if defined(LAYCA_X86)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace layca::cpu

#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(LAYCA_WATCH_THREADS)
#include <sanitizer/tsan_interface.h>
#endif

namespace layca::emulator {
namespace {

constexpr std::size_t stack_bytes = 128 * 1024;

}  // namespace

Fiber::Fiber() {
  void* const room =
      mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(room);
#if defined(LAYCA_WATCH_THREADS)
  sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = stack_bytes;
  inside_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(&run), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

Fiber::~Fiber() {
#if defined(LAYCA_WATCH_THREADS)
  __tsan_destroy_fiber(sanitizer_fiber_);
#endif
  munmap(stack_, stack_bytes);
}

void Fiber::run(unsigned upper, unsigned lower) {
  auto* const self = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(upper) << 32 | lower);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_size_);
#endif
  for (;;) {
    self->body();
    self->leave();
  }
}

#if defined(__SANITIZE_ADDRESS__) || defined(LAYCA_WATCH_THREADS)

void Fiber::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&sanitizer_outside_, stack_, stack_bytes);
#endif
#if defined(LAYCA_WATCH_THREADS)
  sanitizer_outside_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&outside_, &inside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_outside_, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&sanitizer_stack_, outside_stack_, outside_size_);
#endif
#if defined(LAYCA_WATCH_THREADS)
  __tsan_switch_to_fiber(sanitizer_outside_, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&inside_, &outside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_stack_, &outside_stack_, &outside_size_);
#endif
}

#else

// swapcontext asks the system for the mask of signals, which takes fifty times as long.
void Fiber::enter() {
  if (_setjmp(outside_jump_) != 0) return;
  if (is_started_) std::longjmp(inside_jump_, 1);
  is_started_ = true;
  setcontext(&inside_);
}

void Fiber::leave() {
  if (_setjmp(inside_jump_) == 0) std::longjmp(outside_jump_, 1);
}

#endif

#if defined(LAYCA_WATCH_THREADS)
void release(const void* of) { __tsan_release(const_cast<void*>(of)); }
void acquire(const void* of) { __tsan_acquire(const_cast<void*>(of)); }
#else
void release(const void*) {}
void acquire(const void*) {}
#endif

}  // namespace layca::emulator

// Stacks that one thread of the host works on in turn: each is a thread of the emulated GPU.
//
// Where sanitizers look on they are told of every change of stack. ThreadSanitizer then takes each fiber for a thread
// that nothing has ordered against the others, so that it reports two of them which use the same memory without a
// barrier in between, in whatever order they ran here.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <functional>

#include <ucontext.h>

namespace layca::emulator {

class Fiber {
 public:
  // Whether there is nothing left of its last body that a sanitizer would tell from the next one's.
#if defined(LAYCA_WATCH_THREADS)
  static constexpr bool can_be_taken_again = false;
#else
  static constexpr bool can_be_taken_again = true;
#endif

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From outside: run until it leaves, or until `body` returns.
  void enter();
  // From inside: back to whoever entered it.
  void leave();

  // What it calls whenever it is entered after the last call has returned.
  std::function<void()> body;

 private:
  static void run(unsigned upper, unsigned lower);

  char* stack_;
  ucontext_t inside_{}, outside_{};
  std::jmp_buf inside_jump_{}, outside_jump_{};
  bool is_started_ = false;
  void* sanitizer_fiber_ = nullptr;
  void* sanitizer_outside_ = nullptr;
  void* sanitizer_stack_ = nullptr;
  const void* outside_stack_ = nullptr;
  std::size_t outside_size_ = 0;
};

// What all fibers that release `of` have done is over for those that acquire it later.
void release(const void* of);
void acquire(const void* of);

}  // namespace layca::emulator

// The emulated driver: it takes launches and runs them, at once or when a test says so.
#include "driver.h"

#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <string>

#include "blocks.h"
#include "cuda_runtime_api.h"

#define LAYCA_EXPORT extern "C" __attribute__((visibility("default")))

namespace layca::emulator {
namespace {

// Of one block for all devices.
constexpr unsigned most_threads = 1024;

struct Kernel {
  const char* verb;
  Bind bind;
};

struct Ticket {
  std::function<void()> body;
  unsigned blocks, threads;
};

// Called for every launch instead of running it: on which stream, of which kernel, and by which number it is to be run.
// Returns 0, or the launch is refused.
using Queue = int (*)(std::uintptr_t stream, const char* verb, std::int64_t ticket);

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

// One launch at a time, whichever thread of the host it comes from.
std::recursive_mutex mutex;
Queue queue = nullptr;
std::map<std::int64_t, Ticket> tickets;
std::int64_t next_ticket = 1;
std::string last_error = "no error";

cudaError_t run(const Ticket& ticket) {
  try {
    run_blocks(ticket.body, ticket.blocks, ticket.threads);
    return cudaSuccess;
  } catch (const std::exception& error) {
    last_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace

void add_kernel(const void* kernel, const char* verb, Bind bind) { kernels()[kernel] = {verb, std::move(bind)}; }

}  // namespace layca::emulator

using namespace layca::emulator;

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                             cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  const bool is_flat = grid.y * grid.z * block.y * block.z == 1;
  if (grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > most_threads || !is_flat || shared != 0) {
    return cudaErrorInvalidConfiguration;
  }
  // Here, as on a GPU: the arguments are gone when the caller returns.
  Ticket ticket{found->second.bind(arguments), grid.x, block.x};
  if (!queue) return run(ticket);
  tickets[next_ticket] = std::move(ticket);
  const bool is_taken = queue(reinterpret_cast<std::uintptr_t>(stream), found->second.verb, next_ticket++) == 0;
  return is_taken ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? last_error.c_str() : "the emulator does not take such a launch";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

LAYCA_EXPORT void layca_emulator_seed(std::uint64_t seed) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  set_seed(seed);
}

// From now on launches are queued; null: run at once, as from the start. What is queued is forgotten.
LAYCA_EXPORT void layca_emulator_queue(Queue to) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  queue = to;
  tickets.clear();
}

// Run what was queued, any number of times. Returns what went wrong, or null.
LAYCA_EXPORT const char* layca_emulator_run(std::int64_t ticket) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto found = tickets.find(ticket);
  if (found == tickets.end()) return "there is no such launch";
  return run(found->second) == cudaSuccess ? nullptr : last_error.c_str();
}

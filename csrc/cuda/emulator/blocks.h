// The emulated GPU at work on one launch: blocks of threads, each thread a fiber, in an order drawn from a seed.
//
// A thread runs until it waits for others: at __syncthreads() for its block, at a shuffle for its warp. Who goes on
// then is drawn: in one half of the launches any thread that can, in the other one of the first block and warp in an
// order that holds for all of the launch, so that some warps are as far ahead of others as barriers allow. Shared
// memory is full of NaN when a block begins. What the GPU leaves undefined is an error here: threads of a block at
// different barriers, or one that has ended; shuffles that not all of the named lanes make at the same place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace layca::emulator {

constexpr int warp_size = 32;

struct Index {
  unsigned x, y, z;
};

struct Block;

// What a thread knows of itself.
struct Thread {
  Index thread, block, block_size, grid_size;
  Block* home;
  int warp, lane;
};

// The one that is running.
extern Thread* current;

// Where in the source something is asked for, as a barrier's name.
using Line = int;

void wait_for_block(Line line);
// The value of the lane `offset` above, or the own one where there is none.
std::uint64_t shuffle_down(std::uint32_t lanes, std::uint64_t value, unsigned offset, Line line);
// This block's memory under a name; `of` is an address that nothing else has.
void* shared_memory(const void* of, std::size_t bytes);

// Run `body` once for every thread of every block. Throws what a thread threw, and std::logic_error where threads do
// what they must not.
void run_blocks(const std::function<void()>& body, unsigned blocks, unsigned threads);

// Draw the orders of the coming launches from here.
void set_seed(std::uint64_t seed);

}  // namespace layca::emulator

// The three verbs over a whole batch, and all three in one sweep that finds the layers still in cache.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../batch.h"
#include "registry.h"
#include "schedule.h"
#include "scratch.h"

namespace layca::cpu {

// Made once for a batch: the tables' addresses and structure stay, while what they hold may change between calls.
// Nothing is allocated in a call, and calls on one object must not overlap. The results' bits do not depend on
// `threads`.
class Runner {
 public:
  // Throws std::invalid_argument if there are no kernels for `formula` and `dtype` with `instructions`.
  Runner(const Batch& batch, const std::string& formula, const std::string& dtype, const std::string& instructions);

  // Advances the states (in place); writes dots and non-finite counts.
  void measure(int threads);
  // From the dots: writes coefficients, the other counts, and radii on their first use.
  void coefficients();
  // Applies the coefficients to the parameters (in place).
  void rotate(int threads);
  // Takes the memory that a step on so many threads needs; throws std::bad_alloc where there is none.
  void reserve(int threads);
  // All three.
  void step(int threads);

 private:
  // How far the threads are with a large layer. Each has a cache line of its own.
  struct alignas(64) Progress {
    std::atomic<std::int64_t> pieces_to_measure{0};
    std::atomic<bool> ready{false};  // coefficients are written
  };

  int useful_threads(int threads) const;
  void start();
  template <class DoPiece, class DoLayer>
  void draw(const DoPiece& do_piece, const DoLayer& do_layer);
  bool count_piece(const Piece& piece);
  bool measure_piece(const Piece& piece, char* steps);
  void rotate_piece(const Piece& piece, char* steps) const;
  void step_on_one_thread(int thread);
  bool step_piece(std::int64_t index, int thread);
  void step_layer(std::int64_t layer, int thread);
  void rotate_own_pieces(const LargeLayer& large, int thread);
  void wait_for(std::size_t large) const;

  Batch batch_;
  Kernels kernels_;
  Schedule schedule_;
  std::unique_ptr<Progress[]> progress_;  // per large layer
  std::vector<int> owners_;               // per piece: the thread that measured it
  std::vector<char*> steps_;              // per piece: where its steps are until it is rotated, or null
  std::vector<Scratch> scratch_;          // per thread
  std::atomic<std::size_t> next_{0};      // item of the queue
};

}  // namespace layca::cpu

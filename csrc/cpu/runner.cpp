#include "runner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "layers.h"
#include "threads.h"

namespace layca::cpu {
namespace {

// Below this many elements waking the other threads takes longer than they save.
constexpr std::int64_t smallest_parallel = 1 << 15;

constexpr int nobody = -1;

constexpr int spins_before_yielding = 1000;

// Pieces whose steps a thread keeps at a time: about what it measures before the first can be rotated, in layers that
// stay in the caches. Of larger ones it makes the rest again.
constexpr std::size_t most_places = 16;

// What rotate reads once more per element after measure: the weight, and the step or what it is made of.
int bytes_read_again(const Batch& batch, const Kernels& kernels) {
  const bool compensated = batch.n_tensors > 0 && batch.tensors[Column::REMAINDER] != 0;
  const int weight = size_of(batch.types.param) + (compensated ? static_cast<int>(sizeof(std::int16_t)) : 0);
  if (kernels.measure_and_store) return weight + kernels.step_size;
  return weight + kernels.n_states * size_of(batch.types.state) + (kernels.reads_grad ? size_of(batch.types.grad) : 0);
}

// One over a loss scale beyond 2^126 is denormal as a float32: flushed, it would make zeros of all gradients. Tensors
// of a batch differ in its sign alone.
Denormals denormals(const Batch& batch) {
  if (batch.n_tensors == 0) return Denormals::FLUSHED;
  const double grad_scale = std::abs(tensor_row(batch, 0).hyper[Hyper::GRAD_SCALE]);
  return grad_scale < std::numeric_limits<float>::min() ? Denormals::KEPT : Denormals::FLUSHED;
}

}  // namespace

Runner::Runner(const Batch& batch, const std::string& formula, const std::string& dtype,
               const std::string& instructions)
    : batch_(batch),
      kernels_(find_kernels(formula, dtype, instructions)),
      schedule_(make_schedule(batch, bytes_read_again(batch, kernels_))),
      progress_(std::make_unique<Progress[]>(schedule_.large.size())),
      owners_(schedule_.pieces.size()),
      steps_(schedule_.pieces.size()) {
  if (!kernels_.prepare) batch_.step_options = nullptr;
}

void Runner::measure(int threads) {
  start();
  if (kernels_.prepare) prepare_options(batch_, kernels_);
  in_parallel(useful_threads(threads), denormals(batch_), [&](int) {
    draw([&](std::int64_t piece) { measure_piece(schedule_.pieces[piece], nullptr); },
         [&](std::int64_t layer) {
           measure_tiles(batch_, kernels_, layer, 0, layer_span(batch_, layer).tiles);
           finish_dots(batch_, layer);
         });
  });
}

void Runner::coefficients() {
  in_parallel(1, denormals(batch_), [&](int) {
    for (std::int64_t layer = 0; layer < batch_.n_layers; ++layer) compute_coefficients(batch_, kernels_, layer);
  });
}

void Runner::rotate(int threads) {
  start();
  in_parallel(useful_threads(threads), denormals(batch_), [&](int) {
    draw([&](std::int64_t piece) { rotate_piece(schedule_.pieces[piece], nullptr); },
         [&](std::int64_t layer) { rotate_tiles(batch_, kernels_, layer, 0, layer_span(batch_, layer).tiles); });
  });
}

void Runner::step(int threads) {
  start();
  reserve(threads);
  if (kernels_.prepare) prepare_options(batch_, kernels_);
  in_parallel(useful_threads(threads), denormals(batch_), [&](int thread) { step_on_one_thread(thread); });
}

void Runner::reserve(int threads) {
  if (!kernels_.measure_and_store) return;
  while (scratch_.size() < static_cast<std::size_t>(useful_threads(threads))) {
    const std::size_t places = std::min(most_places, schedule_.pieces.size() + 1);
    scratch_.emplace_back(places, static_cast<std::size_t>(schedule_.longest_item * kernels_.step_size));
  }
}

int Runner::useful_threads(int threads) const { return schedule_.elements < smallest_parallel ? 1 : threads; }

void Runner::start() {
  next_.store(0, std::memory_order_relaxed);
  for (std::size_t i = 0; i < schedule_.large.size(); ++i) {
    const LargeLayer& large = schedule_.large[i];
    progress_[i].pieces_to_measure.store(large.last_piece - large.first_piece, std::memory_order_relaxed);
    progress_[i].ready.store(false, std::memory_order_relaxed);
  }
}

// Draw items until the queue is empty; `do_piece` takes a place in Schedule::pieces, `do_layer` a small layer.
template <class DoPiece, class DoLayer>
void Runner::draw(const DoPiece& do_piece, const DoLayer& do_layer) {
  for (;;) {
    const std::size_t item = next_.fetch_add(1, std::memory_order_relaxed);
    if (item >= schedule_.n_items()) return;
    if (item < schedule_.pieces.size()) {
      do_piece(static_cast<std::int64_t>(item));
      continue;
    }
    const Share& share = schedule_.shares[item - schedule_.pieces.size()];
    for (std::int64_t place = share.first; place < share.last; ++place) do_layer(schedule_.small[place]);
  }
}

// True for the last piece of a layer, whose dots are then complete.
bool Runner::count_piece(const Piece& piece) {
  if (progress_[piece.large].pieces_to_measure.fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
  finish_dots(batch_, schedule_.large[piece.large].layer);
  return true;
}

bool Runner::measure_piece(const Piece& piece, char* steps) {
  measure_tiles(batch_, kernels_, schedule_.large[piece.large].layer, piece.first, piece.last, steps);
  return count_piece(piece);
}

void Runner::rotate_piece(const Piece& piece, char* steps) const {
  rotate_tiles(batch_, kernels_, schedule_.large[piece.large].layer, piece.first, piece.last, steps);
}

void Runner::step_on_one_thread(int thread) {
  std::size_t rotated = 0;  // large layers whose own pieces are rotated: all before this one
  const auto do_piece = [&](std::int64_t index) {
    const Piece& piece = schedule_.pieces[index];
    if (step_piece(index, thread)) {
      compute_coefficients(batch_, kernels_, schedule_.large[piece.large].layer);
      progress_[piece.large].ready.store(true, std::memory_order_release);
    }
    while (rotated < schedule_.large.size() && progress_[rotated].ready.load(std::memory_order_acquire)) {
      rotate_own_pieces(schedule_.large[rotated++], thread);
    }
  };
  draw(do_piece, [&](std::int64_t layer) { step_layer(layer, thread); });
  for (; rotated < schedule_.large.size(); ++rotated) {
    wait_for(rotated);
    rotate_own_pieces(schedule_.large[rotated], thread);
  }
}

// True for the last piece of a layer. A piece that is done at once has no owner left.
bool Runner::step_piece(std::int64_t index, int thread) {
  const Piece& piece = schedule_.pieces[index];
  const LayerSpan span = layer_span(batch_, schedule_.large[piece.large].layer);
  const Rotation move = foreseen_move(batch_, span);
  if (move.mode != Mode::KEEP) {
    owners_[index] = nobody;
    step_tiles(batch_, kernels_, span, move, piece.first, piece.last);
    return count_piece(piece);
  }
  owners_[index] = thread;
  steps_[index] = scratch_.empty() ? nullptr : scratch_[thread].take();
  return measure_piece(piece, steps_[index]);
}

void Runner::step_layer(std::int64_t layer, int thread) {
  const LayerSpan span = layer_span(batch_, layer);
  const Rotation move = foreseen_move(batch_, span);
  if (move.mode != Mode::KEEP) {
    step_tiles(batch_, kernels_, span, move, 0, span.tiles);
    finish_dots(batch_, layer);
    compute_coefficients(batch_, kernels_, layer);
    return;
  }
  char* const steps = scratch_.empty() ? nullptr : scratch_[thread].take();
  measure_tiles(batch_, kernels_, layer, 0, span.tiles, steps);
  finish_dots(batch_, layer);
  compute_coefficients(batch_, kernels_, layer);
  rotate_tiles(batch_, kernels_, layer, 0, span.tiles, steps);
  if (steps != nullptr) scratch_[thread].give_back(steps);
}

// The last measured first: it is the likeliest to be still in cache. Only pieces go backwards: within one, addresses
// must ascend for the processor to fetch ahead.
void Runner::rotate_own_pieces(const LargeLayer& large, int thread) {
  for (std::int64_t piece = large.last_piece - 1; piece >= large.first_piece; --piece) {
    if (owners_[piece] != thread) continue;
    rotate_piece(schedule_.pieces[piece], steps_[piece]);
    if (steps_[piece] != nullptr) scratch_[thread].give_back(steps_[piece]);
  }
}

// Every piece of it has been drawn by a thread that does not wait before it is measured.
void Runner::wait_for(std::size_t large) const {
  for (int spins = 0; !progress_[large].ready.load(std::memory_order_acquire); ++spins) {
    if (spins < spins_before_yielding) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace layca::cpu

// Who does what in a step: work as a queue that threads draw from one item after another, the largest layers first.
//
// Layers that fit in a core's cache are measured and rotated at once by one thread. A larger one is cut into pieces,
// and each thread rotates the pieces that it measured, once all of the layer is: their lines are in its own caches, and
// fetching them from another core's can cost more than fetching them from memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../batch.h"

namespace layca::cpu {

// Tiles [first, last) of a large layer.
struct Piece {
  std::int64_t large;  // place in Schedule::large
  std::int64_t first, last;
};

struct LargeLayer {
  std::int64_t layer;
  std::int64_t first_piece, last_piece;  // places in Schedule::pieces
};

// Places [first, last) of Schedule::small: layers that one thread does whole, one after the other.
struct Share {
  std::int64_t first, last;
};

struct Schedule {
  std::vector<LargeLayer> large;
  std::vector<Piece> pieces;
  std::vector<std::int64_t> small;
  std::vector<Share> shares;
  std::int64_t elements = 0;
  std::int64_t longest_item = 0;  // elements of the longest piece or small layer

  // The queue: first all pieces, then all shares.
  std::size_t n_items() const { return pieces.size() + shares.size(); }
};

// `bytes_read_again` is what rotate reads once more per element, after measure. Only the structure of the batch is
// read, no pointers and no hyperparameters.
Schedule make_schedule(const Batch& batch, int bytes_read_again);

}  // namespace layca::cpu

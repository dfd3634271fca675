#include "schedule.h"

#include <algorithm>
#include <numeric>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace layca::cpu {
namespace {

// Elements per piece: enough that drawing one costs nothing, few enough to share out a layer evenly.
constexpr std::int64_t piece_length = 1 << 16;

// Tiny layers are drawn together up to this many elements: drawing takes as long as measuring a hundred elements.
constexpr std::int64_t share_length = 1 << 13;

std::int64_t cache_per_core() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

std::vector<std::int64_t> largest_first(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t left, std::int64_t right) { return lengths[left] > lengths[right]; });
  return order;
}

void add_large(const Batch& batch, std::int64_t layer, Schedule& schedule) {
  const std::int64_t tiles = layer_span(batch, layer).tiles;
  const std::int64_t step = std::max<std::int64_t>(1, piece_length / batch.tile);
  const auto place = static_cast<std::int64_t>(schedule.large.size());
  const auto first_piece = static_cast<std::int64_t>(schedule.pieces.size());
  for (std::int64_t first = 0; first < tiles; first += step) {
    schedule.pieces.push_back({place, first, std::min(first + step, tiles)});
    schedule.longest_item = std::max(schedule.longest_item, step * batch.tile);
  }
  schedule.large.push_back({layer, first_piece, static_cast<std::int64_t>(schedule.pieces.size())});
}

void add_shares(const std::vector<std::int64_t>& lengths, Schedule& schedule) {
  const auto n_small = static_cast<std::int64_t>(schedule.small.size());
  for (std::int64_t first = 0, last = 0; first < n_small; first = last) {
    std::int64_t elements = 0;
    do {
      elements += lengths[schedule.small[last++]];
    } while (last < n_small && elements + lengths[schedule.small[last]] <= share_length);
    schedule.shares.push_back({first, last});
  }
}

}  // namespace

Schedule make_schedule(const Batch& batch, int bytes_read_again) {
  Schedule schedule;
  std::vector<std::int64_t> lengths(batch.n_layers);
  for (std::int64_t layer = 0; layer < batch.n_layers; ++layer) lengths[layer] = layer_span(batch, layer).length;
  // The gradient, which is read only once, passes through the same cache: leave it a quarter.
  const std::int64_t longest_small = cache_per_core() / 4 * 3 / bytes_read_again;
  for (const std::int64_t layer : largest_first(lengths)) {
    schedule.elements += lengths[layer];
    if (lengths[layer] > longest_small) {
      add_large(batch, layer, schedule);
    } else {
      schedule.small.push_back(layer);
      schedule.longest_item = std::max(schedule.longest_item, lengths[layer]);
    }
  }
  add_shares(lengths, schedule);
  return schedule;
}

}  // namespace layca::cpu

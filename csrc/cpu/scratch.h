// Room for the steps of the few pieces that one thread has measured and not yet rotated.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace layca::cpu {

class alignas(64) Scratch {
 public:
  Scratch(std::size_t places, std::size_t bytes) : memory_(new char[places * bytes]) {
    for (std::size_t i = places; i > 0; --i) free_.push_back(memory_.get() + (i - 1) * bytes);
  }

  // Null if all places are taken.
  char* take() {
    if (free_.empty()) return nullptr;
    char* const place = free_.back();
    free_.pop_back();
    return place;
  }

  void give_back(char* place) { free_.push_back(place); }

 private:
  std::unique_ptr<char[]> memory_;  // not initialized: what is never used takes no memory
  std::vector<char*> free_;
};

}  // namespace layca::cpu

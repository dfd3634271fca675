#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)0)
#endif

namespace layca::emulator {

Thread* current = nullptr;

namespace {

// Blocks that share the multiprocessor, and the memory that each has there; what lies between two variables.
constexpr unsigned resident = 3;
constexpr std::size_t shared_bytes = 4096, red_zone = 64;
constexpr int most_shared = 8;

// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct RandomNumbers {
  using result_type = std::uint64_t;
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return ~result_type{0}; }
  result_type operator()() {
    result_type z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  // Below `end`, which is small.
  int below(int end) { return static_cast<int>(((*this)() >> 32) * static_cast<unsigned>(end) >> 32); }

  result_type state = 1;
};
RandomNumbers random_numbers;

// Those of earlier launches.
std::vector<std::unique_ptr<Fiber>> idle_fibers;

}  // namespace

struct Lane : Thread {
  enum State { READY, AT_BARRIER, AT_SHUFFLE, ENDED };
  State state = READY;
  unsigned shuffles = 0;
  std::unique_ptr<Fiber> fiber;
};

// One shuffle of a warp. The next one has another such place: a lane may be one ahead of others, never two.
struct Exchange {
  std::uint64_t values[warp_size];
  int arrived = 0, left = 0;
  Line line;
  std::uint32_t lanes;
  unsigned offset;
};

struct Warp {
  Exchange exchanges[2] = {};
  std::uint64_t rank = 0;
  // Those that can go on.
  Lane* ready[warp_size] = {};
  int n_ready = 0;
};

struct Block {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  // Of a fixed size: who allocates memory that others give back is ordered before them, to a sanitizer.
  std::pair<const void*, unsigned char*> shared[most_shared] = {};
  unsigned char* free_memory = nullptr;
  int waiting = 0, ended = 0;
  Line line = 0;
  // Two in turn, as a thread may be at the next barrier before others have left this one.
  char barriers[2] = {};
  int barrier = 0;
};

namespace {

class Launch {
 public:
  Launch(const std::function<void()>& body, unsigned blocks, unsigned threads)
      : body_(body), threads_(threads), by_rank_(random_numbers() % 2 == 0) {
    for (unsigned block = 0; block < blocks; ++block) to_come_.push_back({block, 0, 0});
    std::shuffle(to_come_.begin(), to_come_.end(), random_numbers);
    grid_ = {blocks, 1, 1};
    ready_.reserve(resident * threads);
  }

  void run() {
    for (unsigned place = 0; place < resident && !to_come_.empty(); ++place) begin(homes_[place]);
    while (!ready_.empty()) {
      Lane* const lane = take_ready();
      current = lane;
      lane->fiber->enter();
      current = nullptr;
      if (error_) std::rethrow_exception(error_);
      if (lane->state == Lane::ENDED && lane->home->ended == static_cast<int>(threads_)) {
        ++done_;
        if (!to_come_.empty()) begin(*lane->home);
      }
    }
    if (done_ < grid_.x) throw std::logic_error("the threads that are left wait for ones that never come");
    acquire(&done_);
    for (Block& block : homes_) retire(block);
  }

  void wait_for_block(Line line) {
    Lane& lane = *static_cast<Lane*>(current);
    Block& block = *lane.home;
    if (block.waiting > 0 && block.line != line) throw std::logic_error("threads of a block wait at two barriers");
    if (block.ended > 0) throw std::logic_error("a thread waits for its block, of which some have ended");
    block.line = line;
    const char* const barrier = &block.barriers[block.barrier];
    release(barrier);
    if (++block.waiting == static_cast<int>(threads_)) {
      block.waiting = 0;
      block.barrier ^= 1;
      for (Lane& other : block.lanes) {
        if (&other != &lane) make_ready(other);
      }
      make_ready(lane);
    } else {
      lane.state = Lane::AT_BARRIER;
    }
    lane.fiber->leave();
    acquire(barrier);
  }

  std::uint64_t shuffle_down(std::uint32_t lanes, std::uint64_t value, unsigned offset, Line line) {
    Lane& lane = *static_cast<Lane*>(current);
    Exchange& exchange = lane.home->warps[lane.warp].exchanges[lane.shuffles++ % 2];
    if (exchange.arrived == 0) {
      exchange.line = line;
      exchange.lanes = lanes;
      exchange.offset = offset;
    }
    if (exchange.line != line || exchange.lanes != lanes || exchange.offset != offset) {
      throw std::logic_error("the lanes of a warp make different shuffles");
    }
    if ((lanes >> lane.lane & 1) == 0) throw std::logic_error("a lane makes a shuffle without being named in it");
    exchange.values[lane.lane] = value;
    const int expected = __builtin_popcount(lanes);
    if (++exchange.arrived == expected) {
      for (int other = 0; other < warp_size; ++other) {
        if (lanes >> other & 1) make_ready(lane.home->lanes[lane.warp * warp_size + other]);
      }
    } else {
      lane.state = Lane::AT_SHUFFLE;
    }
    lane.fiber->leave();
    const unsigned from = lane.lane + offset;
    if (from < warp_size && (lanes >> from & 1) == 0)
      throw std::logic_error("a shuffle reads a lane that is not in it");
    const std::uint64_t found = exchange.values[from < warp_size ? from : lane.lane];
    if (++exchange.left == expected) exchange.arrived = exchange.left = 0;
    return found;
  }

 private:
  // The next block takes this place.
  void begin(Block& block) {
    const Index index = to_come_.back();
    to_come_.pop_back();
    retire(block);
    // Given back when the launch is over: to give it to another block would order the two.
    memory_.push_back(std::make_unique<unsigned char[]>(shared_bytes));
    block.free_memory = memory_.back().get();
    std::memset(block.free_memory, 0xff, shared_bytes);
    ASAN_POISON_MEMORY_REGION(block.free_memory, shared_bytes);
    std::fill(std::begin(block.shared), std::end(block.shared), std::pair<const void*, unsigned char*>{});
    block.ended = block.waiting = 0;
    block.warps.assign((threads_ + warp_size - 1) / warp_size, {});
    block.lanes.resize(threads_);
    const std::uint64_t block_rank = random_numbers() << 32;
    for (Warp& warp : block.warps) warp.rank = block_rank + random_numbers.below(256);
    for (unsigned thread = 0; thread < threads_; ++thread) {
      Lane& lane = block.lanes[thread];
      static_cast<Thread&>(lane) = {{thread, 0, 0},
                                    index,
                                    {threads_, 1, 1},
                                    grid_,
                                    &block,
                                    static_cast<int>(thread) / warp_size,
                                    static_cast<int>(thread) % warp_size};
      lane.shuffles = 0;
      lane.fiber = new_fiber();
      lane.fiber->body = [this, &lane] { work(lane); };
      make_ready(lane);
    }
    release(this);
  }

  static std::unique_ptr<Fiber> new_fiber() {
    if (idle_fibers.empty()) return std::make_unique<Fiber>();
    std::unique_ptr<Fiber> fiber = std::move(idle_fibers.back());
    idle_fibers.pop_back();
    return fiber;
  }

  static void retire(Block& block) {
    if (!Fiber::can_be_taken_again) block.lanes.clear();
    for (Lane& lane : block.lanes) {
      if (lane.fiber) idle_fibers.push_back(std::move(lane.fiber));
    }
  }

  void work(Lane& lane) {
    acquire(this);
    try {
      body_();
      if (lane.home->waiting > 0) throw std::logic_error("a thread ends while others of its block wait for it");
    } catch (...) {
      error_ = std::current_exception();
    }
    lane.state = Lane::ENDED;
    ++lane.home->ended;
    release(&done_);
  }

  void make_ready(Lane& lane) {
    lane.state = Lane::READY;
    Warp& warp = lane.home->warps[lane.warp];
    if (warp.n_ready == 0) ready_.push_back(&warp);
    warp.ready[warp.n_ready++] = &lane;
  }

  Lane* take_ready() {
    auto warp = ready_.begin() + random_numbers.below(static_cast<int>(ready_.size()));
    if (by_rank_) {
      warp = std::max_element(ready_.begin(), ready_.end(),
                              [](Warp* one, Warp* other) { return one->rank < other->rank; });
    }
    Warp& taken = **warp;
    std::swap(taken.ready[random_numbers.below(taken.n_ready)], taken.ready[taken.n_ready - 1]);
    if (--taken.n_ready == 0) {
      *warp = ready_.back();
      ready_.pop_back();
    }
    return taken.ready[taken.n_ready];
  }

  const std::function<void()>& body_;
  const unsigned threads_;
  const bool by_rank_;
  Index grid_;
  std::vector<Index> to_come_;
  // Warps of which a thread can go on.
  std::vector<Warp*> ready_;
  Block homes_[resident];
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
  unsigned done_ = 0;
  std::exception_ptr error_;
};

Launch* running = nullptr;

}  // namespace

void wait_for_block(Line line) { running->wait_for_block(line); }

std::uint64_t shuffle_down(std::uint32_t lanes, std::uint64_t value, unsigned offset, Line line) {
  return running->shuffle_down(lanes, value, offset, line);
}

void* shared_memory(const void* of, std::size_t bytes) {
  Block& block = *current->home;
  for (auto& [name, memory] : block.shared) {
    if (!name) {
      name = of;
      memory = block.free_memory;
      block.free_memory += (bytes + red_zone - 1) / red_zone * red_zone + red_zone;
      ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    }
    if (name == of) return memory;
  }
  throw std::logic_error("a block has more variables in shared memory than the emulator");
}

void run_blocks(const std::function<void()>& body, unsigned blocks, unsigned threads) {
  Launch launch(body, blocks, threads);
  running = &launch;
  try {
    launch.run();
  } catch (...) {
    running = nullptr;
    throw;
  }
  running = nullptr;
}

void set_seed(std::uint64_t seed) { random_numbers.state = seed; }

}  // namespace layca::emulator

// The CUDA built-ins that the kernels use, on the host, so that their bodies run under sanitizers.
//
// Every CUDA thread of a block is a fiber. A fiber runs until it must wait for others (a barrier, a warp operation) or
// ends; then another takes its turn, in an order drawn anew from a seed each time. So a value that is read without a
// barrier after its writing is, for some thread, not yet written. Waiting that can never end is reported as an error.
//
// Reads and writes of global memory (__ldg, __stcs, atomicAdd, ...) are recorded. What the lanes of a warp do at one
// place of the code between two barriers counts as one instruction; its cost is the number of 32-byte sectors touched,
// and the least possible is that of the same bytes packed densely.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The device that the kernels' own #if see: it has all they ask for. After torch's headers, which would be misled.
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s\n", message);
  std::_Exit(3);
}

// Sectors touched and the least possible, summed over warp-level instructions.
struct Traffic {
  uint64_t sectors = 0;
  uint64_t least = 0;
};

struct Access {
  uint64_t epoch;       // of the lane: how often it has waited so far
  const void* place;    // in the code
  uint64_t occurrence;  // at this place in this epoch
  uintptr_t address;
  size_t bytes;
};

enum class Wait { none, block, warp, done };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  uint3 thread{};
  Wait wait = Wait::done;
  unsigned mask = 0;
  const char* operation = "";
  uint64_t posted = 0;
  uint64_t epoch = 0;
  std::map<const void*, uint64_t> occurrences;
};

struct Warp {
  uint64_t results[kWarp] = {};
  std::vector<Access> accesses;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::function<void()> body;
  std::mt19937 random{0};
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  uint64_t block_result = 0;
  Traffic traffic;
  uint3 block{};
  uint3 block_dim{}, grid_dim{};

  ~Machine() {
    for (const auto& fiber : fibers) {
      munmap(fiber->stack, kStack);
    }
  }
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void enter_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(fake_stack, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
}

inline void leave_fiber(bool is_last) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &m.current->fake_stack, m.scheduler_stack, m.scheduler_stack_size);
#else
  (void)is_last;
#endif
  swapcontext(&m.current->context, &m.scheduler);
}

inline void run_fiber(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
  enter_fiber(nullptr);
  machine().body();
  machine().current->wait = Wait::done;
  leave_fiber(true);
}

// Called by a fiber: let others run until the scheduler finds what this one waits for.
inline void wait_for(Wait wait, unsigned mask, const char* operation, uint64_t value) {
  Fiber& fiber = *machine().current;
  fiber.wait = wait;
  fiber.mask = mask;
  fiber.operation = operation;
  fiber.posted = value;
  ++fiber.epoch;
  fiber.occurrences.clear();
  leave_fiber(false);
  enter_fiber(fiber.fake_stack);
}

inline unsigned lane_of(const Fiber& fiber) {
  return fiber.thread.x % kWarp;
}
inline Warp& warp_of(const Fiber& fiber) {
  return machine().warps[fiber.thread.x / kWarp];
}

// All values that the lanes of `mask` gave, by lane.
inline const uint64_t* exchange(unsigned mask, const char* operation, uint64_t value) {
  Fiber& fiber = *machine().current;
  if (!(mask >> lane_of(fiber) & 1)) {
    fail("a lane calls a warp operation whose mask does not name it");
  }
  wait_for(Wait::warp, mask, operation, value);
  return warp_of(fiber).results;
}

// Wake the lanes of one warp that all wait for each other; whether there were any.
inline bool release_warp(size_t first, size_t count) {
  Machine& m = machine();
  bool released = false;
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *m.fibers[first + i];
    if (fiber.wait != Wait::warp) {
      continue;
    }
    const unsigned mask = fiber.mask;
    bool is_complete = true;
    for (size_t j = 0; j < kWarp; ++j) {
      if (!(mask >> j & 1)) {
        continue;
      }
      // Lanes beyond the end of the block do not exist and are not waited for.
      const bool exists = j < count;
      const Fiber* other = exists ? m.fibers[first + j].get() : nullptr;
      if (exists && other->wait == Wait::warp && other->mask == mask && other->operation != fiber.operation) {
        fail("lanes of one warp meet at different warp operations");
      }
      is_complete = is_complete && (!exists || (other->wait == Wait::warp && other->mask == mask));
    }
    if (!is_complete) {
      continue;
    }
    for (size_t j = 0; j < count; ++j) {
      if (mask >> j & 1) {
        m.warps[first / kWarp].results[j] = m.fibers[first + j]->posted;
        m.fibers[first + j]->wait = Wait::none;
      }
    }
    released = true;
  }
  return released;
}

inline bool release_block() {
  Machine& m = machine();
  uint64_t any = 0;
  bool waits = false;
  for (const auto& fiber : m.fibers) {
    if (fiber->wait == Wait::done) {
      continue;
    }
    if (fiber->wait != Wait::block) {
      return false;
    }
    waits = true;
    any |= fiber->posted;
  }
  for (const auto& fiber : m.fibers) {
    if (fiber->wait == Wait::block) {
      fiber->wait = Wait::none;
    }
  }
  m.block_result = any;
  return waits;
}

// Count what the warps of the finished block did, instruction by instruction.
inline void count_traffic() {
  Machine& m = machine();
  for (Warp& warp : m.warps) {
    auto& all = warp.accesses;
    const auto key = [](const Access& a) { return std::make_tuple(a.epoch, a.place, a.occurrence); };
    std::stable_sort(all.begin(), all.end(), [&](const Access& a, const Access& b) { return key(a) < key(b); });
    for (size_t begin = 0, end; begin < all.size(); begin = end) {
      std::vector<uintptr_t> bytes, sectors;
      for (end = begin; end < all.size() && key(all[end]) == key(all[begin]); ++end) {
        for (size_t i = 0; i < all[end].bytes; ++i) {
          bytes.push_back(all[end].address + i);
          sectors.push_back((all[end].address + i) / 32);
        }
      }
      const auto distinct = [](std::vector<uintptr_t>& values) {
        std::sort(values.begin(), values.end());
        return static_cast<uint64_t>(std::unique(values.begin(), values.end()) - values.begin());
      };
      m.traffic.sectors += distinct(sectors);
      m.traffic.least += (distinct(bytes) + 31) / 32;
    }
    all.clear();
  }
}

inline void run_block(unsigned num_threads) {
  Machine& m = machine();
  m.warps.resize((num_threads + kWarp - 1) / kWarp);
  m.fibers.reserve(num_threads);
  while (m.fibers.size() < num_threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    m.fibers.push_back(std::move(fiber));
  }
  std::vector<Fiber*> order;
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = *m.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack, 0, kStack};
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.thread = {i, 0, 0};
    fiber.wait = Wait::none;
    fiber.epoch = 0;
    fiber.occurrences.clear();
    order.push_back(&fiber);
  }
  for (bool runs = true; runs;) {
    std::shuffle(order.begin(), order.end(), m.random);
    runs = false;
    for (Fiber* fiber : order) {
      if (fiber->wait == Wait::none) {
        run_fiber(*fiber);
        runs = true;
      }
    }
    for (size_t first = 0; first < num_threads; first += kWarp) {
      runs = release_warp(first, std::min<size_t>(kWarp, num_threads - first)) || runs;
    }
    runs = release_block() || runs;
  }
  for (unsigned i = 0; i < num_threads; ++i) {
    if (m.fibers[i]->wait != Wait::done) {
      fail("threads wait for each other for ever: a barrier or warp operation is not reached by all");
    }
  }
  count_traffic();
}

// What kernel<<<blocks, threads>>>(...) does, with the kernel's call as `body`. Blocks run in a drawn order as well.
inline void launch(unsigned blocks, unsigned threads, std::function<void()> body) {
  Machine& m = machine();
  if (!m.fibers.empty() && m.fibers.size() != threads) {
    for (const auto& fiber : m.fibers) {
      munmap(fiber->stack, kStack);
    }
    m.fibers.clear();
    m.warps.clear();
  }
  m.body = std::move(body);
  m.block_dim = {threads, 1, 1};
  m.grid_dim = {blocks, 1, 1};
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), m.random);
  for (const unsigned block : order) {
    m.block = {block, 0, 0};
    run_block(threads);
  }
}

inline void set_seed(uint64_t seed) {
  machine().random.seed(static_cast<uint32_t>(seed));
}
inline Traffic traffic() {
  return machine().traffic;
}

inline void record(const void* place, const void* address, size_t bytes) {
  Fiber& fiber = *machine().current;
  warp_of(fiber).accesses.push_back(
      {fiber.epoch, place, fiber.occurrences[place]++, reinterpret_cast<uintptr_t>(address), bytes});
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_shim

#define threadIdx (cuda_shim::machine().current->thread)
#define blockIdx (cuda_shim::machine().block)
#define blockDim (cuda_shim::machine().block_dim)
#define gridDim (cuda_shim::machine().grid_dim)

// Not inlined, so that the return address tells one place of the code from another.
#define SHIM_ACCESS __attribute__((noinline))
#define SHIM_RECORD(pointer, bytes) cuda_shim::record(__builtin_return_address(0), pointer, bytes)

template <typename T>
SHIM_ACCESS T __ldg(const T* from) {
  SHIM_RECORD(from, sizeof(T));
  return *from;
}

template <typename T>
SHIM_ACCESS void __stcs(T* to, T value) {
  SHIM_RECORD(to, sizeof(T));
  *to = value;
}

template <typename T, typename U>
SHIM_ACCESS T atomicAdd(T* to, U value) {
  SHIM_RECORD(to, sizeof(T));
  const T old = *to;
  *to = static_cast<T>(old + static_cast<T>(value));
  return old;
}

inline SHIM_ACCESS float4 atomicAdd(float4* to, float4 value) {
  SHIM_RECORD(to, sizeof(float4));
  const float4 old = *to;
  *to = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
  return old;
}

inline void __syncthreads() {
  cuda_shim::wait_for(cuda_shim::Wait::block, 0, "__syncthreads", 0);
}

inline int __syncthreads_or(int predicate) {
  cuda_shim::wait_for(cuda_shim::Wait::block, 0, "__syncthreads_or", predicate != 0);
  return cuda_shim::machine().block_result != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_shim::exchange(mask, "__syncwarp", 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* given = cuda_shim::exchange(mask, "__ballot_sync", predicate != 0);
  unsigned result = 0;
  for (unsigned lane = 0; lane < cuda_shim::kWarp; ++lane) {
    result |= (mask >> lane & 1 && given[lane] != 0) ? 1u << lane : 0u;
  }
  return result;
}

inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x % cuda_shim::kWarp);
  const int from = lane / width * width + (source % width + width) % width;
  const uint64_t* given = cuda_shim::exchange(mask, "__shfl_sync", cuda_shim::to_bits(value));
  if (!(mask >> from & 1)) {
    cuda_shim::fail("__shfl_sync reads a lane that its mask does not name");
  }
  return cuda_shim::from_bits<T>(given[from]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const int lane = static_cast<int>(threadIdx.x % cuda_shim::kWarp);
  const uint64_t* given = cuda_shim::exchange(mask, "__shfl_xor_sync", cuda_shim::to_bits(value));
  if (!(mask >> (lane ^ lane_mask) & 1)) {
    cuda_shim::fail("__shfl_xor_sync reads a lane that its mask does not name");
  }
  return cuda_shim::from_bits<T>(given[lane ^ lane_mask]);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}

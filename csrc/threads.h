// Threads, barriers and scratch memory, the same for every instruction set.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rnnkern {

// Runs fn(context, rank) on exactly `threads` OpenMP threads, or here, without a parallel region, when that is one.
// False, with nothing run, where the runtime grants fewer (inside another region, or limited).
bool run_parallel(int threads, void (*fn)(void*, int), void* context);

void yield_thread();

// All `size` threads must arrive before any leaves. Spins briefly, then yields: cores may be fewer than threads.
class Barrier {
 public:
  void reset(int size) {
    size_ = size;
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(0, std::memory_order_relaxed);
  }

  void wait() {
    if (size_ == 1) return;
    int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
      if (spins < kSpins) {
        pause_core();
      } else {
        yield_thread();
      }
    }
  }

 private:
  static constexpr int kSpins = 4000;  // about 50 us: longer than a step's imbalance, shorter than a scheduler slice

  static void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  int size_ = 1;
};

// Asks the system for large pages under a large fresh buffer: page by page, first touches can cost a tenth of a scan.
void prefer_large_pages(void* memory, size_t bytes);

// Bytes of recurrent weights up to which a core reads them at every step about as fast as from its second cache.
int64_t near_weights();

// Aligned zeros that live as long as their owner; throws std::runtime_error with the size asked for.
void* allocate_zeros(size_t bytes);
void release(void* memory);

// One aligned block in several arrays: name them all, then allocate. Each calling thread keeps its last block for its
// next call, up to kKept bytes: fresh pages cost more than the packing that they are for.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  template <class T>
  void add(T** array, int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    arrays_[count_++] = {reinterpret_cast<void**>(array), size_, bytes};
    size_ += bytes + kRedZone;
  }
  void allocate();  // throws std::runtime_error with the size asked for

 private:
  static constexpr int kMaxArrays = 24;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kRedZone = 64;  // so that the sanitizer sees one array run into the next
#else
  static constexpr size_t kRedZone = 0;
#endif
  static constexpr size_t kKept = size_t(64) << 20;
  struct {
    void** array;
    size_t offset, bytes;
  } arrays_[kMaxArrays];
  int count_ = 0;
  size_t size_ = 0, capacity_ = 0;
  unsigned char* base_ = nullptr;
};

}  // namespace rnnkern

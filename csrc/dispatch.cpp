// Choice of the instruction set, threads and scratch memory.
#include <sched.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "api.h"
#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rnnkern {

bool run_parallel(int threads, void (*fn)(void*, int), void* context) {
  if (threads == 1) {
    fn(context, 0);
    return true;
  }
#ifdef _OPENMP
  bool granted = false;
#pragma omp parallel num_threads(threads)
  if (omp_get_num_threads() == threads) {
    if (omp_get_thread_num() == 0) granted = true;
    fn(context, omp_get_thread_num());
  }
  return granted;
#else
  return false;
#endif
}

void yield_thread() { sched_yield(); }

void prefer_large_pages(void* memory, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (memory && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#else
  (void)memory, (void)bytes;
#endif
}

int64_t near_weights() {
  static const int64_t bytes = [] {
    int64_t near = int64_t(6) << 20;  // the third cache, where few cores share it: 90 GB/s a core on a Zen 4
#if defined(__x86_64__) && defined(_SC_LEVEL2_CACHE_SIZE)
    // A mesh lies behind it: 28 GB/s a core on a Sapphire Rapids. Half, because the input's weights take as much.
    int64_t second = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (__builtin_cpu_is("intel") && second > 0) near = second / 2;
#endif
    return near;
  }();
  return bytes;
}

static std::runtime_error out_of_memory(size_t bytes, const char* what) {
  return std::runtime_error("rnnkern: out of memory: cannot allocate " + std::to_string(bytes) + " bytes of " + what);
}

void* allocate_zeros(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (bytes && !memory) throw out_of_memory(bytes, "a stream");
  prefer_large_pages(memory, bytes);
  if (bytes) std::memset(memory, 0, bytes);
  return memory;
}

void release(void* memory) { std::free(memory); }

namespace {
struct Kept {
  unsigned char* base = nullptr;
  size_t capacity = 0;
  ~Kept() { std::free(base); }
};
thread_local Kept kept;
}  // namespace

void Scratch::allocate() {
  if (kept.capacity >= size_) {
    base_ = std::exchange(kept.base, nullptr);
    capacity_ = std::exchange(kept.capacity, 0);
  } else {
    capacity_ = size_;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, size_));
    if (!base_) throw out_of_memory(size_, "scratch space");
  }
  for (int i = 0; i < count_; i++) *arrays_[i].array = base_ + arrays_[i].offset;
#ifdef __SANITIZE_ADDRESS__
  std::memset(base_, 0xff, size_);  // NaN: what is read before it was written shows
  for (int i = 0; i < count_; i++) __asan_poison_memory_region(base_ + arrays_[i].offset + arrays_[i].bytes, kRedZone);
#endif
}

Scratch::~Scratch() {
#ifdef __SANITIZE_ADDRESS__
  if (base_) __asan_unpoison_memory_region(base_, size_);
#endif
  if (base_ && capacity_ <= kKept && capacity_ > kept.capacity) {
    std::swap(base_, kept.base);
    kept.capacity = capacity_;
  }
  std::free(base_);
}

static const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAmxBf16,  &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kBaseline,
};

const char* const* known_isas() {
  static const char* names[sizeof(kAll) / sizeof(*kAll) + 1] = {};
  for (size_t i = 0; i < sizeof(kAll) / sizeof(*kAll); i++) names[i] = kAll[i]->name;
  return names;
}

bool gemm_pays(const Kernels& kernels) {
#if defined(__x86_64__)
  return kernels.gemm && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const Kernels& choose_kernels(const char* requested) {
  bool any = !requested || !*requested;
  for (const Kernels* k : kAll) {
    if (!any && std::strcmp(requested, k->name) != 0) continue;
    if (k->supported()) return *k;
    if (!any)
      throw std::runtime_error(std::string("RNNKERN_CPU_ISA=") + requested +
                               ": this machine does not have that instruction set");
  }
  std::string names;
  for (const Kernels* k : kAll) names += std::string(names.empty() ? "" : ", ") + k->name;
  throw std::runtime_error(std::string("RNNKERN_CPU_ISA=") + requested + ": expected one of " + names);
}

}  // namespace rnnkern

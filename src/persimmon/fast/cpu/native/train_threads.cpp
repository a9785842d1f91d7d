#include "train_threads.h"

#include <memory>
#include <mutex>

#include "pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace persimmon {
namespace {

// Entry of GNU OpenMP's `#pragma omp parallel`, stable since GCC 4.9.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

void run_on_own_pool(int threads, void (*region)(void*), void* context) {
  static std::mutex mutex;
  static std::unique_ptr<Pool> pool;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!pool || pool->threads() != threads) pool = std::make_unique<Pool>(threads);
  pool->parallel_for(threads, 1, [&](int begin, int end, int) {
    for (; begin < end; begin++) region(context);
  });
}

}  // namespace

void run_region(int threads, void (*region)(void*), void* context) {
  static const Parallel parallel = find_openmp();
  if (parallel) parallel(region, context, static_cast<unsigned>(threads), 0);
  else run_on_own_pool(threads, region, context);
}

}  // namespace persimmon

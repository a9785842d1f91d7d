#include "pool.h"

#include <climits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace persimmon {
namespace {

constexpr int kSpins = 4000;         // about 50-100 us of pause instructions before sleeping
constexpr int kSpinsBeforeYield = 2000;  // then the waiting caller lets others run between looks

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
void sleep_while_equal(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void sleep_while_equal(std::atomic<uint32_t>&, uint32_t) { std::this_thread::yield(); }
void wake_all(std::atomic<uint32_t>&) {}
#endif

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_ = true;
  epoch_.fetch_add(1);
  wake_all(epoch_);
  for (std::thread& worker : workers_) worker.join();
}

void Pool::take_chunks(int thread) {
  for (;;) {
    const int begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
    if (begin >= job_.size) return;
    const int end = begin + job_.grain < job_.size ? begin + job_.grain : job_.size;
    job_.call(job_.context, begin, end, thread);
  }
}

void Pool::run(const Job& job) {
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1);  // publishes the job
  if (sleepers_.load()) wake_all(epoch_);
  take_chunks(0);
  for (int spins = 0; running_.load(std::memory_order_acquire); spins++)
    spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; spins++) {
      if (spins < kSpins) {
        pause();
        continue;
      }
      sleepers_.fetch_add(1);
      if (epoch_.load() == seen) sleep_while_equal(epoch_, seen);
      sleepers_.fetch_sub(1);
      spins = 0;
    }
    seen++;
    if (stop_.load()) return;
    take_chunks(thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace persimmon

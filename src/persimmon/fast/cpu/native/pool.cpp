#include "pool.h"

#include <climits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace persimmon {
namespace {

constexpr int kSpins = 500;    // pause instructions, 20-40 us, before the core is offered to others between looks
constexpr int kYields = 1000;  // looks of that kind before sleeping, some 300 us where nobody else wants the core

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

Pool::Pool(int threads) : runs_(std::make_unique<Run[]>(threads)) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_ = true;
  epoch_.fetch_add(1);
  wake_all(epoch_);
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::take_first(Run* run, int* chunk) {
  for (uint64_t left = run->left.load(std::memory_order_relaxed);;) {
    const uint32_t first = static_cast<uint32_t>(left), end = static_cast<uint32_t>(left >> 32);
    if (first >= end) return false;
    if (!run->left.compare_exchange_weak(left, left + 1, std::memory_order_relaxed)) continue;
    *chunk = static_cast<int>(first);
    return true;
  }
}

void Pool::wake() {
  if (workers_.empty()) return;
  awake_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1);
  if (sleepers_.load()) wake_all(epoch_);
}

bool Pool::take_last(Run* run, int* chunk) {
  for (uint64_t left = run->left.load(std::memory_order_relaxed);;) {
    const uint32_t first = static_cast<uint32_t>(left), end = static_cast<uint32_t>(left >> 32);
    if (first >= end) return false;
    if (!run->left.compare_exchange_weak(left, left - (uint64_t{1} << 32), std::memory_order_relaxed)) continue;
    *chunk = static_cast<int>(end - 1);
    return true;
  }
}

void Pool::take_chunks(int thread) {
  const auto run_chunk = [&](int chunk) {
    const int begin = chunk * job_.grain;
    job_.call(job_.context, begin, job_.size - begin > job_.grain ? begin + job_.grain : job_.size, thread);
  };
  int chunk;
  while (take_first(&runs_[thread], &chunk)) run_chunk(chunk);
  for (int other = 1; other < threads(); other++)
    while (take_last(&runs_[(thread + other) % threads()], &chunk)) run_chunk(chunk);
}

void Pool::run(const Job& job) {
  job_ = job;
  const uint64_t chunks = (static_cast<uint64_t>(job.size) + job.grain - 1) / job.grain, count = threads();
  for (uint64_t t = 0; t < count; t++)
    runs_[t].left.store(chunks * (t + 1) / count << 32 | chunks * t / count, std::memory_order_relaxed);
  members_.store(1, std::memory_order_release);  // open: publishes the job
  epoch_.fetch_add(1);
  if (sleepers_.load()) wake_all(epoch_);
  take_chunks(0);
  members_.fetch_sub(1);  // closed: nobody joins any more
  for (int spins = 0; members_.load(std::memory_order_acquire); spins++)
    spins < kSpins ? pause() : std::this_thread::yield();
}

// Become a member of the region that is open, if one is.
bool Pool::join() {
  uint32_t members = members_.load(std::memory_order_relaxed);
  while (members & 1)
    if (members_.compare_exchange_weak(members, members + 2, std::memory_order_acquire)) return true;
  return false;
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int looks = 0; epoch_.load(std::memory_order_acquire) == seen; looks++) {
      if (looks < kSpins) {
        pause();
      } else if (looks < kSpins + kYields || awake_.load(std::memory_order_relaxed)) {
        std::this_thread::yield();
      } else {
        sleepers_.fetch_add(1);
        if (epoch_.load() == seen) sleep_while_equal(epoch_, seen);
        sleepers_.fetch_sub(1);
        looks = 0;
      }
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    if (!join()) continue;
    take_chunks(thread);
    members_.fetch_sub(2, std::memory_order_release);
  }
}

}  // namespace persimmon

// Worker threads that stay awake between the many small parallel regions of a token.
//
// A region is cut into chunks that threads take from a shared counter, so that a core slowed by other work takes fewer of
// them. Between regions workers spin for a short while, then sleep in the kernel: a token of the 8B has about 250 regions,
// and waking a sleeping thread costs more than most of them. The calling thread works too. One region runs at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace persimmon {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(begin, end, thread) over chunks of at most `grain` of [0, n); returns when all are done.
  template <class Body>
  void parallel_for(int n, int grain, Body&& body) {
    if (n <= grain || workers_.empty()) {
      if (n > 0) body(0, n, 0);
      return;
    }
    const Job job = {&body, [](void* context, int begin, int end, int thread) {
                       (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end, thread);
                     }, n, grain};
    run(job);
  }

 private:
  struct Job {
    void* context;
    void (*call)(void* context, int begin, int end, int thread);
    int size, grain;
  };

  void run(const Job& job);
  void work(int thread);
  void take_chunks(int thread);

  Job job_ = {};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts regions; workers wait for it to change
  alignas(64) std::atomic<int> running_{0};     // workers still inside the region
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace persimmon

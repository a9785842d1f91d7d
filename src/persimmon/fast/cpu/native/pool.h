// Worker threads that stay awake between the many small parallel regions of a token.
//
// A region is cut into chunks. Every thread owns a run of neighbouring chunks and takes them in ascending order, so that it
// reads one stream: chunks dealt out in turns make each core fetch ahead into what the other is reading, which costs a
// quarter of the bandwidth (docs/LOG.md, 2026-11-26). Who is done takes chunks from the ends of the others' runs, so that a
// core slowed by other work does less. Between regions workers spin for a short while, then sleep in the kernel: a token of the 8B has about 250 regions,
// and waking a sleeping thread costs more than most of them. The calling thread works too. One region runs at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
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
  // The chunks that are left of a thread's run: the first in the low half, the end in the high half.
  struct alignas(64) Run {
    std::atomic<uint64_t> left{0};
  };

  void run(const Job& job);
  void work(int thread);
  void take_chunks(int thread);
  bool take_first(Run* run, int* chunk);
  bool take_last(Run* run, int* chunk);

  Job job_ = {};
  std::unique_ptr<Run[]> runs_;  // per thread
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts regions; workers wait for it to change
  alignas(64) std::atomic<int> running_{0};     // workers still inside the region
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace persimmon

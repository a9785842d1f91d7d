// Worker threads that stay awake between the many small parallel regions of a token.
//
// A region is cut into chunks. Every thread owns a run of neighbouring chunks and takes them in ascending order, so that it
// reads one stream: chunks dealt out in turns make each core fetch ahead into what the other is reading, which costs a
// quarter of the bandwidth (docs/LOG.md, 2026-11-26). Who is done takes chunks from the ends of the others' runs, so that a
// core slowed by other work does less.
// Workers join a region when they see it: the caller works too, waits at the end for those that have joined, and for
// nobody else, so a worker that has no core just now (a server and its clients share the machine) holds nothing up.
// Inside a call of the model (`Pool::Awake`) waiting workers spin, and after a while let others run between two looks;
// after it they do so for a short while longer, then sleep in the kernel: a token has dozens to hundreds of regions, and
// waking a sleeping thread costs more than most of them. One region runs at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace persimmon {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Workers do not sleep while one exists; regions outside of it run, only with more waking.
  class Awake {
   public:
    explicit Awake(Pool& pool) : pool_(pool) { pool_.wake(); }
    ~Awake() { pool_.awake_.store(false, std::memory_order_relaxed); }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    Pool& pool_;
  };

  // body(begin, end, thread) over chunks of at most `grain` of [0, n), a lone thread over all at once; returns when all are done.
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

  void wake();
  void run(const Job& job);
  void work(int thread);
  bool join();
  void take_chunks(int thread);
  bool take_first(Run* run, int* chunk);
  bool take_last(Run* run, int* chunk);

  Job job_ = {};
  std::unique_ptr<Run[]> runs_;  // per thread
  // The region: twice its workers, plus one while it is open to more of them. job_ changes only while it is 0.
  alignas(64) std::atomic<uint32_t> members_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts regions and wakings; workers wait for it to change
  std::atomic<bool> awake_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace persimmon

// Deals tasks out to the threads that PyTorch computes with.
//
// PyTorch's OpenMP threads spin for a while after each of its regions; threads of our own would compete with them for the
// cores. So a region runs on theirs where their library can be found in the process, and else on a pool of our own.
#pragma once
#include <atomic>

namespace persimmon {

// Calls region(context) on `threads` threads at once, this one among them; returns when all are done.
void run_region(int threads, void (*region)(void*), void* context);

// body(task, thread) for every task of [0, n), each taken by whichever thread is free; thread is in [0, threads).
template <class Body>
void for_tasks(int threads, int n, Body&& body) {
  struct Shared {
    Body& body;
    int size;
    std::atomic<int> next{0}, entered{0};
  } shared = {body, n};
  auto region = [](void* context) {
    Shared& s = *static_cast<Shared*>(context);
    const int thread = s.entered.fetch_add(1);
    for (int task; (task = s.next.fetch_add(1)) < s.size;) s.body(task, thread);
  };
  if (threads <= 1 || n <= 1) region(&shared);
  else run_region(threads, region, &shared);
}

}  // namespace persimmon

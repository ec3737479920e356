// Loops over threads.
//
// A small pool beside torch's. Its threads stay awake for a few microseconds after a loop, long enough for the next
// layer of a model, then sleep; and a caller never waits for a thread that has not begun. Running on torch's own
// OpenMP threads would be a little faster when nothing else runs, but its barriers wait for every thread: with another
// process on one of the cores, a call takes a whole time slice of the system (docs/log.md).
#pragma once
#include <functional>

namespace bitstrata {

// body(begin, end) over pieces of 0..count-1, taken by up to `threads` threads as they become free. If it throws in any
// of them, pieces that nobody has begun are left out and the caller gets the first exception.
void parallel_for(int threads, int count, const std::function<void(int, int)>& body);

// While one lives, threads that wait for loops do not fall asleep: for many short loops with a little work between them.
class Awake {
 public:
  explicit Awake(int threads);
  ~Awake();
  Awake(const Awake&) = delete;

 private:
  void* pool_;  // the one that is told; a fork leaves it behind
};

}  // namespace bitstrata

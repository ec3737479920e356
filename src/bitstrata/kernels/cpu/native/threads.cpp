#include "threads.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace bitstrata {
namespace {

struct Loop {
  const std::function<void(int, int)>& body;
  int count, threads;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // the first one; read when all threads are out of the loop

  // Pieces shrink towards the end: few at first, yet nobody waits long for the last one. An exception ends the loop
  // for all threads: it must reach the caller, and leaving a thread of the pool it would end the process.
  void run() noexcept {
    int begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const int piece = std::max(1, (count - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, begin + piece)) continue;
      try {
        body(begin, begin + piece);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(count);
      }
      begin = next.load(std::memory_order_relaxed);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that wait for work a few microseconds awake, then asleep. The caller works too, and waits only for threads
// that have begun: one that the system does not let run costs its share of the speed, never a time slice.
class Pool {
 public:
  void run(Loop& loop) {
    std::unique_lock<std::mutex> one_caller(callers_, std::try_to_lock);
    if (!one_caller) {  // another thread's loop has the pool
      loop.run();
      return;
    }
    grow(loop.threads - 1);
    loop_.store(&loop, std::memory_order_relaxed);
    places_.store(loop.threads - 1);  // opens the loop
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (sleeping_ > 0) wake_.notify_all();
    }
    loop.run();
    // close it: who has not taken a place by now has nothing to do
    int places = places_.load();
    while (!places_.compare_exchange_weak(places, places | kClosed)) {
    }
    while (working_.load(std::memory_order_acquire) > 0) pause();
  }

  void stay_awake(int threads) {
    awake_.fetch_add(1);
    std::unique_lock<std::mutex> one_caller(callers_, std::try_to_lock);
    if (one_caller) grow(threads - 1);
    std::lock_guard<std::mutex> lock(mutex_);
    if (sleeping_ > 0) wake_.notify_all();
  }

  void may_sleep() { awake_.fetch_sub(1); }

 private:
  static constexpr int kClosed = 1 << 30;
  static constexpr std::chrono::microseconds kAwake{50};

  // Where the system grants no more threads, those that there are do the work.
  void grow(int count) {
    try {
      while (int(threads_.size()) < count) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
    }
  }

  // A place in the open loop, if there is one.
  bool enter() {
    working_.fetch_add(1);  // before the place is taken, so that the caller sees it when it closes
    int places = places_.load();
    while (places > 0 && places < kClosed)
      if (places_.compare_exchange_weak(places, places - 1)) return true;
    working_.fetch_sub(1, std::memory_order_release);
    return false;
  }

  bool open() const {
    const int places = places_.load(std::memory_order_relaxed);
    return places > 0 && places < kClosed;
  }

  bool awake() const { return awake_.load(std::memory_order_relaxed) > 0; }

  void work() {
    while (true) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      while (!open() && (awake() || std::chrono::steady_clock::now() < until)) pause();
      if (!open()) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [this] { return open() || awake(); });
        --sleeping_;
      }
      if (enter()) {
        loop_.load(std::memory_order_relaxed)->run();
        working_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<Loop*> loop_{nullptr};
  std::atomic<int> places_{0}, working_{0}, awake_{0};
  int sleeping_ = 0;
};

Pool* pool = new Pool;  // never destroyed: its threads sleep until the process ends

#if !defined(_WIN32)
// A fork copies the pool and not its threads: locks that they hold and waiters that will never wake. The child gets a
// new one and leaves the copy alone; the thread that forked was not inside a loop.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

}  // namespace

Awake::Awake(int threads) : pool_(threads > 1 ? pool : nullptr) {
  if (pool_) static_cast<Pool*>(pool_)->stay_awake(threads);
}

Awake::~Awake() {
  if (pool_) static_cast<Pool*>(pool_)->may_sleep();
}

void parallel_for(int threads, int count, const std::function<void(int, int)>& body) {
  threads = std::min(threads, count);
  if (count <= 0) return;
  if (threads <= 1) {
    body(0, count);
    return;
  }
  Loop loop{body, count, threads};
  pool->run(loop);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace bitstrata

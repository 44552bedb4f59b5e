// A team of threads for one call, and memory for its buffers.
#pragma once

#include <barrier>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <latch>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace wsss {

// One member of a team: its number, and the meeting point of all.
struct Member {
  int index, size;
  std::barrier<>* barrier;
  void meet() const { barrier->arrive_and_wait(); }
  // The rows [first, last) of `rows` that are this member's. Results do not depend on the split.
  int first(int rows) const { return int(std::ptrdiff_t(rows) * index / size); }
  int last(int rows) const { return int(std::ptrdiff_t(rows) * (index + 1) / size); }
};

// Run `work` on up to `threads` threads, the caller being one of them; fewer if the system gives fewer.
// `work` must not throw: allocate before.
inline void run_team(int threads, const std::function<void(Member)>& work) {
  std::unique_ptr<std::barrier<>> barrier;
  int size = 1;
  std::latch started(1);
  std::vector<std::thread> others;
  others.reserve(std::size_t(threads));
  try {
    for (int index = 1; index < threads; ++index)
      others.emplace_back([&, index] {
        started.wait();
        work({index, size, barrier.get()});
      });
  } catch (const std::system_error&) {
    // The team goes on with the threads that it has.
  }
  size = int(others.size()) + 1;
  barrier = std::make_unique<std::barrier<>>(size);
  started.count_down();
  work({0, size, barrier.get()});
  for (std::thread& thread : others) thread.join();
}

// Memory on 2 MB borders; large buffers ask for huge pages, which saves thousands of page faults a call.
template <class S>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) {
    constexpr std::size_t huge = std::size_t(2) << 20;
    const std::size_t bytes = count * sizeof(S);
    const std::size_t border = bytes < 4 * huge ? 64 : huge;
    const std::size_t size = (bytes + border - 1) / border * border;
    data_.reset(static_cast<S*>(std::aligned_alloc(border, size ? size : border)));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (border == huge) madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
  }
  S* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<S, Free> data_;
};

}  // namespace wsss

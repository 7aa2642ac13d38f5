// One block of CUDA threads on the CPU: each thread a fiber that runs until its next barrier, in an order drawn from a seed.
//
// What a kernel must not rely on is made to differ: shared memory starts as garbage, threads between two barriers run one after another
// in any order, so a value read before the barrier that should guard it is mostly not there yet. Threads that wait at different
// barriers, or a warp of which some lanes never come, end the process with a message. One block at a time, on one core.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

namespace on_cpu {

struct Index {
  unsigned x;
};
enum class Wait { nothing, block, warp, over };

struct Fiber {
  Index thread;
  Wait wait = Wait::nothing;
  int line = 0;  // of the barrier it waits at
  bool started = false;
  jmp_buf at;
  ucontext_t context;
  std::vector<char> stack;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline jmp_buf scheduler;
inline ucontext_t home;
inline Index block, threads;
inline std::function<void()> body;
inline std::vector<unsigned char> memory;
inline std::vector<std::vector<unsigned char>> lanes;  // what the lanes of each warp show each other
constexpr size_t STACK = 96 << 10, GUARD = 256;

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "CUDA on the CPU: %s, block %u, thread %u, line %d\n", what, block.x, current ? current->thread.x : 0, line);
  std::abort();
}

inline void wait(Wait kind, int line) {
  current->wait = kind, current->line = line;
  if (setjmp(current->at) == 0) longjmp(scheduler, 1);
}

inline void enter() {
  body();
  current->wait = Wait::over;
  longjmp(scheduler, 1);
}

// Lets those go on who all wait for each other; whether there were any.
inline bool release(size_t begin, size_t end, Wait kind) {
  int line = -1;
  for (size_t i = begin; i < end; i++) {
    if (fibers[i].wait == Wait::over && kind == Wait::block) continue;
    if (fibers[i].wait != kind) return false;
    if (line >= 0 && fibers[i].line != line) fail("threads of one barrier wait at different lines", fibers[i].line);
    line = fibers[i].line;
  }
  for (size_t i = begin; i < end; i++)
    if (fibers[i].wait == kind) fibers[i].wait = Wait::nothing;
  return line >= 0;
}

template <class F>
void run(unsigned blocks, unsigned block_threads, size_t shared_bytes, unsigned seed, F kernel) {
  std::mt19937 random(seed);
  threads = {block_threads};
  lanes.assign(block_threads / 32, std::vector<unsigned char>(32 * 8));
  body = kernel;
  fibers = std::vector<Fiber>(block_threads);
  for (Fiber& f : fibers) f.stack.resize(STACK);
  std::vector<unsigned> order(block_threads);
  for (block.x = 0; block.x < blocks; block.x++) {
    memory.assign(shared_bytes + GUARD, 0xa5);
    for (unsigned i = 0; i < block_threads; i++) order[i] = i, fibers[i].thread = {i}, fibers[i].wait = Wait::nothing, fibers[i].started = false;
    for (bool any = true; any;) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order) {
        current = &fibers[i];
        if (current->wait != Wait::nothing) continue;
        if (setjmp(scheduler) == 0) {
          if (current->started) longjmp(current->at, 1);
          current->started = true;
          getcontext(&current->context);
          current->context.uc_stack.ss_sp = current->stack.data();
          current->context.uc_stack.ss_size = STACK;
          current->context.uc_link = nullptr;
          makecontext(&current->context, enter, 0);
          setcontext(&current->context);
        }
      }
      any = release(0, block_threads, Wait::block);
      for (unsigned w = 0; w < block_threads; w += 32) any |= release(w, w + 32, Wait::warp);
      if (!any)
        for (const Fiber& f : fibers)
          if (f.wait != Wait::over) fail("a barrier that not all threads reach", f.line);
    }
    for (size_t i = shared_bytes; i < memory.size(); i++)
      if (memory[i] != 0xa5) fail("a write beyond the shared memory", 0);
  }
}

// Every lane shows x; what lane `from` showed.
template <class X>
X shuffle(X x, int from, int line) {
  const unsigned lane = current->thread.x % 32;
  unsigned char* shown = lanes[current->thread.x / 32].data();
  std::memcpy(shown + 8 * lane, &x, sizeof x);
  wait(Wait::warp, line);
  X y = x;
  if (from >= 0 && from < 32) std::memcpy(&y, shown + 8 * from, sizeof y);
  wait(Wait::warp, line);
  return y;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::current->thread)
#define blockIdx (on_cpu::block)
#define blockDim (on_cpu::threads)
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define EK_SHARED(name) unsigned char* name = on_cpu::memory.data()
#define __syncthreads() on_cpu::wait(on_cpu::Wait::block, __LINE__)
#define __shfl_xor_sync(mask, value, by) on_cpu::shuffle(value, int(threadIdx.x % 32) ^ (by), __LINE__)
#define __shfl_up_sync(mask, value, by) on_cpu::shuffle(value, int(threadIdx.x % 32) - (by), __LINE__)

using std::max;
using std::min;

template <class X>
X atomicAdd(X* x, X by) {
  const X old = *x;
  *x += by;
  return old;
}
inline int atomicMax(int* x, int y) {
  const int old = *x;
  *x = std::max(old, y);
  return old;
}
inline int atomicOr(int* x, int y) {
  const int old = *x;
  *x |= y;
  return old;
}

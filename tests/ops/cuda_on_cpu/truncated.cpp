// csrc/truncated.cuh compiled for the CPU, for test_truncated_cuda.py to call: what truncated.cu launches, on plain pointers.

#include "block.h"

#include "../../../csrc/truncated.cuh"

namespace {

template <class In>
void counts(const Rows& a, unsigned threads, unsigned seed) {
  const size_t bytes = sizeof(CountMemory) + 8 * size_t(a.window_high - a.window_low);
  on_cpu::run(unsigned(a.R), threads, bytes, seed, [a] { by_counts<In>(a); });
}

template <class In>
void keys(const Rows& a, unsigned threads, unsigned seed) {
  on_cpu::run(unsigned(a.R), threads, sizeof(KeyMemory), seed, [a] { by_keys<In>(a); });
}

}  // namespace

extern "C" int key_memory() { return sizeof(KeyMemory); }
extern "C" int count_memory() { return sizeof(CountMemory); }

// dtype: 0 float64, 1 float32, 2 bfloat16, 3 float16; a null pending is by_keys alone.
extern "C" void truncated_rows(int dtype, int64_t R, int64_t V, int64_t z_row, const void* z, const int64_t* y, const void* tau, const int64_t* k,
                               const double* p, void* threshold, int* pending, void** out, int64_t* count, int window_low, int window_high,
                               unsigned threads, unsigned seed) {
  Rows a{};
  a.R = R, a.V = int(V), a.z_row = z_row, a.z = z, a.y = y, a.tau = tau, a.k = k, a.p = p, a.threshold = threshold;
  a.count = count, a.pending = pending, a.window_low = window_low, a.window_high = window_high;
  for (int i = 0; i < 5; i++) a.out[i] = out[i];
  if (pending != nullptr && dtype == 2) counts<BFloat16>(a, threads, seed);
  if (pending != nullptr && dtype == 3) counts<Float16>(a, threads, seed);
  if (dtype == 0) keys<double>(a, threads, seed);
  if (dtype == 1) keys<float>(a, threads, seed);
  if (dtype == 2) keys<BFloat16>(a, threads, seed);
  if (dtype == 3) keys<Float16>(a, threads, seed);
}

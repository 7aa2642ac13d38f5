// What a block of threads does together with one row: reading it 16 bytes at a time, sums, and the crossing of a target.
//
// Sums go down a fixed tree, and where their order shows element j of a row always falls to the same thread: a row gives the same bits
// wherever it lies and whatever stands beside it. Only integers are added atomically. EK_SHARED(name) declares the block's dynamic shared memory.

#pragma once

#include <cstdint>

#define EK_DEVICE __device__ __forceinline__

constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr int MOST_WARPS = 32;

// Two bytes each, told apart by the type alone.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
EK_DEVICE To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "not the same bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

EK_DEVICE double widen(double x) { return x; }
EK_DEVICE float widen(float x) { return x; }
EK_DEVICE float widen(BFloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

// Shifted into place and scaled by 2^112, which is right for subnormals too; infinities and NaNs keep their exponent.
EK_DEVICE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t scaled = same_bits<uint32_t>(same_bits<float>(magnitude << 13) * 0x1p112f);
  return same_bits<float>(scaled | (magnitude >= 0x7c00u ? 0x7f800000u : 0u) | uint32_t(x.bits & 0x8000u) << 16);
}

template <class In>
struct Wide {
  using Number = float;
  using Key = uint32_t;
};
template <>
struct Wide<double> {
  using Number = double;
  using Key = uint64_t;
};

// A number as an integer of the same order; −0 and 0 are one.
EK_DEVICE uint32_t key_of(float x) {
  const uint32_t b = same_bits<uint32_t>(x == 0 ? 0.0f : x);
  return b >> 31 ? ~b : b | 0x80000000u;
}
EK_DEVICE uint64_t key_of(double x) {
  const uint64_t b = same_bits<uint64_t>(x == 0 ? 0.0 : x);
  return b >> 63 ? ~b : b | 0x8000000000000000u;
}
EK_DEVICE float number_of(uint32_t key) { return same_bits<float>(key >> 31 ? key & 0x7fffffffu : ~key); }
EK_DEVICE double number_of(uint64_t key) { return same_bits<double>(key >> 63 ? key & 0x7fffffffffffffffu : ~key); }

template <class In>
struct alignas(16) Pack {
  static constexpr int n = 16 / sizeof(In);
  In lane[n];
};

// DEEP packs of a row, `step` apart: as many loads of 16 bytes under way where the row is aligned to them.
template <int DEEP, class In>
EK_DEVICE void load(Pack<In>* pack, const In* z, int at, int step, bool aligned) {
  constexpr int E = Pack<In>::n;
  if (aligned) {
#pragma unroll
    for (int d = 0; d < DEEP; d++) pack[d] = *reinterpret_cast<const Pack<In>*>(z + int64_t(at + d * step) * E);
  } else {
#pragma unroll
    for (int d = 0; d < DEEP; d++)
#pragma unroll
      for (int e = 0; e < E; e++) pack[d].lane[e] = z[int64_t(at + d * step) * E + e];
  }
}

template <int DEEP, class In, class F>
EK_DEVICE void each_of(const In* z, int V, bool aligned, F f) {
  constexpr int E = Pack<In>::n;
  const int packs = V / E, step = blockDim.x;
  Pack<In> pack[DEEP];
  int i = threadIdx.x;
  for (; i + (DEEP - 1) * step < packs; i += DEEP * step) {
    load<DEEP>(pack, z, i, step, aligned);
#pragma unroll
    for (int d = 0; d < DEEP; d++)
#pragma unroll
      for (int e = 0; e < E; e++) f(pack[d].lane[e]);
  }
  for (; DEEP > 1 && i < packs; i += step) {
    load<1>(pack, z, i, step, aligned);
#pragma unroll
    for (int e = 0; e < E; e++) f(pack[0].lane[e]);
  }
  for (int64_t j = int64_t(packs) * E + threadIdx.x; j < V; j += step) f(z[j]);
}

// f(z[j]) for all j, each by one thread, which depends on j alone: for sums whose order shows.
template <int DEEP, class In, class F>
EK_DEVICE void each(const In* z, int V, F f) {
  each_of<DEEP>(z, V, reinterpret_cast<uintptr_t>(z) % 16 == 0, f);
}

// The same from the first 16-byte border on, and what is before it apart: wherever the row lies, its loads are wide.
template <int DEEP, class In, class F>
EK_DEVICE void each_in_any_order(const In* z, int V, F f) {
  const int before = min(V, int((16 - reinterpret_cast<uintptr_t>(z) % 16) % 16 / sizeof(In)));
  if (int(threadIdx.x) < before) f(z[threadIdx.x]);
  each_of<DEEP>(z + before, V - before, true, f);
}

// op over the threads of the block, the same bits for every one of them. `slots` holds one X per warp.
template <class X, class Op>
EK_DEVICE X over_block(X x, X* slots, Op op) {
  for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(EVERY_LANE, x, d));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  X all = slots[0];
  for (unsigned w = 1; w < blockDim.x / 32; w++) all = op(all, slots[w]);
  __syncthreads();  // the slots are free again
  return all;
}

struct Sum {
  template <class X>
  EK_DEVICE X operator()(X x, X y) const {
    return x + y;
  }
};
struct Largest {
  template <class X>
  EK_DEVICE X operator()(X x, X y) const {
    return x > y ? x : y;
  }
};
struct Smallest {
  template <class X>
  EK_DEVICE X operator()(X x, X y) const {
    return x < y ? x : y;
  }
};

// What all threads need of each other.
struct Together {
  double slots[MOST_WARPS];
  uint64_t keys[MOST_WARPS];
  double above;
  int bin;
  int flags;
};

// Σ x of the threads before this one.
EK_DEVICE double sum_before(double x, double* slots) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double up_to = x;
  for (int d = 1; d < 32; d *= 2) {
    const double left = __shfl_up_sync(EVERY_LANE, up_to, d);
    if (lane >= d) up_to += left;
  }
  const double left = __shfl_up_sync(EVERY_LANE, up_to, 1);
  if (lane == 31) slots[warp] = up_to;
  __syncthreads();
  double before = lane == 0 ? 0 : left;
  for (int w = 0; w < warp; w++) before += slots[w];
  __syncthreads();
  return before;
}

// Bins [begin, end) are this thread's: an odd number, so that 32 threads meet 32 banks.
struct Share {
  int begin, end;
};
EK_DEVICE Share share_of(int bins) {
  const int size = (bins + int(blockDim.x) - 1) / int(blockDim.x) | 1;
  const int begin = min(int(threadIdx.x) * size, bins);
  return {begin, min(begin + size, bins)};
}

// The last occupied bin with less than `target` above it, and what is above it; with SHARE the target is that share of all bins.
// `weight(b)` is what occupied bin b holds.
struct Crossing {
  int bin;
  double above;
};
template <bool SHARE, class Weight>
EK_DEVICE Crossing crossing(Together& t, const uint32_t* counts, int bins, double base, double target, Weight weight) {
  const Share share = share_of(bins);
  double mine = 0;
  int found = -1;  // first the last of the thread's occupied bins
  for (int b = share.begin; b < share.end; b++)
    if (counts[b]) mine += weight(b), found = b;
  if (SHARE) target *= over_block(mine, t.slots, Sum());
  double above = base + sum_before(mine, t.slots), above_found = 0;
  if (!(above < target)) {
    found = -1;
  } else if (above + mine < target) {  // it is not crossed here: no need to weigh the bins again
    if (found >= 0) above_found = above + (mine - weight(found));
  } else {
    for (int b = share.begin; b < share.end && above < target; b++)
      if (counts[b]) found = b, above_found = above, above += weight(b);
  }
  if (threadIdx.x == 0) t.bin = -1;
  __syncthreads();
  if (found >= 0) atomicMax(&t.bin, found);
  __syncthreads();
  if (found >= 0 && found == t.bin) t.above = above_found;
  __syncthreads();
  return {t.bin, t.above};  // not written again before the barriers of the next sum
}

// Top-k and top-p of rows on a GPU, one block per row: the threshold and the values of entropy_kernels/ops/truncated.py beside it.
//
// Nothing is sorted. Two kernels, and which of them serves a row depends on that row alone:
//
// by_counts, for 16-bit logits, reads the row once. Every number of the dtype within a window has a bin of its own in shared memory,
//   and the row is counted into them. All else is a matter of a few thousand distinct numbers: masses are count × e^{(z − peak)/τ} in double,
//   top-k and top-p are prefix sums over bins, entropies sums. A row with other numbers than those of the window, 0 and what has no weight is
//   left pending. Where a number of no bin was met, the row is read once more to see which.
// by_keys, for wider dtypes and pending rows, finds thresholds by radix passes over order-preserving integer keys: counts, or masses, of
//   BINS equal intervals of keys, then the same again inside the interval that holds the threshold. A bin's mass is a sum of integers,
//   each e^{(z − top of the bin)/τ} in fixed point, so it does not depend on the order of the atomics.
//
// Arithmetic is in double throughout. Sums never contain the peak itself (weight 1, coordinate 0): peaked rows keep their digits.
// Legend: z logits, y target, k, p, τ of a row; c = (z − z_peak)/τ with the peak of the part in question; a part is the kept set or the tail.

#pragma once

#include "block.cuh"

struct Rows {
  int64_t R, z_row;  // rows; elements from one to the next
  int V;
  const void *z, *tau;         // τ float, double for double logits; the outputs likewise
  const int64_t *y, *k;        // y < 0: no target
  const double* p;
  void *threshold, *out[5];    // [R]; entropy, logprob, kept mass, tail entropy, full entropy, or null for the threshold alone
  int64_t* count;
  int* pending;                // [R]: by_counts writes whether by_keys has to do the row; null for by_keys alone
  int window_low, window_high;  // magnitudes with a bin, as bits of the 16-bit dtype: [low, high), 0 has a bin anyway
};

constexpr int COUNTING_THREADS = 512;  // the most; half of them where the bins leave room for more blocks
constexpr int KEY_THREADS = 256, BINS = 2048;
template <class In>
constexpr int DEEP = sizeof(In) > 2 ? 2 : 1;
constexpr double NO_WEIGHT = 200;  // e^{−200} is below the last digit of all that is written in float

// One part of a row: Σ e^c and Σ e^c c of all its tokens but one at its peak. No token: the peak is −∞.
struct Part {
  double peak, others, weighted;
};

EK_DEVICE double entropy_of(const Part& x) { return log1p(x.others) - x.weighted / (1 + x.others); }

// Thread 0 writes the row. A row without a law (NaN peak) keeps nothing.
template <class In>
EK_DEVICE void write_row(const Rows& a, int64_t r, double threshold, const Part& kept, const Part& tail, int64_t count) {
  using T = typename Wide<In>::Number;
  if (threadIdx.x != 0) return;
  static_cast<T*>(a.threshold)[r] = T(threshold);
  if (a.count == nullptr) return;
  const double inv_tau = 1 / double(static_cast<const T*>(a.tau)[r]), infinity = HUGE_VAL, nan = kept.peak - kept.peak;
  const int64_t y = a.y[r];
  double logprob = 0;
  if (y >= 0) {
    logprob = NAN;
    if (y < a.V && nan == 0) {
      const double z_y = double(widen((static_cast<const In*>(a.z) + r * a.z_row)[y]));
      logprob = z_y >= threshold ? (z_y - kept.peak) * inv_tau - log1p(kept.others) : -infinity;
    }
  }
  Part full = kept;
  double mass = 1 + nan, tail_entropy = nan;
  if (tail.peak > -infinity) {
    const double shift = (tail.peak - kept.peak) * inv_tau, scale = exp(shift), weight = 1 + tail.others;
    full.others += scale * weight;
    if (scale > 0) full.weighted += scale * (tail.weighted + shift * weight);
    mass = (1 + kept.others) / (1 + full.others);
    tail_entropy = entropy_of(tail);
  }
  const double found[5] = {entropy_of(kept), logprob, mass, tail_entropy, entropy_of(full)};
  for (int i = 0; i < 5; i++) static_cast<T*>(a.out[i])[r] = T(found[i]);
  a.count[r] = count;
}

template <class In>
EK_DEVICE void write_lawless(const Rows& a, int64_t r) {
  const Part none{NAN, NAN, NAN};
  write_row<In>(a, r, NAN, none, Part{-HUGE_VAL, 0, 0}, 0);
}

// ---------------------------------------------------------------------------------------------------------------- by keys

struct KeyMemory {
  Together together;
  uint32_t counts[BINS];
  unsigned long long masses[BINS];
  uint64_t list[BINS];  // keys, in any order: nothing that is made of them depends on it
};

// The threshold of a row, and the largest key below it that a token has: 0 if there is none, or not `known`.
template <class Key>
struct Found {
  Key threshold, next;
  bool known;
};

// The smallest key in [low, high] that a token has and that less than `target` is above it: in number, or with MASS in weight, where the
// target is a share of what the keys from `law` on weigh. Intervals are halved 11 times at each read of the row; an interval of BINS
// tokens or fewer is copied out and searched on in shared memory. `counted`: bins of [low, high] are already filled.
template <bool MASS, class In, class Key>
EK_DEVICE Found<Key> search(KeyMemory& m, const In* z, int V, Key low, Key high, Key law, double target, double peak, double inv_tau,
                            bool counted) {
  using T = typename Wide<In>::Number;
  Together& t = m.together;
  Key* list = reinterpret_cast<Key*>(m.list);
  Key* keys = reinterpret_cast<Key*>(t.keys);
  int bits = 63;  // V of the largest weight, 2^bits, do not overflow
  while (int64_t(V) >> (63 - bits)) bits--;
  const double one = double(1ull << bits);
  double above = 0;
  int listed = -1;  // how many keys the list has, −1 before it has any
  Key below = 0;    // the largest key below those of the list
  for (bool first = true;; first = false, counted = false) {
    int shift = 0;
    while (((high - low) >> shift) >= Key(BINS)) shift++;
    const int bins = int((high - low) >> shift) + 1;
    if (!counted) {
      for (int b = threadIdx.x; b < bins; b += blockDim.x) {
        m.counts[b] = 0;
        if (MASS) m.masses[b] = 0;
      }
      __syncthreads();
      double total = 0;
      auto count = [&](Key key) {
        if (MASS && first && key >= law) total += exp((double(number_of(key)) - peak) * inv_tau);
        if (key < low || key > high) return;
        const int b = int((high - key) >> shift);
        atomicAdd(&m.counts[b], 1u);
        if (MASS) {
          const double top = number_of(Key(high - (Key(b) << shift)));
          const double e = exp((double(number_of(key)) - top) * inv_tau);
          atomicAdd(&m.masses[b], static_cast<unsigned long long>(e * one + 0.5));
        }
      };
      if (listed < 0) {
        if (MASS) each<1>(z, V, [&](In x) { count(key_of(widen(x))); });
        else each_in_any_order<DEEP<In>>(z, V, [&](In x) { count(key_of(widen(x))); });
      } else {
        for (int i = threadIdx.x; i < listed; i += blockDim.x) count(list[i]);
      }
      if (MASS && first) target *= over_block(total, t.slots, Sum());
      __syncthreads();
    }
    const Crossing c = crossing<false>(t, m.counts, bins, above, target, [&](int b) {
      if (!MASS) return double(m.counts[b]);
      return double(m.masses[b]) / one * exp((double(number_of(Key(high - (Key(b) << shift)))) - peak) * inv_tau);
    });
    const uint32_t inside = m.counts[c.bin];
    above = c.above;
    high -= Key(c.bin) << shift;
    const Key span = (Key(1) << shift) - 1;
    if (high - low > span) low = high - span;
    if (shift == 0) break;
    __syncthreads();  // counts are free again
    if (listed >= 0 || inside > uint32_t(BINS)) continue;
    if (threadIdx.x == 0) t.flags = 0;
    __syncthreads();
    each_in_any_order<DEEP<In>>(z, V, [&](In x) {
      const T v = widen(x);
      const Key key = key_of(v);
      if (key > high || !(v > -T(HUGE_VAL))) return;
      if (key >= low) list[atomicAdd(&t.flags, 1)] = key;
      else if (key > below) below = key;
    });
    below = over_block(below, keys, Largest());
    listed = t.flags;
  }
  if (listed >= 0) {
    for (int i = threadIdx.x; i < listed; i += blockDim.x)
      if (list[i] < high && list[i] > below) below = list[i];
    below = over_block(below, keys, Largest());
  }
  return {high, below, listed >= 0};
}

template <class In>
__global__ void __launch_bounds__(KEY_THREADS, 3) by_keys(Rows a) {
  using T = typename Wide<In>::Number;
  using Key = typename Wide<In>::Key;
  EK_SHARED(memory);
  KeyMemory& m = *reinterpret_cast<KeyMemory*>(memory);
  Together& t = m.together;
  const int64_t r = blockIdx.x;
  if (a.pending != nullptr && a.pending[r] == 0) return;
  const In* z = static_cast<const In*>(a.z) + r * a.z_row;
  const int V = a.V;
  const int64_t k = a.k[r];
  const double tau = double(static_cast<const T*>(a.tau)[r]), inv_tau = 1 / tau, p = a.p[r];

  // The largest and the smallest key of a number above −∞ and how many there are; is there a NaN; for top-k, counts of all keys by 11 bits
  const bool few = k < V;
  constexpr int SHIFT = 8 * sizeof(Key) - 11;
  static_assert(BINS == 1 << 11, "the first digit of a key fills the bins");
  for (int b = threadIdx.x; few && b < BINS; b += blockDim.x) m.counts[b] = 0;
  __syncthreads();
  Key high = 0, low = ~Key(0);
  int finite = 0, nan = 0;
  each_in_any_order<DEEP<In>>(z, V, [&](In x) {
    const T v = widen(x);
    const Key key = key_of(v);
    nan |= v != v;
    if (few) atomicAdd(&m.counts[int(~key >> SHIFT)], 1u);
    if (!(v > -T(HUGE_VAL))) return;
    high = key > high ? key : high, low = key < low ? key : low;
    finite++;
  });
  Key* keys = reinterpret_cast<Key*>(t.keys);
  int* numbers = reinterpret_cast<int*>(t.keys);
  high = over_block(high, keys, Largest()), low = over_block(low, keys, Smallest());
  finite = over_block(finite, numbers, Sum()), nan = over_block(nan, numbers, Largest());
  const double peak = double(number_of(high));
  const bool lawful = !nan && finite > 0 && peak < HUGE_VAL && tau > 0 && tau < HUGE_VAL && k > 0 && p > 0;
  if (!lawful) return write_lawless<In>(a, r);

  Found<Key> found{low, 0, true};
  if (k < finite) found = search<false>(m, z, V, Key(0), Key(~Key(0)), low, double(k), peak, inv_tau, true);
  __syncthreads();
  if (p < 1) {
    // V tokens of weight e^{−reach} have less than (1 − p) of the mass: none of them crosses
    const double reach = log(double(V) / (1 - p)) + 1;
    const Key least = key_of(T(peak - reach * tau)) - 1, law = found.threshold;
    const Key from = least > law ? least : law;
    found = search<true>(m, z, V, from < high ? from : high, high, law, p, peak, inv_tau, false);
  }
  const Key threshold = found.threshold;
  const double z_threshold = double(number_of(threshold));
  if (a.count == nullptr) return write_row<In>(a, r, z_threshold, Part{peak, 0, 0}, Part{-HUGE_VAL, 0, 0}, 0);

  if (!found.known) {
    each_in_any_order<DEEP<In>>(z, V, [&](In x) {
      const T v = widen(x);
      const Key key = key_of(v);
      if (v > -T(HUGE_VAL) && key < threshold && key > found.next) found.next = key;
    });
    found.next = over_block(found.next, keys, Largest());
  }
  const double tail_peak = found.next > 0 ? double(number_of(found.next)) : -HUGE_VAL;
  const double peaks[2] = {peak, tail_peak};  // kept, tail
  double others[2] = {0, 0}, weighted[2] = {0, 0};
  int at_peak[2] = {0, 0}, count = 0;
  each<1>(z, V, [&](In x) {
    const T v = widen(x);
    if (!(v > -T(HUGE_VAL))) return;
    const bool kept = key_of(v) >= threshold;
    const double origin = kept ? peak : tail_peak;
    const double c = (double(v) - origin) * inv_tau, e = exp(c), ec = e > 0 ? e * c : 0;
    const bool tied = double(v) == origin;
    count += kept;
    at_peak[0] += kept && tied, at_peak[1] += !kept && tied;
    others[0] += kept && !tied ? e : 0, weighted[0] += kept ? ec : 0;
    others[1] += !kept && !tied ? e : 0, weighted[1] += kept ? 0 : ec;
  });
  count = over_block(count, numbers, Sum());
  Part part[2];
  for (int i = 0; i < 2; i++) {
    const int tied = over_block(at_peak[i], numbers, Sum());
    part[i].peak = peaks[i];
    part[i].others = over_block(others[i], t.slots, Sum()) + (tied - 1);
    part[i].weighted = over_block(weighted[i], t.slots, Sum());
  }
  write_row<In>(a, r, z_threshold, part[0], part[1], count);
}

// ---------------------------------------------------------------------------------------------------------------- by counts

struct CountMemory {
  Together together;
  uint32_t counts[3];  // and 2 (high − low) more: what is above the window, its numbers from the largest down, what is below
};

constexpr int HAS_NAN = 1, OUTSIDE = 2;  // what a row has: a NaN; a number that has no bin and is not below the window

EK_DEVICE uint32_t bits_of_infinity(BFloat16) { return 0x7f80u; }
EK_DEVICE uint32_t bits_of_infinity(Float16) { return 0x7c00u; }

template <class In>
__global__ void __launch_bounds__(COUNTING_THREADS, 2) by_counts(Rows a) {
  EK_SHARED(memory);
  CountMemory& m = *reinterpret_cast<CountMemory*>(memory);
  Together& t = m.together;
  uint32_t* counts = m.counts + 1;
  const int64_t r = blockIdx.x;
  const In* z = static_cast<const In*>(a.z) + r * a.z_row;
  const int V = a.V, low = a.window_low, width = a.window_high - low, bins = 2 * width + 1;
  const double tau = double(static_cast<const float*>(a.tau)[r]), inv_tau = 1 / tau, p = a.p[r];
  const int64_t k = a.k[r];

  // Bin b: positive numbers down to the magnitude `low`, 0, negative ones from there on
  auto number = [&](int b) {
    const int from_zero = b < width ? width - 1 - b : b - width - 1;
    return b == width ? 0.0 : double(widen(In{uint16_t(low + from_zero + (b < width ? 0 : 0x8000))}));
  };
  for (int b = threadIdx.x; b < bins + 2; b += blockDim.x) m.counts[b] = 0;
  if (threadIdx.x == 0) t.flags = 0;
  __syncthreads();

  // Every element into one bin, without a branch: smaller magnitudes than the window's to 0, larger ones to the bins beside it
  each_in_any_order<4>(z, V, [&](In x) {
    const int from_zero = min(max(int(x.bits & 0x7fffu) - (low - 1), 0), width + 1);
    atomicAdd(&counts[width + (x.bits >> 15 ? from_zero : -from_zero)], 1u);
  });
  __syncthreads();
  int below = 0, flags = 0;  // below: finite, but less than the window
  if (counts[-1] + counts[width] + counts[bins] > 0) {  // seldom: once more, to see what they are
    each_in_any_order<1>(z, V, [&](In x) {
      const uint32_t magnitude = x.bits & 0x7fffu, infinity = bits_of_infinity(x);
      const bool negative = x.bits >> 15, beyond = magnitude >= uint32_t(low + width);
      if (magnitude > infinity) flags |= HAS_NAN;
      if (negative ? magnitude - 1 < uint32_t(low - 1) : magnitude - 1 < uint32_t(low - 1) || beyond) flags |= OUTSIDE;
      if (negative && beyond && magnitude < infinity) below++;
    });
    if (flags) atomicOr(&t.flags, flags);
    __syncthreads();
    flags = t.flags;
    below = over_block(below, reinterpret_cast<int*>(t.keys), Sum());
  }
  if (flags & HAS_NAN || !(tau > 0 && tau < HUGE_VAL && k > 0 && p > 0)) {
    if (threadIdx.x == 0) a.pending[r] = 0;
    return write_lawless<In>(a, r);
  }

  // The peak, and how many tokens there are
  const Share share = share_of(bins);
  int mine = 0, first = bins, last = -1;
  for (int b = share.begin; b < share.end; b++)
    if (counts[b]) mine += int(counts[b]), first = min(first, b), last = b;
  int* numbers = reinterpret_cast<int*>(t.keys);
  const int inside = over_block(mine, numbers, Sum());
  first = over_block(first, numbers, Smallest()), last = over_block(last, numbers, Largest());
  const double peak = number(first < bins ? first : width), edge = number(bins - 1);
  const bool empty = inside == 0 && below == 0;
  bool pending = flags & OUTSIDE || (inside == 0 && below > 0);
  pending |= below > 0 && (k > inside || (p < 1 && (peak - edge) * inv_tau < NO_WEIGHT));
  if (pending || empty) {  // every thread of the block says the same
    if (threadIdx.x == 0) a.pending[r] = pending;
    if (!pending) write_lawless<In>(a, r);
    return;
  }

  if (k < inside) last = crossing<false>(t, counts, bins, 0, double(k), [&](int b) { return double(counts[b]); }).bin;
  auto mass = [&](int b) { return counts[b] * exp((number(b) - peak) * inv_tau); };
  if (p < 1) last = crossing<true>(t, counts, last + 1, 0, p, mass).bin;
  int tail_first = bins, count = 0;
  for (int b = share.begin; b < share.end; b++)
    if (counts[b]) {
      if (b <= last) count += int(counts[b]);
      else tail_first = min(tail_first, b);
    }
  tail_first = over_block(tail_first, numbers, Smallest()), count = over_block(count, numbers, Sum());
  const bool tail = tail_first < bins;
  const double tail_peak = tail ? number(tail_first) : -HUGE_VAL;
  pending = below > 0 && !(tail && (tail_peak - edge) * inv_tau >= NO_WEIGHT);
  if (threadIdx.x == 0) a.pending[r] = pending;
  if (pending) return;
  Part part[2] = {{peak, 0, 0}, {tail_peak, 0, 0}};
  if (a.count != nullptr) {
    double others[2] = {0, 0}, weighted[2] = {0, 0};
    for (int b = share.begin; b < share.end; b++) {
      if (counts[b] == 0) continue;
      const bool kept = b <= last;
      const double c = (number(b) - (kept ? peak : tail_peak)) * inv_tau, e = exp(c), n = counts[b];
      const double weight = b == first || b == tail_first ? n - 1 : n * e, moment = e > 0 ? n * e * c : 0;
      others[0] += kept ? weight : 0, weighted[0] += kept ? moment : 0;
      others[1] += kept ? 0 : weight, weighted[1] += kept ? 0 : moment;
    }
    for (int i = 0; i < 2; i++) {
      part[i].others = over_block(others[i], t.slots, Sum());
      part[i].weighted = over_block(weighted[i], t.slots, Sum());
    }
  }
  write_row<In>(a, r, number(last), part[0], part[1], count);
}

// Top-k and top-p of rows [begin, end): the threshold, and the values of entropy_kernels/ops/truncated.py beside it.
//
// Included once per instruction set, after row_stats.h. Nothing is sorted but a last handful. A row is read
//   1. for its peak and the largest logit of many small blocks, lane by lane. The k-th largest of those (of coarser ones, while that
//      leaves enough) is below k logits at least, so no kept token is smaller: the split. With top-p alone the total mass is summed
//      instead (row_stats), and the split lies so low that V tokens of its size do not make up the share 1 − p.
//   2. for the candidates, at or above the split, which are copied out; blocks whose maximum lies below it are passed over. Where more
//      than the kept law is asked for, all below the split is summed in T on the way.
// Candidates are few, unless the kept set is large itself. All of them are weighed in double; the threshold is found by radix passes
// over order-preserving integer keys: counts and masses of up to 1024 equal intervals of keys, then the same again inside the
// interval where the threshold lies, until few keys are left. Tokens of equal logit are never parted.
//
// A total in float could decide otherwise than float64 where the crossing is close: the sum is then repeated in double. A tail whose
// sums say little (its own peak makes up most of it, or is far from where they were counted from) is read once more by row_stats.

// Of one row, and reused for the next.
template <class T>
struct Scratch {
  std::vector<T> maxima, fine, candidates, list, rest, row;
  std::vector<double> weights, wide;
};

// A number as an integer of the same order. −0 comes before 0: that parts a tie, but a threshold of either keeps both.
EK_FN uint32_t key_of(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}

EK_FN uint64_t key_of(double x) {
  uint64_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b >> 63 ? ~b : b | 0x8000000000000000u;
}

// A vector's lanes that are at least `split`, one after another at `to`, which has room for a whole vector; how many.
EK_FN int copy_candidates(f32v v, float split, float* to) {
#if EK_BYTES == 64
  const __mmask16 mask = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(split), _CMP_GE_OQ);
  if (mask == 0) return 0;
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, (__m512)v));
  return __builtin_popcount(mask);
#else
#if EK_BYTES == 32
  if (_mm256_movemask_ps((__m256)(v >= split)) == 0) return 0;
#endif
  int n = 0;
  for (int i = 0; i < Lanes<float>::n; i++) to[n] = v[i], n += v[i] >= split;
  return n;
#endif
}

EK_FN int copy_candidates(f64v v, double split, double* to) {
#if EK_BYTES == 64
  const __mmask8 mask = _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(split), _CMP_GE_OQ);
  if (mask == 0) return 0;
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(mask, (__m512d)v));
  return __builtin_popcount(mask);
#else
  int n = 0;
  for (int i = 0; i < Lanes<double>::n; i++) to[n] = v[i], n += v[i] >= split;
  return n;
#endif
}

// The last, ragged vector of a row, padded with −∞.
template <class T, class In>
EK_FN Vec<T> load_tail(const In* z, int64_t n) {
  In lanes[Lanes<T>::n];
  for (int j = 0; j < Lanes<T>::n; j++) lanes[j] = j < n ? z[j] : negative_infinity<In>();
  return load(lanes);
}

constexpr int64_t FINE = 128;  // elements of the blocks that are passed over; a divisor of every chunk and coarser block

// The largest logit of each lane of each FINE elements and of each `block` (a multiple of them); the peak; whether there is a NaN.
template <class T, class In>
EK_LOOP T block_maxima(const In* z, int64_t V, int64_t block, std::vector<T>& maxima, std::vector<T>& fine, bool* nan) {
  constexpr int L = Lanes<T>::n;
  const Vec<T> none = Vec<T>{} - std::numeric_limits<T>::infinity();
  maxima.resize((V + block - 1) / block * L);
  fine.resize((V + FINE - 1) / FINE * L);
  T *coarse_to = maxima.data(), *to = fine.data();
  Vec<T> peak = none, sum_of_nothing{};
  for (int64_t start = 0; start < V; start += block, coarse_to += L) {
    Vec<T> coarse = none;
    for (int64_t from = start; from < std::min(V, start + block); from += FINE, to += L) {
      const int64_t end = std::min(V, from + FINE);
      Vec<T> best = none;
      int64_t i = from;
      for (; i + L <= end; i += L) {
        const Vec<T> v = load(z + i);
        best = larger(v, best);
        sum_of_nothing += v == v ? Vec<T>{} : v;
      }
      if (i < end) {
        const Vec<T> v = load_tail<T>(z + i, end - i);
        best = larger(v, best);
        sum_of_nothing += v == v ? Vec<T>{} : v;
      }
      store(to, best);
      coarse = larger(best, coarse);
    }
    store(coarse_to, coarse);
    peak = larger(coarse, peak);
  }
  *nan = std::isnan(sum<T>(sum_of_nothing));
  return largest<T>(peak);
}

// What lies below the split: Σ e and Σ e (z − origin) with e = e^{(z − origin)/τ}, and its largest logit.
template <class T>
struct Below {
  double weight = 0, weighted = 0;
  T best = -std::numeric_limits<T>::infinity();
};

// Copies the candidates out and, with SUMS, adds up the rest; `fine` are the maxima of block_maxima.
template <bool SUMS, class T, class In>
EK_LOOP Below<T> split_row(const In* z, int64_t V, T split, T origin, double inv_tau, const std::vector<T>& fine,
                           std::vector<T>& candidates) {
  constexpr int L = Lanes<T>::n;
  const Exp<T> exponential = Exp<T>::of(inv_tau);
  const Vec<T> none = Vec<T>{} - std::numeric_limits<T>::infinity();
  Below<T> below;
  Vec<T> best = none;
  int64_t n = 0;
  const T* block_best = fine.data();
  for (int64_t start = 0; start < V; start += CHUNK<1>) {
    const int64_t end = std::min<int64_t>(V, start + CHUNK<1>);
    if (int64_t(candidates.size()) < n + CHUNK<1> + L) candidates.resize(2 * candidates.size() + CHUNK<1> + L);
    T* to = candidates.data();
    Vec<T> w{}, wd{};
    for (int64_t from = start; from < end; from += FINE, block_best += L) {
      const Vec<T> at_best = load(block_best);
      const int64_t to_here = std::min(end, from + FINE);
      if (any<T>(at_best >= split) || to_here - from < FINE) {
        for (int64_t i = from; i < to_here; i += L) {
          Vec<T> v = i + L <= to_here ? load(z + i) : load_tail<T>(z + i, to_here - i);
          n += copy_candidates(v, split, to + n);
          if constexpr (SUMS) {
            v = v < split ? v : none;
            best = larger(v, best);
            const Vec<T> d = clamp(v - origin, exponential);
            const Vec<T> e = weight(d, exponential);
            w += e;
            wd += e * d;
          }
        }
      } else if constexpr (SUMS) {  // nothing but the tail
        best = larger(at_best, best);
        for (int64_t i = from; i < to_here; i += L) {
          const Vec<T> d = clamp(load(z + i) - origin, exponential);
          const Vec<T> e = weight(d, exponential);
          w += e;
          wd += e * d;
        }
      }
    }
    if constexpr (SUMS) below.weight += sum<T>(w), below.weighted += sum<T>(wd);
  }
  candidates.resize(n);
  if constexpr (SUMS) below.best = largest<T>(best);
  return below;
}

// e^{(x − peak)/τ} of n numbers, in double.
template <class T>
EK_LOOP void weigh(const T* x, int64_t n, double peak, double inv_tau, double* weights) {
  constexpr int L = Lanes<double>::n;
  const Exp<double> exponential = Exp<double>::of(inv_tau);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    double d[L];
    for (int j = 0; j < L; j++) d[j] = double(x[i + j]) - peak;
    store(weights + i, weight(clamp(load(d), exponential), exponential));
  }
  double d[L] = {}, out[L];
  for (int64_t j = i; j < n; j++) d[j - i] = double(x[j]) - peak;
  store(out, weight(clamp(load(d), exponential), exponential));
  for (int64_t j = i; j < n; j++) weights[j] = out[j - i];
}

// Those of the finite numbers x that are at least the threshold, and the others with their sign turned.
template <class T>
EK_LOOP void part(const std::vector<T>& x, T threshold, std::vector<T>& kept, std::vector<T>& rest_negated) {
  constexpr int L = Lanes<T>::n;
  const int64_t n = x.size();
  kept.resize(n + L), rest_negated.resize(n + L);
  const T below = std::nextafter(threshold, -std::numeric_limits<T>::infinity());
  const Vec<T> none = Vec<T>{} - std::numeric_limits<T>::infinity();
  int64_t k = 0, r = 0;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<T> v = i + L <= n ? load(x.data() + i) : load_tail<T>(x.data() + i, n - i);
    k += copy_candidates(v, threshold, kept.data() + k);
    r += copy_candidates(v == none ? none : -v, T(-below), rest_negated.data() + r);
  }
  kept.resize(k), rest_negated.resize(r);
}

// The smallest x with less than `target` strictly above it: in number, or with MASS in weight. And both sides of the decision.
template <class T>
struct Crossing {
  T threshold;
  double above, reached;  // strictly above the threshold, and with its ties
};

template <bool MASS, class T>
EK_LOOP Crossing<T> crossing(T* x, double* w, int64_t n, double target) {
  using Key = decltype(key_of(T{}));
  constexpr int BUCKETS = 1024;
  double base = 0;  // what has been passed already
  while (n > 0) {
    Key low = ~Key(0), high = 0;
    for (int64_t i = 0; i < n; i++) {
      const Key key = key_of(x[i]);
      low = std::min(low, key), high = std::max(high, key);
    }
    if (low == high) {
      double all = base;
      for (int64_t i = 0; i < n; i++) all += MASS ? w[i] : 1;
      return {x[0], base, all};
    }
    int shift = 0;
    while ((high - low) >> shift >= BUCKETS) shift++;
    int64_t counts[BUCKETS] = {};
    double masses[MASS ? BUCKETS : 1] = {};
    for (int64_t i = 0; i < n; i++) {
      const int bucket = int((high - key_of(x[i])) >> shift);
      counts[bucket]++;
      if constexpr (MASS) masses[bucket] += w[i];
    }
    int critical = 0;
    double above = base, next = base;
    for (int b = 0; b < BUCKETS; b++) {
      if (counts[b] == 0) continue;
      if (!(next < target)) break;
      critical = b, above = next;
      next += MASS ? masses[b] : double(counts[b]);
    }
    base = above;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
      const bool inside = int((high - key_of(x[i])) >> shift) == critical;
      x[kept] = x[i];
      if constexpr (MASS) w[kept] = w[i];
      kept += inside;
    }
    n = kept;
  }
  return {std::numeric_limits<T>::quiet_NaN(), base, base};  // of no number
}

template <class T>
EK_FN double entropy_of(const RowStats<T, 1>& row) {
  return std::log1p(row.others.weight + 0.0 * row.peak) - RowStats<T, 1>::with_peak(row).mean[0];
}

// The row of all that is not kept: the candidates among it, which are `rest`, and what was summed up below the split.
template <class T, class In>
EK_LOOP RowStats<T, 1> tail_stats(const In* z, int64_t V, T threshold, T origin, const Below<T>& below, const std::vector<T>& rest,
                                  double inv_tau, std::vector<T>& scratch) {
  RowStats<T, 1> tail;
  if (rest.empty() && !(below.best > tail.peak)) return tail;
  Moments<1> sums;
  sums.weight = below.weight;
  if (below.weight != 0) sums.mean[0] = below.weighted / below.weight * inv_tau;
  if (!rest.empty() && std::isfinite(below.weight)) {
    tail = row_stats<1, T, T>(rest.data(), nullptr, rest.size(), inv_tau);
    if (!(below.best > -std::numeric_limits<T>::infinity())) return tail;
    const double shift = (double(origin) - double(tail.peak)) * inv_tau;
    Moments<1>::move(sums, &shift, std::exp(shift));
    Moments<1>::merge(tail.others, sums);
    return tail;
  }
  const double shift = (double(origin) - double(below.best)) * inv_tau;
  Moments<1>::move(sums, &shift, std::exp(shift));
  if (shift <= 4 && sums.weight - 1 > 0.25 && sums.weight < 1e30) {
    tail.peak = below.best;
    tail.others.mean[0] = sums.mean[0] * sums.weight / (sums.weight - 1);  // the peak itself leaves: weight 1, coordinate 0
    tail.others.weight = sums.weight - 1;
    return tail;
  }
  scratch.resize(V);
  for (int64_t i = 0; i < V; i++) {
    const T v = widen(z[i]);
    scratch[i] = v >= threshold ? -std::numeric_limits<T>::infinity() : v;
  }
  return row_stats<1, T, T>(scratch.data(), nullptr, V, inv_tau);
}

template <class In, class T>
EK_FN void truncated_row(const TruncatedArgs& a, int64_t r, Scratch<T>& scratch) {
  constexpr int L = Lanes<T>::n;
  constexpr T infinity = std::numeric_limits<T>::infinity(), lowest_finite = std::numeric_limits<T>::lowest();
  const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
  const bool values = a.count != nullptr;                                              // of the kept law at least
  const bool with_tail = values && (a.out[2] != nullptr || a.parts.with_tail);  // and of all else
  const int64_t V = a.V, k = a.k[r], y = values ? a.y[r] : -1;
  const double tau = static_cast<const T*>(a.tau)[r], inv_tau = 1 / tau, p = a.p[r];
  auto put_values = [&](int64_t count, double entropy, double logprob, double mass, double tail, double full) {
    a.count[r] = count;
    const double found[5] = {entropy, logprob, mass, tail, full};
    for (int i = 0; i < (with_tail ? 5 : 2); i++) static_cast<T*>(a.out[i])[r] = T(found[i]);
  };
  T* const threshold_of_row = static_cast<T*>(a.threshold) + r;

  const bool few = k < V, share = p < 1;
  int64_t block = 4096;  // enough blocks for the k-th largest of their maxima to lie close to the k-th largest logit
  while (few && block > FINE && V / block * L < 3 * k) block /= 2;
  bool has_nan;
  const T peak = block_maxima<T>(z, V, block, scratch.maxima, scratch.fine, &has_nan);
  if (has_nan || !(peak > -infinity && peak < infinity) || !(tau > 0 && inv_tau > 0)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    *threshold_of_row = T(nan);
    if (a.parts.values[0] != nullptr) {
      const auto row = part_stats<1, T, In>(z, nullptr, V, Above<T>{T(nan)}, inv_tau);
      const PartState part[2] = {state_of(row.part[KEPT]), state_of(row.part[TAIL])};
      put_parts<In, T>(a.parts, r, z, part, false, 0);
    } else if (values) {
      put_values(0, nan, y < 0 ? 0 : nan, nan, nan, nan);
    }
    return;
  }

  T split = lowest_finite;
  double total = 0;
  std::vector<T>& maxima = scratch.maxima;
  if (few && int64_t(maxima.size()) >= 2 * k) {
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), [](T u, T v) { return u > v; });
    split = std::max(maxima[k - 1], lowest_finite);
  } else if (!few && share) {
    total = 1 + row_stats<1, T, In>(z, nullptr, V, inv_tau).others.weight;
    const double reach = std::log(1.01 * double(V) / ((1 - p) * total));
    split = std::max(std::nextafter(T(double(peak) - reach * tau), -infinity), lowest_finite);
  }
  T origin = -infinity;
  for (T m : maxima)
    if (m < split) origin = std::max(origin, m);
  if (origin == -infinity) origin = split;
  std::vector<T>&x = scratch.candidates, &list = scratch.list;
  const Below<T> below = with_tail ? split_row<true, T>(z, V, split, origin, inv_tau, scratch.fine, x)
                                   : split_row<false, T>(z, V, split, origin, inv_tau, scratch.fine, x);

  T threshold = lowest_finite;
  if (few) {
    list = x;
    threshold = int64_t(x.size()) <= k ? *std::min_element(x.begin(), x.end())
                                       : crossing<false, T>(list.data(), nullptr, x.size(), double(k)).threshold;
  }
  if (share) {
    auto cross = [&] {
      list.assign(x.begin(), x.end());
      if (few) list.erase(std::remove_if(list.begin(), list.end(), [&](T v) { return v < threshold; }), list.end());
      scratch.weights.resize(list.size());
      weigh(list.data(), list.size(), peak, inv_tau, scratch.weights.data());
      if (few) {
        total = 0;
        for (double e : scratch.weights) total += e;
      }
      return crossing<true>(list.data(), scratch.weights.data(), list.size(), p * total);
    };
    Crossing<T> c = cross();
    const double doubt = few || sizeof(T) == 8 ? 0 : 1e-6 * total;
    if (std::abs(c.above - p * total) < doubt || std::abs(c.reached - p * total) < doubt) {
      std::vector<double>& wide = scratch.wide;
      wide.resize(V);
      for (int64_t i = 0; i < V; i++) wide[i] = double(widen(z[i]));
      total = 1 + row_stats<1, double, double>(wide.data(), nullptr, V, inv_tau).others.weight;
      c = cross();
    }
    threshold = c.threshold;
  }
  *threshold_of_row = threshold;
  if (!values) return;

  std::vector<T>& rest = scratch.rest;
  part(x, threshold, list, rest);
  for (T& v : rest) v = -v;
  const RowStats<T, 1> kept = row_stats<1, T, T>(list.data(), nullptr, list.size(), inv_tau);
  const RowStats<T, 1> tail =
      with_tail ? tail_stats<T>(z, V, threshold, origin, below, rest, inv_tau, scratch.row) : RowStats<T, 1>();
  if (a.parts.values[0] != nullptr) {
    const PartState part[2] = {state_of(kept), state_of(tail)};
    return put_parts<In, T>(a.parts, r, z, part, y >= 0 && T(widen(z[y])) >= threshold, list.size());
  }
  const double log_norm = std::log1p(kept.others.weight);
  const double c_y = y < 0 ? 0 : c_at(z, y, peak, tau);
  const double logprob = y < 0 ? 0 : T(widen(z[y])) >= threshold ? c_y - log_norm : -std::numeric_limits<double>::infinity();
  if (!(tail.peak > -infinity)) return put_values(list.size(), entropy_of(kept), logprob, 1, 0, entropy_of(kept));
  RowStats<T, 1> full = kept;
  Moments<1> cut = RowStats<T, 1>::with_peak(tail);
  const double shift = (double(tail.peak) - double(peak)) * inv_tau;
  Moments<1>::move(cut, &shift, std::exp(shift));
  Moments<1>::merge(full.others, cut);
  const double kept_weight = 1 + kept.others.weight;
  put_values(list.size(), entropy_of(kept), logprob, kept_weight / (kept_weight + cut.weight), entropy_of(tail), entropy_of(full));
}

template <class In, class T>
EK_LOOP void truncated_rows(const TruncatedArgs& a, int64_t begin, int64_t end) {
  Scratch<T> scratch;
  for (int64_t r = begin; r < end; r++) truncated_row<In, T>(a, r, scratch);
}

static TruncatedKernel truncated_kernel_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::Double: return truncated_rows<double, double>;
    case Dtype::Float: return truncated_rows<float, float>;
    case Dtype::BFloat16: return truncated_rows<BFloat16, float>;
    case Dtype::Half: return truncated_rows<Float16, float>;
    default: return nullptr;
  }
}

// One pass over a row: its largest logit, and the moments of all the other entries under their weights e^c.
//
// Included once per instruction set, after simd.h. Notation as in entropy_kernels/ops/reference.py:
//   c = (z − z_peak)/τ,   x_k = (ẋ_k − ẋ_k at the peak)/τ for up to two tangents,   weight w = e^c.
//
// The peak itself is never among the entries that are summed: it has weight 1 and all its coordinates are 0, and it joins
// last, in `with_peak`. When a larger logit arrives, the old peak becomes an ordinary entry. The row is worked through in
// chunks that stay in the first-level cache; a chunk is summed in T around its own mean and merged in double, so nothing
// large is ever subtracted: neither for peaked rows, where all but the peak is tiny, nor for flat ones.

constexpr int CHUNK = 1024;

// Weight, means, and central co-moments Σ w (x − x̄)(y − ȳ) of K coordinates: c, then the tangents.
template <int K>
struct Moments {
  double weight = 0, mean[K] = {}, pair[3] = {}, triple = 0;  // pair: K = 2: (0,1); K = 3: (0,1), (0,2), (1,2)

  // Adds a disjoint set of entries (Chan's update, for second and third order).
  EK_FN void merge(Moments& a, const Moments& b) {
    if (b.weight == 0) {
      for (int k = 0; k < K; k++) a.mean[k] += 0 * b.mean[k];  // nothing to add, unless it is NaN
      return;
    }
    const double total = a.weight + b.weight, fraction = b.weight / total, both = a.weight * fraction;
    double d[K];
    for (int k = 0; k < K; k++) d[k] = b.mean[k] - a.mean[k];
    if constexpr (K == 3) {
      const double share = a.weight / total;
      a.triple += b.triple + both * (share - fraction) * d[0] * d[1] * d[2] +
                  d[0] * (share * b.pair[2] - fraction * a.pair[2]) + d[1] * (share * b.pair[1] - fraction * a.pair[1]) +
                  d[2] * (share * b.pair[0] - fraction * a.pair[0]);
      a.pair[1] += b.pair[1] + both * d[0] * d[2];
      a.pair[2] += b.pair[2] + both * d[1] * d[2];
    }
    if constexpr (K >= 2) a.pair[0] += b.pair[0] + both * d[0] * d[1];
    for (int k = 0; k < K; k++) a.mean[k] += fraction * d[k];
    a.weight = total;
  }

  // The origin moves by −shift, every weight is multiplied by `scale`; central moments only feel the scale.
  EK_FN void move(Moments& a, const double* shift, double scale) {
    for (int k = 0; k < K; k++) a.mean[k] += shift[k];
    a.weight *= scale;
    for (double& p : a.pair) p *= scale;
    a.triple *= scale;
  }
};

template <class T, int K>
struct RowStats {
  T peak = -std::numeric_limits<T>::infinity();
  int64_t peak_index = 0;
  T x_peak[K] = {};  // [1..K-1]: the tangents at the peak, not divided by τ
  Moments<K> others;

  EK_FN Moments<K> with_peak(const RowStats& row) {
    Moments<K> all;
    all.weight = 1;
    Moments<K> others = row.others;
    others.weight += 0.0 * row.peak;  // a largest logit of ±inf: undefined
    Moments<K>::merge(all, others);
    return all;
  }
};

// buffer[0, n) = p widened, padded to whole vectors; returns the number of vectors, and the largest entry in `best`.
template <class T, class In>
EK_FN int load_chunk(const In* p, int n, In pad, T* buffer, Vec<T>* best) {
  constexpr int L = Lanes<T>::n;
  const int whole = n / L;
  for (int i = 0; i < whole; i++) {
    const Vec<T> v = load(p + i * L);
    if (best) *best = larger(v, *best);
    store(buffer + i * L, v);
  }
  if (whole * L == n) return whole;
  In tail[L];
  for (int i = 0; i < L; i++) tail[i] = whole * L + i < n ? p[whole * L + i] : pad;
  const Vec<T> v = load(tail);
  if (best) *best = larger(v, *best);
  store(buffer + whole * L, v);
  return whole + 1;
}

template <int K, class T, class In>
EK_FN RowStats<T, K> row_stats(const In* z, const In* const* tangents, int64_t V, double inv_tau) {
  constexpr int L = Lanes<T>::n;
  alignas(64) T zs[CHUNK], es[K > 1 ? CHUNK : L], xs[K > 1 ? K - 1 : 1][K > 1 ? CHUNK : L];
  RowStats<T, K> row;
  const T inv = T(inv_tau);
  for (int64_t start = 0; start < V; start += CHUNK) {
    const int n = int(std::min<int64_t>(CHUNK, V - start));
    Vec<T> best = Vec<T>{} - std::numeric_limits<T>::infinity();
    const int vectors = load_chunk(z + start, n, negative_infinity<In>(), zs, &best);
    for (int k = 1; k < K; k++) load_chunk(tangents[k - 1] + start, n, In{}, xs[k - 1], (Vec<T>*)nullptr);

    const T candidate = largest<T>(best);
    if (candidate > row.peak) {
      int at = 0;
      while (zs[at] != candidate) at++;
      T x_new[K] = {};
      for (int k = 1; k < K; k++) x_new[k] = xs[k - 1][at];
      if (row.peak > -std::numeric_limits<T>::infinity()) {
        double shift[K];
        shift[0] = (double(row.peak) - double(candidate)) * inv_tau;
        for (int k = 1; k < K; k++) shift[k] = (double(row.x_peak[k]) - double(x_new[k])) * inv_tau;
        Moments<K> old_peak;
        old_peak.weight = std::exp(shift[0]);
        for (int k = 0; k < K; k++) old_peak.mean[k] = shift[k];
        Moments<K>::move(row.others, shift, old_peak.weight);
        Moments<K>::merge(row.others, old_peak);
      }
      row.peak = candidate;
      row.peak_index = start + at;
      for (int k = 1; k < K; k++) row.x_peak[k] = x_new[k];
      zs[at] = -std::numeric_limits<T>::infinity();
    }

    const T origin = row.peak > -std::numeric_limits<T>::infinity() ? row.peak : T(0);
    const Vec<T> least = Vec<T>{} + lowest<T>();
    const char* next = (const char*)(z + start + n);
    Vec<T> w{}, wx[K] = {};
    for (int i = 0; i < vectors; i++) {
      __builtin_prefetch(next + i * int(L * sizeof(In)));
      const Vec<T> c = at_least((load(zs + i * L) - origin) * inv, least);
      const Vec<T> e = exp_nonpositive(c);
      w += e;
      wx[0] += e * c;
      if constexpr (K > 1) {
        store(zs + i * L, c);
        store(es + i * L, e);
        for (int k = 1; k < K; k++) {
          __builtin_prefetch((const char*)(tangents[k - 1] + start + n) + i * int(L * sizeof(In)));
          const Vec<T> x = (load(xs[k - 1] + i * L) - row.x_peak[k]) * inv;
          store(xs[k - 1] + i * L, x);
          wx[k] += e * x;
        }
      }
    }
    Moments<K> chunk;
    chunk.weight = sum<T>(w);
    for (int k = 0; k < K; k++) {
      chunk.mean[k] = sum<T>(wx[k]);
      if (chunk.weight != 0) chunk.mean[k] /= chunk.weight;
    }
    if constexpr (K > 1) {
      Vec<T> pair[3] = {}, triple{};
      const T m0 = T(chunk.mean[0]), m1 = T(chunk.mean[1]), m2 = T(chunk.mean[K - 1]);
      for (int i = 0; i < vectors; i++) {
        const Vec<T> e = load(es + i * L), c = load(zs + i * L) - m0, x = load(xs[0] + i * L) - m1;
        const Vec<T> ecx = e * c * x;
        pair[0] += ecx;
        if constexpr (K == 3) {
          const Vec<T> y = load(xs[1] + i * L) - m2;
          pair[1] += e * c * y;
          pair[2] += e * x * y;
          triple += ecx * y;
        }
      }
      for (int k = 0; k < (K == 3 ? 3 : 1); k++) chunk.pair[k] = sum<T>(pair[k]);
      chunk.triple = sum<T>(triple);
    }
    Moments<K>::merge(row.others, chunk);
  }
  return row;
}

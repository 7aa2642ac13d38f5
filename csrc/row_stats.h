// One pass over a row: its largest logit, and the moments of all the other entries under their weights e^c.
//
// Included once per instruction set, after simd.h. Notation as in entropy_kernels/ops/reference.py:
//   c = (z − z_peak)/τ,   x_k = (ẋ_k − ẋ_k at the peak)/τ for up to two tangents,   weight w = e^c.
//
// The peak itself is never among the entries that are summed: it has weight 1 and all its coordinates are 0, and it joins
// last, in `with_peak`. When a larger logit arrives, the old peak becomes an ordinary entry. The row is worked through in
// chunks that stay in the first-level cache; a chunk is summed in T around its own mean and merged in double, so nothing
// large is ever subtracted: neither for peaked rows, where all but the peak is tiny, nor for flat ones.

template <int K>
constexpr int CHUNK = K == 1 ? 2048 : 1024;

// Weight, means, and central co-moments Σ w (x − x̄)(y − ȳ) of K coordinates: c, then the tangents.
template <int K>
struct Moments {
  double weight = 0, mean[K] = {}, pair[3] = {}, triple = 0;  // pair: K = 2: (0,1); K = 3: (0,1), (0,2), (1,2)

  // Adds a disjoint set of entries (Chan's update, for second and third order).
  EK_LOOP void merge(Moments& a, const Moments& b) {
    if (b.weight == 0) {  // nothing to add, but a NaN among the tangents is not to be lost
      double nothing = 0;
      for (int k = 0; k < K; k++) nothing += 0 * b.mean[k];
      for (double& m : a.mean) m += nothing;
      for (double& p : a.pair) p += nothing;
      a.triple += nothing;
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

  // From coordinates z − z_peak, ẋ − ẋ_peak to the same over τ.
  EK_FN void divide(Moments* a, double inv_tau) {
    for (double& m : a->mean) m *= inv_tau;
    for (double& p : a->pair) p *= inv_tau * inv_tau;
    a->triple *= inv_tau * inv_tau * inv_tau;
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

// What the second loop over a chunk needs of the first, in the first-level cache.
template <class T, int K>
struct Buffers {
  static constexpr int n = K > 1 ? CHUNK<K> : 1;
  alignas(64) T d[n], e[n], x[K > 1 ? K - 1 : 1][n];
};

template <class T, int K>
struct ChunkSums {
  Vec<T> best, w, wx[K];  // the largest logit, Σ w, Σ w d and Σ w x
};

// The first loop: d = z − origin, w = e^{d/τ}, x = ẋ − ẋ_peak. Asks for the chunk that starts `ahead` elements on.
template <int K, class T, class In>
EK_LOOP ChunkSums<T, K> first_loop(const In* z, const In* const* tangents, int vectors, int64_t ahead, T origin,
                                   const T* x_peaks, const Exp<T>& exponentials, Buffers<T, K>& buffers) {
  constexpr int L = Lanes<T>::n;
  const Exp<T> exponential = exponentials;  // locals: nothing stored below can change them
  const In* tangent[K > 1 ? K - 1 : 1];
  T x_peak[K > 1 ? K - 1 : 1];
  for (int k = 1; k < K; k++) tangent[k - 1] = tangents[k - 1], x_peak[k - 1] = x_peaks[k];
  ChunkSums<T, K> sums{Vec<T>{} - std::numeric_limits<T>::infinity()};
  for (int i = 0; i < vectors * L; i += L) {
    __builtin_prefetch(z + i + ahead);
    const Vec<T> v = load(z + i);
    sums.best = larger(v, sums.best);
    const Vec<T> d = clamp(v - origin, exponential);
    const Vec<T> e = weight(d, exponential);
    sums.w += e;
    sums.wx[0] += e * d;
    if constexpr (K > 1) {
      store(buffers.d + i, d);
      store(buffers.e + i, e);
      for (int k = 1; k < K; k++) {
        __builtin_prefetch(tangent[k - 1] + i + ahead);
        const Vec<T> x = load(tangent[k - 1] + i) - x_peak[k - 1];
        store(buffers.x[k - 1] + i, x);
        sums.wx[k] += e * x;
      }
    }
  }
  return sums;
}

// The second loop: central moments around the chunk's means, which `chunk` holds.
template <int K, class T>
EK_LOOP void second_loop(const Buffers<T, K>& buffers, int vectors, Moments<K>* chunk) {
  constexpr int L = Lanes<T>::n;
  Vec<T> pair[3] = {}, triple{};
  const T m0 = T(chunk->mean[0]), m1 = T(chunk->mean[1]), m2 = T(chunk->mean[K - 1]);
  for (int i = 0; i < vectors * L; i += L) {
    const Vec<T> e = load(buffers.e + i), d = load(buffers.d + i) - m0, x = load(buffers.x[0] + i) - m1;
    const Vec<T> edx = e * d * x;
    pair[0] += edx;
    if constexpr (K == 3) {
      const Vec<T> y = load(buffers.x[1] + i) - m2;
      pair[1] += e * d * y;
      pair[2] += e * x * y;
      triple += edx * y;
    }
  }
  for (int k = 0; k < (K == 3 ? 3 : 1); k++) chunk->pair[k] = sum<T>(pair[k]);
  if constexpr (K == 3) chunk->triple = sum<T>(triple);
}

// buffer = p[0, n) widened, padded to whole vectors.
template <class T, class In>
EK_LOOP void widen_chunk(const In* p, int n, In pad, T* buffer) {
  constexpr int L = Lanes<T>::n;
  int i = 0;
  for (; i + L <= n; i += L) store(buffer + i, load(p + i));
  if (i == n) return;
  In tail[L];
  for (int j = 0; j < L; j++) tail[j] = i + j < n ? p[i + j] : pad;
  store(buffer + i, load(tail));
}

// A larger logit has come: the old peak becomes one of the others.
template <class T, int K>
EK_LOOP void new_peak(RowStats<T, K>& row, T peak, int64_t index, const T* x_peak, double inv_tau) {
  if (row.peak > -std::numeric_limits<T>::infinity()) {
    double shift[K];
    shift[0] = (double(row.peak) - double(peak)) * inv_tau;
    for (int k = 1; k < K; k++) shift[k] = (double(row.x_peak[k]) - double(x_peak[k])) * inv_tau;
    Moments<K> old_peak;
    old_peak.weight = std::exp(shift[0]);
    for (int k = 0; k < K; k++) old_peak.mean[k] = shift[k];
    Moments<K>::move(row.others, shift, old_peak.weight);
    Moments<K>::merge(row.others, old_peak);
  }
  row.peak = peak;
  row.peak_index = index;
  for (int k = 1; k < K; k++) row.x_peak[k] = x_peak[k];
}

template <int K, class T, class In>
EK_LOOP RowStats<T, K> row_stats(const In* z, const In* const* tangents, int64_t V, double inv_tau,
                                 RowStats<T, K> row = {}) {  // of the columns before these
  constexpr int L = Lanes<T>::n;
  constexpr T none = -std::numeric_limits<T>::infinity();
  const Exp<T> exponential = Exp<T>::of(inv_tau);
  Buffers<T, K> buffers;
  for (int64_t start = 0; start < V; start += CHUNK<K>) {
    const int n = int(std::min<int64_t>(CHUNK<K>, V - start)), vectors = (n + L - 1) / L;
    const In* z_chunk = z + start;
    const In* x_chunk[K > 1 ? K - 1 : 1];
    for (int k = 1; k < K; k++) x_chunk[k - 1] = tangents[k - 1] + start;

    // Straight from memory, in the hope that the peak is already known.
    ChunkSums<T, K> sums;
    bool settled = false;
    if (n % L == 0 && row.peak > none) {
      sums = first_loop<K, T>(z_chunk, x_chunk, vectors, n, row.peak, row.x_peak, exponential, buffers);
      settled = !(largest<T>(sums.best) > row.peak);
    }
    if (!settled) {  // the start of a row, its ragged end, or a new peak: by way of a copy, with the peak taken out
      alignas(64) T zs[CHUNK<K>], xs[K > 1 ? K - 1 : 1][K > 1 ? CHUNK<K> : 1];
      widen_chunk<T>(z_chunk, n, negative_infinity<In>(), zs);
      const T* x_wide[K > 1 ? K - 1 : 1] = {xs[0]};
      for (int k = 1; k < K; k++) {
        widen_chunk<T>(x_chunk[k - 1], n, In{}, xs[k - 1]);
        x_wide[k - 1] = xs[k - 1];
      }
      Vec<T> best = Vec<T>{} + none;
      for (int i = 0; i < vectors * L; i += L) best = larger(load(zs + i), best);
      const T candidate = largest<T>(best);
      if (candidate > row.peak) {
        int at = 0;
        while (zs[at] != candidate) at++;
        T x_peak[K] = {};
        for (int k = 1; k < K; k++) x_peak[k] = xs[k - 1][at];
        new_peak(row, candidate, start + at, x_peak, inv_tau);
        zs[at] = none;
      }
      const T origin = row.peak > none ? row.peak : T(0);
      sums = first_loop<K, T>(zs, x_wide, vectors, 0, origin, row.x_peak, exponential, buffers);
    }

    Moments<K> chunk;
    chunk.weight = sum<T>(sums.w);
    for (int k = 0; k < K; k++) {
      chunk.mean[k] = sum<T>(sums.wx[k]);
      if (chunk.weight != 0) chunk.mean[k] /= chunk.weight;
    }
    if constexpr (K > 1) second_loop<K, T>(buffers, vectors, &chunk);
    Moments<K>::divide(&chunk, inv_tau);
    Moments<K>::merge(row.others, chunk);
  }
  return row;
}

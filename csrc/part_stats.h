// One pass over a row in two parts, the kept set S and its tail T: for each part what row_stats finds of a whole row.
//
// Included once per instruction set, after row_stats.h, whose notation and chunks are kept: a part's peak is never among its summed
// entries, a chunk is summed around its own means and merged in double. Every entry counts its distance from the peak of its own part,
// chosen by the lane, so e^{d/τ} is formed once for both; a part that holds the whole row is summed as row_stats would, bit for bit.
//
// S comes as a threshold, S = {a : z_a ≥ t}, or as one byte for each token.

template <class T>
using Lane = decltype(Vec<T>{} > Vec<T>{});  // all bits set where an entry is kept

template <class T>
EK_FN bool any(Lane<T> lanes) {
#if EK_BYTES == 64
  return (sizeof(T) == 4 ? _mm512_movepi32_mask((__m512i)lanes) : _mm512_movepi64_mask((__m512i)lanes)) != 0;
#elif EK_BYTES == 32
  return _mm256_movemask_epi8((__m256i)lanes) != 0;
#else
  for (int i = 0; i < Lanes<T>::n; i++)
    if (lanes[i]) return true;
  return false;
#endif
}

template <class T>
struct Above {
  T threshold;

  EK_FN Lane<T> kept(const Above& set, Vec<T> v, int64_t) { return v >= set.threshold; }
  EK_FN bool keeps(const Above& set, T v, int64_t) { return v >= set.threshold; }
  EK_FN Above chunk(const Above& set, int64_t, int, uint8_t*) { return set; }
};

EK_FN i32v widen_bytes(const uint8_t* p, f32v) {
#if EK_BYTES == 64
  return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)) != 0;
#elif EK_BYTES == 32
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)) != 0;
#else
  i32v v;
  for (int i = 0; i < Lanes<float>::n; i++) v[i] = p[i];
  return v != 0;
#endif
}

EK_FN i64v widen_bytes(const uint8_t* p, f64v) {
#if EK_BYTES == 64
  return (i64v)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p)) != 0;
#else
  i64v v;
  for (int i = 0; i < Lanes<double>::n; i++) v[i] = p[i];
  return v != 0;
#endif
}

template <class T>
struct Listed {
  const uint8_t* bytes;

  EK_FN Lane<T> kept(const Listed& set, Vec<T>, int64_t i) { return widen_bytes(set.bytes + i, Vec<T>{}); }
  EK_FN bool keeps(const Listed& set, T, int64_t i) { return set.bytes[i]; }
  EK_FN Listed chunk(const Listed& set, int64_t start, int n, uint8_t* copy) {  // padded to whole vectors
    std::copy_n(set.bytes + start, n, copy);
    std::fill_n(copy + n, Lanes<T>::n, 0);
    return {copy};
  }
};

constexpr int KEPT = 0, TAIL = 1;

template <class T, int K>
struct PartStats {
  RowStats<T, K> part[2];
  int64_t count = 0;  // tokens of S; K = 1 only
};

template <class T, int K>
struct PartBuffers {
  static constexpr int n = K > 1 ? CHUNK<K> : 1;
  alignas(64) T d[n], e[n], x[K > 1 ? K - 1 : 1][n];
  alignas(64) T kept[n];  // the lanes' bits
};

// d = z − origin, w = e^{d/τ}, x = ẋ − ẋ_peak, origin and ẋ_peak of the part that holds the entry.
template <int K, class T, class In, class Set>
EK_LOOP void first_loop_of_parts(const In* z, const In* const* tangents, int vectors, int64_t ahead, const Set& kept_set, int64_t start,
                                 const RowStats<T, K>* part, const Exp<T>& exponentials, PartBuffers<T, K>& buffers,
                                 ChunkSums<T, K>* found, int64_t* count) {
  constexpr int L = Lanes<T>::n;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const Exp<T> exponential = exponentials;  // locals: nothing stored below can change them
  const Set set = kept_set;
  const Vec<T> none = Vec<T>{} - infinity;
  Vec<T> origin[2], x_peak[2][K > 1 ? K - 1 : 1];
  const In* tangent[K > 1 ? K - 1 : 1];
  ChunkSums<T, K> sums[2] = {{none}, {none}};
  Lane<T> counted{};
  for (int s = 0; s < 2; s++) {
    origin[s] = Vec<T>{} + (part[s].peak > -infinity ? part[s].peak : T(0));
    for (int k = 1; k < K; k++) x_peak[s][k - 1] = Vec<T>{} + part[s].x_peak[k];
  }
  for (int k = 1; k < K; k++) tangent[k - 1] = tangents[k - 1];
  for (int i = 0; i < vectors * L; i += L) {
    __builtin_prefetch(z + i + ahead);
    const Vec<T> v = load(z + i);
    const Lane<T> kept = Set::kept(set, v, start + i);
    sums[KEPT].best = larger(kept ? v : none, sums[KEPT].best);
    sums[TAIL].best = larger(kept ? none : v, sums[TAIL].best);
    const Vec<T> d = clamp(v - (kept ? origin[KEPT] : origin[TAIL]), exponential);
    const Vec<T> e = weight(d, exponential), ed = e * d;
    sums[KEPT].w += kept ? e : Vec<T>{};
    sums[TAIL].w += kept ? Vec<T>{} : e;
    sums[KEPT].wx[0] += kept ? ed : Vec<T>{};
    sums[TAIL].wx[0] += kept ? Vec<T>{} : ed;
    if constexpr (K == 1) counted -= kept;
    if constexpr (K > 1) {
      store(buffers.d + i, d);
      store(buffers.e + i, e);
      store(buffers.kept + i, (Vec<T>)kept);
      for (int k = 1; k < K; k++) {
        __builtin_prefetch(tangent[k - 1] + i + ahead);
        const Vec<T> x = load(tangent[k - 1] + i) - (kept ? x_peak[KEPT][k - 1] : x_peak[TAIL][k - 1]);
        store(buffers.x[k - 1] + i, x);
        const Vec<T> ex = e * x;
        sums[KEPT].wx[k] += kept ? ex : Vec<T>{};
        sums[TAIL].wx[k] += kept ? Vec<T>{} : ex;
      }
    }
  }
  found[KEPT] = sums[KEPT], found[TAIL] = sums[TAIL];
  if constexpr (K == 1)
    for (int j = 0; j < L; j++) *count += counted[j];
}

// Central moments around the chunk's means, which `chunk` holds.
template <int K, class T>
EK_LOOP void second_loop_of_parts(const PartBuffers<T, K>& buffers, int vectors, Moments<K>* chunk) {
  constexpr int L = Lanes<T>::n;
  Vec<T> pair[2][3] = {}, triple[2] = {}, mean[2][K];
  for (int s = 0; s < 2; s++)
    for (int k = 0; k < K; k++) mean[s][k] = Vec<T>{} + T(chunk[s].mean[k]);
  for (int i = 0; i < vectors * L; i += L) {
    const Lane<T> kept = (Lane<T>)load(buffers.kept + i);
    const Vec<T> e = load(buffers.e + i), d = load(buffers.d + i) - (kept ? mean[KEPT][0] : mean[TAIL][0]);
    const Vec<T> x = load(buffers.x[0] + i) - (kept ? mean[KEPT][1] : mean[TAIL][1]), edx = e * d * x;
    pair[KEPT][0] += kept ? edx : Vec<T>{};
    pair[TAIL][0] += kept ? Vec<T>{} : edx;
    if constexpr (K == 3) {
      const Vec<T> y = load(buffers.x[1] + i) - (kept ? mean[KEPT][2] : mean[TAIL][2]);
      const Vec<T> edy = e * d * y, exy = e * x * y, edxy = edx * y;
      pair[KEPT][1] += kept ? edy : Vec<T>{};
      pair[TAIL][1] += kept ? Vec<T>{} : edy;
      pair[KEPT][2] += kept ? exy : Vec<T>{};
      pair[TAIL][2] += kept ? Vec<T>{} : exy;
      triple[KEPT] += kept ? edxy : Vec<T>{};
      triple[TAIL] += kept ? Vec<T>{} : edxy;
    }
  }
  for (int s = 0; s < 2; s++) {
    for (int k = 0; k < (K == 3 ? 3 : 1); k++) chunk[s].pair[k] = sum<T>(pair[s][k]);
    if constexpr (K == 3) chunk[s].triple = sum<T>(triple[s]);
  }
}

template <int K, class T, class In, class Set>
EK_LOOP PartStats<T, K> part_stats(const In* z, const In* const* tangents, int64_t V, const Set& set, double inv_tau) {
  constexpr int L = Lanes<T>::n;
  constexpr T none = -std::numeric_limits<T>::infinity();
  const Exp<T> exponential = Exp<T>::of(inv_tau);
  PartBuffers<T, K> buffers;
  PartStats<T, K> row;
  for (int64_t start = 0; start < V; start += CHUNK<K>) {
    const int n = int(std::min<int64_t>(CHUNK<K>, V - start)), vectors = (n + L - 1) / L;
    const In* x_chunk[K > 1 ? K - 1 : 1];
    for (int k = 1; k < K; k++) x_chunk[k - 1] = tangents[k - 1] + start;

    // Straight from memory, in the hope that the peaks are already known.
    ChunkSums<T, K> sums[2];
    int64_t count = 0;
    bool settled = false;
    if (n % L == 0 && start > 0) {
      first_loop_of_parts<K, T>(z + start, x_chunk, vectors, n, set, start, row.part, exponential, buffers, sums, &count);
      settled = true;
      for (int s = 0; s < 2; s++) settled &= !(largest<T>(sums[s].best) > row.part[s].peak);
    }
    if (!settled) {  // the start of a row, its ragged end, or a new peak: by way of a copy, with the peaks taken out
      alignas(64) T zs[CHUNK<K>], xs[K > 1 ? K - 1 : 1][K > 1 ? CHUNK<K> : 1];
      uint8_t bytes[CHUNK<K> + L];
      const Set local = Set::chunk(set, start, n, bytes);
      widen_chunk<T>(z + start, n, negative_infinity<In>(), zs);
      const T* x_wide[K > 1 ? K - 1 : 1] = {xs[0]};
      for (int k = 1; k < K; k++) {
        widen_chunk<T>(x_chunk[k - 1], n, In{}, xs[k - 1]);
        x_wide[k - 1] = xs[k - 1];
      }
      Vec<T> best[2] = {Vec<T>{} + none, Vec<T>{} + none};
      count = 0;
      for (int i = 0; i < vectors * L; i += L) {
        const Vec<T> v = load(zs + i);
        const Lane<T> kept = Set::kept(local, v, i);
        best[KEPT] = larger(kept ? v : Vec<T>{} + none, best[KEPT]);
        best[TAIL] = larger(kept ? Vec<T>{} + none : v, best[TAIL]);
        for (int j = 0; K == 1 && j < L; j++) count -= kept[j];
      }
      int taken[2] = {-1, -1};
      for (int s = 0; s < 2; s++) {
        const T candidate = largest<T>(best[s]);
        if (!(candidate > row.part[s].peak)) continue;
        int at = 0;
        while (zs[at] != candidate || Set::keeps(local, zs[at], at) != (s == KEPT)) at++;
        T x_peak[K] = {};
        for (int k = 1; k < K; k++) x_peak[k] = xs[k - 1][at];
        new_peak(row.part[s], candidate, start + at, x_peak, inv_tau);
        taken[s] = at;
      }
      for (int at : taken)
        if (at >= 0) zs[at] = none;
      int64_t again = 0;
      first_loop_of_parts<K, T>(zs, x_wide, vectors, 0, local, 0, row.part, exponential, buffers, sums, &again);
    }
    row.count += count;

    Moments<K> chunk[2];
    for (int s = 0; s < 2; s++) {
      chunk[s].weight = sum<T>(sums[s].w);
      for (int k = 0; k < K; k++) {
        chunk[s].mean[k] = sum<T>(sums[s].wx[k]);
        if (chunk[s].weight != 0) chunk[s].mean[k] /= chunk[s].weight;
      }
    }
    if constexpr (K > 1) second_loop_of_parts<K, T>(buffers, vectors, chunk);
    for (int s = 0; s < 2; s++) {
      Moments<K>::divide(&chunk[s], inv_tau);
      Moments<K>::merge(row.part[s].others, chunk[s]);
    }
  }
  return row;
}

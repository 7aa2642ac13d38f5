// Entropy and logprob of a kept set S, log-odds of S against its tail T and the tail's entropy, with their derivatives, for rows
// [begin, end): the five functions of a row (row_kernels.h) with a part each, at a set that is held fixed. Formulas are those of
// entropy_kernels/ops/parts.py:
//
//   λ = lse(z_S) − lse(z_T),    derivatives of (H_S, log p_y/s, λ, H_T) = those of rows (q, g, l) on S, (h, 0, −l) on T.
//
// Included once per instruction set, after part_stats.h.

// What a gradient needs of a part: its peak, Σ e^c without the peak, E[c]; weight −1 where it has no token of positive probability.
struct PartState {
  double peak = 0, others = -1, c_mean = 0;

  EK_FN bool empty(const PartState& p) { return p.others < 0; }
  EK_FN double weight(const PartState& p) { return 1 + p.others; }
};

template <class T, int K>
EK_FN bool is_empty(const RowStats<T, K>& part) {
  return !(part.peak > -std::numeric_limits<T>::infinity()) && part.others.weight == 0;
}

template <class T>
EK_FN PartState state_of(const RowStats<T, 1>& part) {
  if (is_empty(part)) return {};
  return {double(part.peak), part.others.weight + 0.0 * part.peak, RowStats<T, 1>::with_peak(part).mean[0]};
}

EK_FN double entropy_of(const PartState& p) { return std::log1p(p.others) - p.c_mean; }

EK_FN double log_odds_of(const PartState* part, double tau) {
  if (PartState::empty(part[KEPT]) || PartState::empty(part[TAIL])) {
    const PartState& other = PartState::empty(part[KEPT]) ? part[TAIL] : part[KEPT];
    const double undefined = PartState::empty(other) ? std::numeric_limits<double>::quiet_NaN() : 0 * entropy_of(other);
    return (PartState::empty(part[KEPT]) ? -1 : 1) * std::numeric_limits<double>::infinity() + undefined;
  }
  return (part[KEPT].peak - part[TAIL].peak) / tau + (std::log1p(part[KEPT].others) - std::log1p(part[TAIL].others));
}

// H_S, logprob, λ, H_T of row r, its state where that is wanted. Where S is empty the first two are undefined; where T is, its entropy is 0.
template <class In, class T>
EK_FN void put_parts(const PartArgs& a, int64_t r, const In* z, const PartState* part, bool y_kept, int64_t count) {
  const double tau = static_cast<const T*>(a.tau)[r], nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t y = a.y[r];
  const bool none = PartState::empty(part[KEPT]);
  a.values[0][r] = none ? nan : entropy_of(part[KEPT]);
  a.values[1][r] = y < 0    ? 0
                   : none   ? nan
                   : y_kept ? c_at(z, y, part[KEPT].peak, tau) - std::log1p(part[KEPT].others)
                            : -std::numeric_limits<double>::infinity();
  a.values[2][r] = log_odds_of(part, tau);
  a.values[3][r] = PartState::empty(part[TAIL]) ? 0 : entropy_of(part[TAIL]);
  a.count[r] = count;
  for (int s = 0; s < 2; s++) {
    double* to = a.state + 6 * r + 3 * s;
    to[0] = part[s].peak, to[1] = part[s].others, to[2] = part[s].c_mean;
  }
}

// The kept set of row r, as the kernels ask for it.
template <class T>
EK_FN Above<T> set_of_row(const PartArgs& a, int64_t r, Above<T>*) {
  const T t = static_cast<const T*>(a.threshold)[r], lowest_finite = std::numeric_limits<T>::lowest();
  return {t < lowest_finite ? lowest_finite : t};  // −∞ is never kept; a NaN keeps nothing
}

template <class T>
EK_FN Listed<T> set_of_row(const PartArgs& a, int64_t r, Listed<T>*) {
  return {a.kept + r * a.kept_stride};
}

template <class T, class In, class Set>
EK_FN bool keeps_target(const Set& set, const In* z, int64_t y) {
  return y >= 0 && Set::keeps(set, T(widen(z[y])), y);
}

template <class In, class T, class Set>
EK_LOOP void part_values(const PartArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const Set set = set_of_row<T>(a, r, static_cast<Set*>(nullptr));
    const auto row = part_stats<1, T, In>(z, nullptr, a.V, set, 1 / double(static_cast<const T*>(a.tau)[r]));
    const PartState part[2] = {state_of(row.part[KEPT]), state_of(row.part[TAIL])};
    put_parts<In, T>(a, r, z, part, keeps_target<T>(set, z, a.y[r]), row.count);
  }
}

template <class In, class T, class Set>
EK_LOOP void part_tangents(const PartArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* dz = static_cast<const In*>(a.dz) + r * a.dz_stride;
    const double tau = static_cast<const T*>(a.tau)[r];
    const Set set = set_of_row<T>(a, r, static_cast<Set*>(nullptr));
    const auto row = part_stats<2, T, In>(z, &dz, a.V, set, 1 / tau);
    double entropy[2] = {}, mean[2] = {};
    const bool parted = !is_empty(row.part[KEPT]) && !is_empty(row.part[TAIL]);
    for (int s = 0; s < 2; s++) {
      if (is_empty(row.part[s])) continue;
      const auto all = RowStats<T, 2>::with_peak(row.part[s]);
      entropy[s] = -all.pair[0] / all.weight, mean[s] = all.mean[1];
    }
    const int64_t y = a.y[r];
    const double at_peak = row.part[KEPT].x_peak[1];
    a.values[0][r] = entropy[KEPT];
    a.values[1][r] = keeps_target<T>(set, z, y) ? (double(widen(dz[y])) - at_peak) / tau - mean[KEPT] : 0;
    a.values[2][r] = parted ? (at_peak - double(row.part[TAIL].x_peak[1])) / tau + (mean[KEPT] - mean[TAIL]) : 0;
    a.values[3][r] = entropy[TAIL];
  }
}

template <class In, class T, class Set>
EK_LOOP void part_second_tangents(const PartArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* tangents[2] = {static_cast<const In*>(a.du) + r * a.du_stride, static_cast<const In*>(a.dz) + r * a.dz_stride};
    const Set set = set_of_row<T>(a, r, static_cast<Set*>(nullptr));
    const auto row = part_stats<3, T, In>(z, tangents, a.V, set, 1 / double(static_cast<const T*>(a.tau)[r]));
    double covariance[2] = {}, kappa3[2] = {};
    const bool parted = !is_empty(row.part[KEPT]) && !is_empty(row.part[TAIL]);
    for (int s = 0; s < 2; s++) {
      if (is_empty(row.part[s])) continue;
      const auto all = RowStats<T, 3>::with_peak(row.part[s]);
      covariance[s] = all.pair[2] / all.weight, kappa3[s] = all.triple / all.weight;
    }
    a.values[0][r] = -covariance[KEPT] - kappa3[KEPT];
    a.values[1][r] = keeps_target<T>(set, z, a.y[r]) ? -covariance[KEPT] : 0;
    a.values[2][r] = parted ? covariance[KEPT] - covariance[TAIL] : 0;
    a.values[3][r] = -covariance[TAIL] - kappa3[TAIL];
  }
}

// out = e^{d/τ} (k0 + k1 d), d = z − the peak of its part.
template <class T>
struct CotangentOfParts {
  Exp<T> exponential;
  Vec<T> peak[2] = {}, k0[2] = {}, k1[2] = {};
  bool no_tail = true;  // the gradient there is 0

  template <class In>
  EK_FN void write(const CotangentOfParts& f, Lane<T> kept, const In* z, const In*, In* out) {
    const Vec<T> d = clamp(load(z) - (kept ? f.peak[KEPT] : f.peak[TAIL]), f.exponential);
    store(out, weight(d, f.exponential) * ((kept ? f.k0[KEPT] : f.k0[TAIL]) + (kept ? f.k1[KEPT] : f.k1[TAIL]) * d));
  }
};

// out = e^{d/τ} [(x − m)(k0 + k1 (d − d̄)) + k2 + k3 (d − d̄)], x = ż − ż_peak, everything of the part in question.
template <class T>
struct CotangentTangentOfParts {
  Exp<T> exponential;
  Vec<T> peak[2] = {}, x_peak[2] = {}, d_mean[2] = {}, m[2] = {}, k0[2] = {}, k1[2] = {}, k2[2] = {}, k3[2] = {};
  bool no_tail = true;

  template <class In>
  EK_FN void write(const CotangentTangentOfParts& f, Lane<T> kept, const In* z, const In* dz, In* out) {
    const Vec<T> d = clamp(load(z) - (kept ? f.peak[KEPT] : f.peak[TAIL]), f.exponential);
    const Vec<T> centred = d - (kept ? f.d_mean[KEPT] : f.d_mean[TAIL]);
    const Vec<T> spread = (load(dz) - (kept ? f.x_peak[KEPT] : f.x_peak[TAIL])) - (kept ? f.m[KEPT] : f.m[TAIL]);
    const Vec<T> along = (kept ? f.k0[KEPT] : f.k0[TAIL]) + (kept ? f.k1[KEPT] : f.k1[TAIL]) * centred;
    const Vec<T> rest = (kept ? f.k2[KEPT] : f.k2[TAIL]) + (kept ? f.k3[KEPT] : f.k3[TAIL]) * centred;
    store(out, weight(d, f.exponential) * (spread * along + rest));
  }
};

template <class T, class In, class F, class Set>
EK_LOOP void write_parts(const F& function, const Set& kept_set, const In* z, const In* dz, In* out, int64_t V) {
  constexpr int L = Lanes<T>::n;
  const F f = function;  // locals: nothing stored below can change them
  const Set set = kept_set;
  int64_t i = 0;
  const In nothing[L] = {};
  for (; i + L <= V; i += L) {
    const Lane<T> kept = Set::kept(set, load(z + i), i);
    if (f.no_tail && !any<T>(kept))
      std::copy_n(nothing, L, out + i);
    else
      F::write(f, kept, z + i, dz + i, out + i);
  }
  if (i == V) return;
  In z_tail[L] = {}, dz_tail[L] = {}, out_tail[L];
  uint8_t bytes[2 * L];
  const Set local = Set::chunk(set, i, int(V - i), bytes);
  for (int64_t j = i; j < V; j++) z_tail[j - i] = z[j], dz_tail[j - i] = dz[j];
  F::write(f, Set::kept(local, load(z_tail), 0), z_tail, dz_tail, out_tail);
  for (int64_t j = i; j < V; j++) out[j] = out_tail[j - i];
}

template <class In, class T, class Set>
EK_LOOP void part_cotangents(const PartArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    In* out = static_cast<In*>(a.out) + r * a.V;
    const double tau = static_cast<const T*>(a.tau)[r];
    const Set set = set_of_row<T>(a, r, static_cast<Set*>(nullptr));
    PartState part[2];
    if (a.state != nullptr) {
      const double* from = a.state + 6 * r;
      for (int s = 0; s < 2; s++) part[s] = {from[3 * s], from[3 * s + 1], from[3 * s + 2]};
    } else {
      const auto row = part_stats<1, T, In>(z, nullptr, a.V, set, 1 / tau);
      for (int s = 0; s < 2; s++) part[s] = state_of(row.part[s]);
    }
    const int64_t y = a.y[r];
    const bool y_kept = keeps_target<T>(set, z, y), parted = !PartState::empty(part[KEPT]) && !PartState::empty(part[TAIL]);
    const double q[2] = {a.weights[0][r], a.weights[3][r]}, g = y_kept ? a.weights[1][r] : 0;
    const double l[2] = {parted ? a.weights[2][r] : 0, parted ? -a.weights[2][r] : 0};
    CotangentOfParts<T> f{Exp<T>::of(1 / tau)};
    for (int s = 0; s < 2; s++) {
      if (PartState::empty(part[s])) continue;
      // p_s (l − g − q (c − c̄)) / τ, without g on the tail
      const double scale = 1 / (PartState::weight(part[s]) * tau);
      f.peak[s] += T(part[s].peak);
      f.k0[s] += T((l[s] - (s == KEPT ? g : 0) + q[s] * part[s].c_mean) * scale);
      f.k1[s] += T(-q[s] * scale / tau);
      if (s == TAIL) f.no_tail = f.k0[s][0] == 0 && f.k1[s][0] == 0;  // not so where they are NaN
    }
    const double c = y_kept ? c_at(z, y, part[KEPT].peak, tau) : 0;  // before writing: out may be z itself
    write_parts<T>(f, set, z, z, out, a.V);
    if (y_kept && !PartState::empty(part[KEPT])) {
      const PartState& own = part[KEPT];
      const double p = std::exp(c) / PartState::weight(own);
      const double one_minus_p = c == 0 ? own.others / PartState::weight(own) : 1 - p;
      const double from_p = p > 0 ? p * (l[KEPT] - q[KEPT] * (c - own.c_mean)) : 0 * p;
      narrow((from_p + g * one_minus_p) / tau, out[y]);
    }
  }
}

template <class In, class T, class Set>
EK_LOOP void part_cotangent_tangents(const PartArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* dz = static_cast<const In*>(a.dz) + r * a.dz_stride;
    In* out = static_cast<In*>(a.out) + r * a.V;
    const double tau = static_cast<const T*>(a.tau)[r];
    const Set set = set_of_row<T>(a, r, static_cast<Set*>(nullptr));
    const auto row = part_stats<2, T, In>(z, &dz, a.V, set, 1 / tau);
    const bool empty[2] = {is_empty(row.part[KEPT]), is_empty(row.part[TAIL])}, parted = !empty[KEPT] && !empty[TAIL];
    const int64_t y = a.y[r];
    const bool y_kept = keeps_target<T>(set, z, y);
    double w[8];  // q, g, l, h and their tangents
    for (int k = 0; k < 8; k++) w[k] = a.weights[k][r];
    const double q[2] = {w[0], w[3]}, dq[2] = {w[4], w[7]}, g[2] = {y_kept ? w[1] : 0, 0}, dg[2] = {y_kept ? w[5] : 0, 0};
    const double l[2] = {parted ? w[2] : 0, parted ? -w[2] : 0}, dl[2] = {parted ? w[6] : 0, parted ? -w[6] : 0};
    CotangentTangentOfParts<T> f{Exp<T>::of(1 / tau)};
    Moments<2> all[2];
    double d_entropy[2] = {};
    for (int s = 0; s < 2; s++) {
      if (empty[s]) continue;
      all[s] = RowStats<T, 2>::with_peak(row.part[s]);
      d_entropy[s] = -all[s].pair[0] / all[s].weight;
      // p_s [(x − μ)(l − g − q − q (c − c̄)) + l̇ − ġ − q H' − q̇ (c − c̄)] / τ
      const double scale = 1 / (all[s].weight * tau), s2 = scale / tau;  // s2: for a coordinate not yet divided by τ
      f.peak[s] += row.part[s].peak;
      f.x_peak[s] += row.part[s].x_peak[1];
      f.d_mean[s] += T(all[s].mean[0] * tau);
      f.m[s] += T(all[s].mean[1] * tau);
      f.k0[s] += T((l[s] - g[s] - q[s]) * s2);
      f.k1[s] += T(-q[s] * s2 / tau);
      f.k2[s] += T((dl[s] - dg[s] - q[s] * d_entropy[s]) * scale);
      f.k3[s] += T(-dq[s] * s2);
      if (s == TAIL) f.no_tail = f.k0[s][0] == 0 && f.k1[s][0] == 0 && f.k2[s][0] == 0 && f.k3[s][0] == 0;
    }
    const auto& own = row.part[KEPT];
    const double c = y_kept ? c_at(z, y, own.peak, tau) : 0;  // before writing: out may be z or dz itself
    const double dz_y = y_kept ? double(widen(dz[y])) : 0;
    write_parts<T>(f, set, z, dz, out, a.V);
    if (y_kept && !empty[KEPT]) {
      const double p = std::exp(c) / all[KEPT].weight, mu = all[KEPT].mean[1];
      const double one_minus_p = c == 0 ? own.others.weight / all[KEPT].weight : 1 - p;
      const double spread = (dz_y - own.x_peak[1]) / tau - mu, centred = c - all[KEPT].mean[0];
      const double from_p = p > 0 ? p * (spread * (l[KEPT] - g[KEPT] - q[KEPT] - q[KEPT] * centred) + dl[KEPT] -
                                         q[KEPT] * d_entropy[KEPT] - dq[KEPT] * centred)
                                  : 0 * p;
      narrow((from_p + dg[KEPT] * one_minus_p) / tau, out[y]);
    }
  }
}

template <class In, class T, class Set>
static PartKernel part_kernel_for(Function function) {
  switch (function) {
    case Function::values: return part_values<In, T, Set>;
    case Function::tangents: return part_tangents<In, T, Set>;
    case Function::second_tangents: return part_second_tangents<In, T, Set>;
    case Function::cotangents: return part_cotangents<In, T, Set>;
    case Function::cotangent_tangents: return part_cotangent_tangents<In, T, Set>;
  }
  return nullptr;
}

template <class In, class T>
static PartKernel part_kernel_for(Function function, bool listed) {
  return listed ? part_kernel_for<In, T, Listed<T>>(function) : part_kernel_for<In, T, Above<T>>(function);
}

static PartKernel part_kernel_for(Function function, Dtype dtype, bool listed) {
  switch (dtype) {
    case Dtype::Double: return part_kernel_for<double, double>(function, listed);
    case Dtype::Float: return part_kernel_for<float, float>(function, listed);
    case Dtype::BFloat16: return part_kernel_for<BFloat16, float>(function, listed);
    case Dtype::Half: return part_kernel_for<Float16, float>(function, listed);
    default: return nullptr;
  }
}

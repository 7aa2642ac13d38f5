// The five row functions of entropy_kernels/ops/reference.py for rows [begin, end). Formulas and letters are that file's.
//
// Included once per instruction set, after row_stats.h.

template <class In>
EK_FN double c_at(const In* z, int64_t y, double peak, double tau) {
  return (double(widen(z[y])) - peak) / tau;
}

template <class T>
EK_FN void put(const Args& a, int64_t r, double entropy, double logprob, double logsumexp) {
  static_cast<T*>(a.out[0])[r] = T(entropy);
  static_cast<T*>(a.out[1])[r] = T(logprob);
  static_cast<T*>(a.out[2])[r] = T(logsumexp);
}

template <class In, class T>
EK_LOOP void row_values(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const double tau = static_cast<const T*>(a.tau)[r];
    const auto row = row_stats<1, T, In>(z, nullptr, a.V, 1 / tau);
    const auto all = RowStats<T, 1>::with_peak(row);
    const double log_norm = std::log1p(row.others.weight + 0.0 * row.peak);
    const int64_t y = a.y[r];
    put<T>(a, r, log_norm - all.mean[0], y < 0 ? 0 : c_at(z, y, row.peak, tau) - log_norm, row.peak / tau + log_norm);
  }
}

template <class In, class T>
EK_LOOP void row_tangents(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* dz = static_cast<const In*>(a.dz) + r * a.dz_stride;
    const double tau = static_cast<const T*>(a.tau)[r];
    const auto row = row_stats<2, T, In>(z, &dz, a.V, 1 / tau);
    const auto all = RowStats<T, 2>::with_peak(row);
    const double mu = all.mean[1], at_peak = row.x_peak[1];
    const int64_t y = a.y[r];
    put<T>(a, r, -all.pair[0] / all.weight, y < 0 ? 0 : (double(widen(dz[y])) - at_peak) / tau - mu, mu + at_peak / tau);
  }
}

template <class In, class T>
EK_LOOP void row_second_tangents(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* tangents[2] = {static_cast<const In*>(a.du) + r * a.du_stride, static_cast<const In*>(a.dz) + r * a.dz_stride};
    const auto row = row_stats<3, T, In>(z, tangents, a.V, 1 / double(static_cast<const T*>(a.tau)[r]));
    const auto all = RowStats<T, 3>::with_peak(row);
    const double covariance = all.pair[2] / all.weight, kappa3 = all.triple / all.weight;
    put<T>(a, r, -covariance - kappa3, a.y[r] < 0 ? 0 : -covariance, covariance);
  }
}

// The second pass of row_cotangents: out = e^{d/τ} (k0 + k1 d), d = z − z_peak.
template <class T>
struct Cotangent {
  Exp<T> exponential;
  T peak, k0, k1;

  template <class In>
  EK_FN void write(const Cotangent& f, const In* z, const In*, In* out) {
    const Vec<T> d = clamp(load(z) - f.peak, f.exponential);
    store(out, weight(d, f.exponential) * (f.k0 + f.k1 * d));
  }
};

// The second pass of row_cotangent_tangents: out = e^{d/τ} [(x − m)(k0 + k1 (d − d̄)) + k2 + k3 (d − d̄)], where x = ż − ż_peak.
template <class T>
struct CotangentTangent {
  Exp<T> exponential;
  T peak, x_peak, d_mean, m, k0, k1, k2, k3;

  template <class In>
  EK_FN void write(const CotangentTangent& f, const In* z, const In* dz, In* out) {
    const Vec<T> d = clamp(load(z) - f.peak, f.exponential), centred = d - f.d_mean;
    const Vec<T> spread = (load(dz) - f.x_peak) - f.m;
    store(out, weight(d, f.exponential) * (spread * (f.k0 + f.k1 * centred) + (f.k2 + f.k3 * centred)));
  }
};

template <class T, class In, class F>
EK_LOOP void write_row(const F& function, const In* z, const In* dz, In* out, int64_t V) {
  constexpr int L = Lanes<T>::n;
  const F f = function;  // a local: nothing stored below can change it
  int64_t i = 0;
  for (; i + L <= V; i += L) F::write(f, z + i, dz + i, out + i);
  if (i == V) return;
  In z_tail[L] = {}, dz_tail[L] = {}, out_tail[L];
  for (int64_t j = i; j < V; j++) z_tail[j - i] = z[j], dz_tail[j - i] = dz[j];
  F::write(f, z_tail, dz_tail, out_tail);
  for (int64_t j = i; j < V; j++) out[j] = out_tail[j - i];
}

template <class In, class T>
EK_LOOP void row_cotangents(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    In* out = static_cast<In*>(a.out[0]) + r * a.V;
    const double tau = static_cast<const T*>(a.tau)[r];
    const int64_t y = a.y[r];
    const double q = static_cast<const T*>(a.weights[0])[r], l = static_cast<const T*>(a.weights[2])[r];
    const double g = y < 0 ? 0 : static_cast<const T*>(a.weights[1])[r];
    const auto row = row_stats<1, T, In>(z, nullptr, a.V, 1 / tau);
    const auto all = RowStats<T, 1>::with_peak(row);
    const double c_mean = all.mean[0], scale = 1 / (all.weight * tau);
    // p (l − g − q (c − c̄)) / τ
    const Cotangent<T> f{Exp<T>::of(1 / tau), row.peak, T((l - g + q * c_mean) * scale), T(-q * scale / tau)};
    const double c = y < 0 ? 0 : c_at(z, y, row.peak, tau);  // before writing: out may be z itself
    write_row<T>(f, z, z, out, a.V);
    if (y >= 0) {
      const double p = std::exp(c) / all.weight;
      const double one_minus_p = y == row.peak_index ? row.others.weight / all.weight : 1 - p;
      const double from_p = p > 0 ? p * (l - q * (c - c_mean)) : 0 * p;
      narrow((from_p + g * one_minus_p) / tau, out[y]);
    }
  }
}

template <class In, class T>
EK_LOOP void row_cotangent_tangents(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* dz = static_cast<const In*>(a.dz) + r * a.dz_stride;
    In* out = static_cast<In*>(a.out[0]) + r * a.V;
    const double tau = static_cast<const T*>(a.tau)[r];
    const int64_t y = a.y[r];
    double w[6];  // q, g, l and their tangents
    for (int k = 0; k < 6; k++) w[k] = static_cast<const T*>(a.weights[k])[r];
    const double q = w[0], g = y < 0 ? 0 : w[1], l = w[2], dq = w[3], dg = y < 0 ? 0 : w[4], dl = w[5];
    const auto row = row_stats<2, T, In>(z, &dz, a.V, 1 / tau);
    const auto all = RowStats<T, 2>::with_peak(row);
    const double c_mean = all.mean[0], mu = all.mean[1], d_entropy = -all.pair[0] / all.weight;
    const double scale = 1 / (all.weight * tau);
    // p [(x − μ)(l − g − q − q (c − c̄)) + l̇ − ġ − q H' − q̇ (c − c̄)] / τ
    const double s2 = scale / tau;  // for each coordinate that is not yet divided by τ
    const CotangentTangent<T> f{Exp<T>::of(1 / tau), row.peak, row.x_peak[1], T(c_mean * tau), T(mu * tau),
                                T((l - g - q) * s2), T(-q * s2 / tau), T((dl - dg - q * d_entropy) * scale), T(-dq * s2)};
    const double c = y < 0 ? 0 : c_at(z, y, row.peak, tau);  // before writing: out may be z or dz itself
    const double dz_y = y < 0 ? 0 : double(widen(dz[y]));
    write_row<T>(f, z, dz, out, a.V);
    if (y >= 0) {
      const double p = std::exp(c) / all.weight;
      const double one_minus_p = y == row.peak_index ? row.others.weight / all.weight : 1 - p;
      const double spread = (dz_y - row.x_peak[1]) / tau - mu, centred = c - c_mean;
      const double from_p =
          p > 0 ? p * (spread * (l - g - q - q * centred) + dl - q * d_entropy - dq * centred) : 0 * p;
      narrow((from_p + dg * one_minus_p) / tau, out[y]);
    }
  }
}

template <class In, class T>
static Kernel kernel_for(Function function) {
  switch (function) {
    case Function::values: return row_values<In, T>;
    case Function::tangents: return row_tangents<In, T>;
    case Function::second_tangents: return row_second_tangents<In, T>;
    case Function::cotangents: return row_cotangents<In, T>;
    case Function::cotangent_tangents: return row_cotangent_tangents<In, T>;
  }
  return nullptr;
}

static Kernel kernel_for(Function function, Dtype dtype) {
  switch (dtype) {
    case Dtype::Double: return kernel_for<double, double>(function);
    case Dtype::Float: return kernel_for<float, float>(function);
    case Dtype::BFloat16: return kernel_for<BFloat16, float>(function);
    case Dtype::Half: return kernel_for<Float16, float>(function);
    default: return nullptr;
  }
}

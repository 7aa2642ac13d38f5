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
EK_TARGET static void row_values(const Args& a, int64_t begin, int64_t end) {
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
EK_TARGET static void row_tangents(const Args& a, int64_t begin, int64_t end) {
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
EK_TARGET static void row_second_tangents(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* tangents[2] = {static_cast<const In*>(a.du) + r * a.du_stride, static_cast<const In*>(a.dz) + r * a.dz_stride};
    const auto row = row_stats<3, T, In>(z, tangents, a.V, 1 / double(static_cast<const T*>(a.tau)[r]));
    const auto all = RowStats<T, 3>::with_peak(row);
    const double covariance = all.pair[2] / all.weight, kappa3 = all.triple / all.weight;
    put<T>(a, r, -covariance - kappa3, a.y[r] < 0 ? 0 : -covariance, covariance);
  }
}

// out = e^c (k0 + k1 c) over a row; the second pass of row_cotangents.
template <class In, class T>
EK_FN void write_cotangents(const In* z, In* out, int64_t V, T peak, T inv_tau, T k0, T k1) {
  constexpr int L = Lanes<T>::n;
  const Vec<T> least = Vec<T>{} + lowest<T>();
  const int64_t whole = V / L * L;
  In z_tail[L], out_tail[L];
  for (int64_t i = 0; i < V; i += L) {
    const bool tail = i == whole;
    if (tail)
      for (int j = 0; j < L; j++) z_tail[j] = z[std::min(i + j, V - 1)];
    const Vec<T> c = at_least((load(tail ? z_tail : z + i) - peak) * inv_tau, least);
    const Vec<T> v = exp_nonpositive(c) * (k0 + k1 * c);
    store(tail ? out_tail : out + i, v);
  }
  for (int64_t j = whole; j < V; j++) out[j] = out_tail[j - whole];
}

template <class In, class T>
EK_TARGET static void row_cotangents(const Args& a, int64_t begin, int64_t end) {
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
    // p (l − g − q (c − c̄)) / τ, as e^c (k0 + k1 c)
    write_cotangents(z, out, a.V, row.peak, T(1 / tau), T((l - g + q * c_mean) * scale), T(-q * scale));
    if (y >= 0) {
      const double c = c_at(z, y, row.peak, tau), p = std::exp(c) / all.weight;
      const double one_minus_p = y == row.peak_index ? row.others.weight / all.weight : 1 - p;
      const double from_p = p > 0 ? p * (l - q * (c - c_mean)) : 0 * p;
      narrow((from_p + g * one_minus_p) / tau, out[y]);
    }
  }
}

// out = e^c [(x − μ)(k0 + k1 (c − c̄)) + k2 + k3 (c − c̄)] over a row, x = (ż − ż_peak)/τ.
template <class In, class T>
EK_FN void write_cotangent_tangents(const In* z, const In* dz, In* out, int64_t V, const RowStats<T, 2>& row, T inv_tau,
                                    T c_mean, T mu, const T* k) {
  constexpr int L = Lanes<T>::n;
  const Vec<T> least = Vec<T>{} + lowest<T>();
  const T peak = row.peak, x_peak = row.x_peak[1];
  const int64_t whole = V / L * L;
  In z_tail[L], dz_tail[L], out_tail[L];
  for (int64_t i = 0; i < V; i += L) {
    const bool tail = i == whole;
    if (tail)
      for (int j = 0; j < L; j++) z_tail[j] = z[std::min(i + j, V - 1)], dz_tail[j] = dz[std::min(i + j, V - 1)];
    const Vec<T> c = at_least((load(tail ? z_tail : z + i) - peak) * inv_tau, least);
    const Vec<T> spread = (load(tail ? dz_tail : dz + i) - x_peak) * inv_tau - mu;
    const Vec<T> centred = c - c_mean;
    const Vec<T> v = exp_nonpositive(c) * (spread * (k[0] + k[1] * centred) + (k[2] + k[3] * centred));
    store(tail ? out_tail : out + i, v);
  }
  for (int64_t j = whole; j < V; j++) out[j] = out_tail[j - whole];
}

template <class In, class T>
EK_TARGET static void row_cotangent_tangents(const Args& a, int64_t begin, int64_t end) {
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
    const T k[4] = {T((l - g - q) * scale), T(-q * scale), T((dl - dg - q * d_entropy) * scale), T(-dq * scale)};
    write_cotangent_tangents<In, T>(z, dz, out, a.V, row, T(1 / tau), T(c_mean), T(mu), k);
    if (y >= 0) {
      const double c = c_at(z, y, row.peak, tau), p = std::exp(c) / all.weight;
      const double one_minus_p = y == row.peak_index ? row.others.weight / all.weight : 1 - p;
      const double spread = (double(widen(dz[y])) - row.x_peak[1]) / tau - mu, centred = c - c_mean;
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

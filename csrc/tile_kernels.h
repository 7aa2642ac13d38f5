// Rows that come a tile of columns at a time: what the tiles so far have found is carried in memory from one to the next.
//
// Included once per instruction set, after row_kernels.h. A carry is [R, 3] in float64: the peak, the weight of all the other entries and
// their mean c; with a tangent [R, 6]: also the tangent at the peak, the mean of x, and Σ w (c − c̄)(x − x̄). It starts as (−inf, 0, …).
// The state that gradients need is [R, 3]: the peak, s1, and E_p[z − peak] (ops/tiles.py).

template <class In, class T, int K>
EK_LOOP void carry_on(const TileArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    const In* dz = K > 1 ? static_cast<const In*>(a.dz) + r * a.dz_stride : nullptr;
    double* carry = a.carry + r * 3 * K;
    RowStats<T, K> row;
    row.peak = T(carry[0]), row.others.weight = carry[1], row.others.mean[0] = carry[2];
    if constexpr (K > 1) row.x_peak[1] = T(carry[3]), row.others.mean[1] = carry[4], row.others.pair[0] = carry[5];
    row = row_stats<K, T, In>(z, &dz, a.V, 1 / double(static_cast<const T*>(a.tau)[r]), row);
    carry[0] = row.peak, carry[1] = row.others.weight, carry[2] = row.others.mean[0];
    if constexpr (K > 1) carry[3] = row.x_peak[1], carry[4] = row.others.mean[1], carry[5] = row.others.pair[0];
  }
}

// row_cotangents of a tile of a row whose state is known. `y` counts from the tile's first column; where it is negative,
// because the target is in another tile or there is none, g is none of this tile's: the caller has taken it from l.
template <class In, class T>
EK_LOOP void tile_cotangents(const TileArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const In* z = static_cast<const In*>(a.z) + r * a.z_stride;
    In* out = static_cast<In*>(a.out) + r * a.V;
    const double tau = static_cast<const T*>(a.tau)[r];
    const int64_t y = a.y[r];
    const double q = static_cast<const T*>(a.weights[0])[r], l = static_cast<const T*>(a.weights[2])[r];
    const double g = y < 0 ? 0 : static_cast<const T*>(a.weights[1])[r];
    const double peak = a.state[r * 3], s1 = a.state[r * 3 + 1], c_mean = a.state[r * 3 + 2] / tau;
    const double scale = 1 / ((1 + s1) * tau);
    const Cotangent<T> f{Exp<T>::of(1 / tau), T(peak), T((l - g + q * c_mean) * scale), T(-q * scale / tau)};
    const double c = y < 0 ? 0 : c_at(z, y, peak, tau);  // before writing: out may be z itself
    write_row<T>(f, z, z, out, a.V);
    if (y >= 0) {
      const double p = std::exp(c) / (1 + s1);
      const double one_minus_p = c == 0 ? s1 / (1 + s1) : 1 - p;
      const double from_p = p > 0 ? p * (l - q * (c - c_mean)) : 0 * p;
      narrow((from_p + g * one_minus_p) / tau, out[y]);
    }
  }
}

template <class In, class T>
static TileKernel tile_kernel_for(TileFunction function) {
  switch (function) {
    case TileFunction::values: return carry_on<In, T, 1>;
    case TileFunction::tangents: return carry_on<In, T, 2>;
    case TileFunction::cotangents: return tile_cotangents<In, T>;
  }
  return nullptr;
}

static TileKernel tile_kernel_for(TileFunction function, Dtype dtype) {
  switch (dtype) {
    case Dtype::Double: return tile_kernel_for<double, double>(function);
    case Dtype::Float: return tile_kernel_for<float, float>(function);
    case Dtype::BFloat16: return tile_kernel_for<BFloat16, float>(function);
    case Dtype::Half: return tile_kernel_for<Float16, float>(function);
    default: return nullptr;
  }
}

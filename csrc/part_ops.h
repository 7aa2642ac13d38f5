// The ops of part_kernels.h: arguments checked, an instruction set picked, rows spread over threads. Included once, by rows.cpp.

PartKernel pick_parts(Function function, Dtype dtype, bool listed, int64_t level) {
  check_level(level);
#if defined(__x86_64__)
  if (level == 2) return avx512::part_kernel_for(function, dtype, listed);
  if (level == 1) return avx2::part_kernel_for(function, dtype, listed);
#endif
  return baseline::part_kernel_for(function, dtype, listed);
}

// `kept` is a threshold for each row, [R], or the set itself, bool [R, V].
PartArgs part_arguments(const Tensor& z, const Tensor& kept, const Tensor& y, const Tensor& tau) {
  const Args row = arguments(z, y, tau);
  PartArgs a;
  a.R = row.R, a.V = row.V, a.z = row.z, a.z_stride = row.z_stride, a.y = row.y, a.tau = row.tau;
  if (kept.scalar_type() == Dtype::Bool) {
    STD_TORCH_CHECK(kept.dim() == 2 && kept.size(0) == a.R && kept.size(1) == a.V && (a.R == 0 || a.V == 1 || kept.stride(1) == 1),
                    "rows: a kept set must have the shape [R, V] of z and contiguous rows");
    a.kept = static_cast<const uint8_t*>(kept.const_data_ptr()), a.kept_stride = kept.stride(0);
  } else {
    check_vector(kept, a.R, compute_dtype(z), "the threshold");
    a.threshold = kept.const_data_ptr();
  }
  return a;
}

void set_part_values(PartArgs* a, const Tensor& entropy, const Tensor& logprob, const Tensor& log_odds, const Tensor& tail_entropy) {
  const Tensor* out[4] = {&entropy, &logprob, &log_odds, &tail_entropy};
  for (int i = 0; i < 4; i++) {
    check_vector(*out[i], a->R, Dtype::Double, "an output");
    a->values[i] = out[i]->mutable_data_ptr<double>();
  }
}

void set_part_state(PartArgs* a, const Tensor& state) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == a->R && state.size(1) == 6 && state.is_contiguous() &&
                      state.scalar_type() == Dtype::Double,
                  "rows: a state of parts must be a contiguous float64 [R, 6]");
  a->state = state.mutable_data_ptr<double>();
}

void set_part_weight(PartArgs* a, int k, const Tensor& w) {
  check_vector(w, a->R, Dtype::Double, "a cotangent");
  a->weights[k] = w.const_data_ptr<double>();
}

void set_part_gradient(PartArgs* a, const Tensor& z, const Tensor& out) {
  int64_t stride = 0;
  rows_of(out, z, &stride, "the output");
  STD_TORCH_CHECK(out.is_contiguous(), "rows: the output must be contiguous");
  a->out = out.mutable_data_ptr();
}

void run_parts(Function function, const Tensor& z, const PartArgs& a, int64_t level) {
  over_rows(pick_parts(function, z.scalar_type(), a.kept != nullptr, level), a);
}

void part_values(const Tensor& z, const Tensor& kept, const Tensor& y, const Tensor& tau, const Tensor& entropy, const Tensor& logprob,
                 const Tensor& log_odds, const Tensor& tail_entropy, const Tensor& kept_count, const Tensor& state, int64_t level) {
  PartArgs a = part_arguments(z, kept, y, tau);
  set_part_values(&a, entropy, logprob, log_odds, tail_entropy);
  check_vector(kept_count, a.R, Dtype::Long, "kept_count");
  a.count = kept_count.mutable_data_ptr<int64_t>();
  set_part_state(&a, state);
  run_parts(Function::values, z, a, level);
}

void part_tangents(const Tensor& z, const Tensor& kept, const Tensor& dz, const Tensor& y, const Tensor& tau, const Tensor& entropy,
                   const Tensor& logprob, const Tensor& log_odds, const Tensor& tail_entropy, int64_t level) {
  PartArgs a = part_arguments(z, kept, y, tau);
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  set_part_values(&a, entropy, logprob, log_odds, tail_entropy);
  run_parts(Function::tangents, z, a, level);
}

void part_second_tangents(const Tensor& z, const Tensor& kept, const Tensor& du, const Tensor& dz, const Tensor& y, const Tensor& tau,
                          const Tensor& entropy, const Tensor& logprob, const Tensor& log_odds, const Tensor& tail_entropy,
                          int64_t level) {
  PartArgs a = part_arguments(z, kept, y, tau);
  a.du = rows_of(du, z, &a.du_stride, "du");
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  set_part_values(&a, entropy, logprob, log_odds, tail_entropy);
  run_parts(Function::second_tangents, z, a, level);
}

// `state` is that of part_values at the same rows and set, or [R, 0].
void part_cotangents(const Tensor& z, const Tensor& kept, const Tensor& y, const Tensor& tau, const Tensor& state, const Tensor& q,
                     const Tensor& g, const Tensor& l, const Tensor& h, const Tensor& out, int64_t level) {
  PartArgs a = part_arguments(z, kept, y, tau);
  const Tensor* weights[4] = {&q, &g, &l, &h};
  for (int k = 0; k < 4; k++) set_part_weight(&a, k, *weights[k]);
  if (state.dim() != 2 || state.size(1) != 0) set_part_state(&a, state);
  set_part_gradient(&a, z, out);
  run_parts(Function::cotangents, z, a, level);
}

void part_cotangent_tangents(const Tensor& z, const Tensor& kept, const Tensor& dz, const Tensor& y, const Tensor& tau, const Tensor& q,
                             const Tensor& g, const Tensor& l, const Tensor& h, const Tensor& dq, const Tensor& dg, const Tensor& dl,
                             const Tensor& dh, const Tensor& out, int64_t level) {
  PartArgs a = part_arguments(z, kept, y, tau);
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  const Tensor* weights[8] = {&q, &g, &l, &h, &dq, &dg, &dl, &dh};
  for (int k = 0; k < 8; k++) set_part_weight(&a, k, *weights[k]);
  set_part_gradient(&a, z, out);
  run_parts(Function::cotangent_tangents, z, a, level);
}

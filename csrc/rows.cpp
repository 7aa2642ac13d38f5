// Entropy, logprob and logsumexp of vocabulary rows with their derivatives, on the CPU.
//
// The functions, letters and results are those of entropy_kernels/ops/reference.py. simd.h, row_stats.h and row_kernels.h
// are compiled once per instruction set; the best one the processor has is taken when the op runs. Against torch's stable
// ABI only, so one build serves every torch from 2.10 on. Outputs are allocated by the caller and written in full.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;
using Dtype = torch::headeronly::ScalarType;

enum class Function { values, tangents, second_tangents, cotangents, cotangent_tangents };

// Rows are contiguous, `*_stride` apart; tau and weights are of the compute dtype; outputs are contiguous.
struct Args {
  int64_t R = 0, V = 0;
  const void *z = nullptr, *dz = nullptr, *du = nullptr, *tau = nullptr;
  int64_t z_stride = 0, dz_stride = 0, du_stride = 0;
  const int64_t* y = nullptr;
  const void* weights[6] = {};  // q, g, l, q̇, ġ, l̇
  void* out[3] = {};
};
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

// Rows in two parts: a kept set, given by `threshold` or by `kept`, and its tail.
struct PartArgs {
  int64_t R = 0, V = 0;
  const void *z = nullptr, *dz = nullptr, *du = nullptr, *tau = nullptr, *threshold = nullptr;
  const uint8_t* kept = nullptr;
  int64_t z_stride = 0, dz_stride = 0, du_stride = 0, kept_stride = 0;
  const int64_t* y = nullptr;
  const double* weights[8] = {};  // q, g, l, h, then their tangents
  double *values[4] = {}, *state = nullptr;
  int64_t* count = nullptr;
  void* out = nullptr;
  bool with_tail = false;  // truncated_parts: else the state of the tail is that of an empty one
};
using PartKernel = void (*)(const PartArgs&, int64_t begin, int64_t end);

// Rows that come a tile of columns at a time.
enum class TileFunction { values, tangents, cotangents };
struct TileArgs {
  int64_t R = 0, V = 0, z_stride = 0, dz_stride = 0;
  const void *z = nullptr, *dz = nullptr, *tau = nullptr;
  const int64_t* y = nullptr;
  const void* weights[3] = {};  // q, g, l
  const double* state = nullptr;
  double* carry = nullptr;
  void* out = nullptr;
};
using TileKernel = void (*)(const TileArgs&, int64_t begin, int64_t end);

// The kept set of each row by its threshold and, where `count` is given, the values that go with it: entropy and logprob, and where they
// have a place kept mass, tail entropy, full entropy; or, where `parts` has a place for them, what part_values gives.
struct TruncatedArgs {
  int64_t R = 0, V = 0, z_stride = 0;
  const void *z = nullptr, *tau = nullptr;
  const int64_t *y = nullptr, *k = nullptr;
  const double* p = nullptr;
  void *threshold = nullptr, *out[5] = {};
  int64_t* count = nullptr;
  PartArgs parts;
};
using TruncatedKernel = void (*)(const TruncatedArgs&, int64_t begin, int64_t end);

// Two bytes each, told apart by the type alone.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class In>
In negative_infinity() {
  return -std::numeric_limits<In>::infinity();
}
template <>
BFloat16 negative_infinity() {
  return {0xff80};
}
template <>
Float16 negative_infinity() {
  return {0xfc00};
}

// One instruction set each. The baseline's 16 bytes are what every x86-64 and every 64-bit ARM processor has.
namespace baseline {
#define EK_BYTES 16
#define EK_TARGET
#include "simd.h"
#include "row_stats.h"
#include "row_kernels.h"
#include "part_stats.h"
#include "part_kernels.h"
#include "tile_kernels.h"
#include "truncated_kernels.h"
#undef EK_FN
#undef EK_LOOP
#undef EK_BYTES
#undef EK_TARGET
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
#define EK_BYTES 32
#define EK_TARGET __attribute__((target("avx2,fma")))
#include "simd.h"
#include "row_stats.h"
#include "row_kernels.h"
#include "part_stats.h"
#include "part_kernels.h"
#include "tile_kernels.h"
#include "truncated_kernels.h"
#undef EK_FN
#undef EK_LOOP
#undef EK_BYTES
#undef EK_TARGET
}  // namespace avx2

namespace avx512 {
#define EK_BYTES 64
#define EK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "simd.h"
#include "row_stats.h"
#include "row_kernels.h"
#include "part_stats.h"
#include "part_kernels.h"
#include "tile_kernels.h"
#include "truncated_kernels.h"
#undef EK_FN
#undef EK_LOOP
#undef EK_BYTES
#undef EK_TARGET
}  // namespace avx512
#endif

// 0 baseline, 1 AVX2, 2 AVX-512: the highest this processor has.
int64_t best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

void check_level(int64_t level) {
  STD_TORCH_CHECK(level >= 0 && level <= best_level(), "rows: this processor has instruction levels 0..", best_level(),
                  ", got ", level);
}

Kernel pick(Function function, Dtype dtype, int64_t level) {
  check_level(level);
#if defined(__x86_64__)
  if (level == 2) return avx512::kernel_for(function, dtype);
  if (level == 1) return avx2::kernel_for(function, dtype);
#endif
  return baseline::kernel_for(function, dtype);
}

TruncatedKernel pick_truncated(Dtype dtype, int64_t level) {
  check_level(level);
#if defined(__x86_64__)
  if (level == 2) return avx512::truncated_kernel_for(dtype);
  if (level == 1) return avx2::truncated_kernel_for(dtype);
#endif
  return baseline::truncated_kernel_for(dtype);
}

TileKernel pick_tile(TileFunction function, Dtype dtype, int64_t level) {
  check_level(level);
#if defined(__x86_64__)
  if (level == 2) return avx512::tile_kernel_for(function, dtype);
  if (level == 1) return avx2::tile_kernel_for(function, dtype);
#endif
  return baseline::tile_kernel_for(function, dtype);
}

const void* rows_of(const Tensor& x, const Tensor& z, int64_t* stride, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == z.size(0) && x.size(1) == z.size(1), "rows: ", name,
                  " must have the shape [R, V] of z");
  STD_TORCH_CHECK(x.scalar_type() == z.scalar_type(), "rows: ", name, " must have the dtype of z");
  STD_TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, "rows: the rows of ", name, " must be contiguous");
  *stride = x.stride(0);
  return x.const_data_ptr();
}

void check_vector(const Tensor& x, int64_t R, Dtype dtype, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == R && x.is_contiguous() && x.scalar_type() == dtype, "rows: ", name,
                  " must be a contiguous [R] of the right dtype");
}

Dtype compute_dtype(const Tensor& z) { return z.scalar_type() == Dtype::Double ? Dtype::Double : Dtype::Float; }

Args arguments(const Tensor& z, const Tensor& y, const Tensor& tau) {
  Args a;
  a.z = rows_of(z, z, &a.z_stride, "z");
  a.R = z.size(0), a.V = z.size(1);
  STD_TORCH_CHECK(a.V > 0 || a.R == 0, "rows: a row needs at least one column");
  check_vector(y, a.R, Dtype::Long, "y");
  check_vector(tau, a.R, compute_dtype(z), "tau");
  a.y = y.const_data_ptr<int64_t>(), a.tau = tau.const_data_ptr();
  for (int64_t r = 0; r < a.R; r++) STD_TORCH_CHECK(a.y[r] < a.V, "rows: target ", a.y[r], " is outside ", a.V, " columns");
  return a;
}

void set_outputs(Args* a, const Tensor& z, const Tensor& entropy, const Tensor& logprob, const Tensor& logsumexp) {
  const Tensor* out[3] = {&entropy, &logprob, &logsumexp};
  for (int k = 0; k < 3; k++) {
    check_vector(*out[k], a->R, compute_dtype(z), "an output");
    a->out[k] = out[k]->mutable_data_ptr();
  }
}

void set_gradient(Args* a, const Tensor& z, const Tensor& out) {
  int64_t stride = 0;
  rows_of(out, z, &stride, "the output");
  STD_TORCH_CHECK(out.is_contiguous(), "rows: the output must be contiguous");
  a->out[0] = out.mutable_data_ptr();
}

template <class Kernel, class A>
void over_rows(Kernel kernel, const A& a) {
  STD_TORCH_CHECK(kernel != nullptr, "rows: z must be float64, float32, bfloat16 or float16");
  constexpr int64_t worth_a_thread = 1 << 15;  // elements
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, a.V));
  torch::stable::parallel_for(0, a.R, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void run(Function function, const Tensor& z, const Args& a, int64_t level) {
  over_rows(pick(function, z.scalar_type(), level), a);
}

void values(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& entropy, const Tensor& logprob,
            const Tensor& logsumexp, int64_t level) {
  Args a = arguments(z, y, tau);
  set_outputs(&a, z, entropy, logprob, logsumexp);
  run(Function::values, z, a, level);
}

void tangents(const Tensor& z, const Tensor& dz, const Tensor& y, const Tensor& tau, const Tensor& entropy,
              const Tensor& logprob, const Tensor& logsumexp, int64_t level) {
  Args a = arguments(z, y, tau);
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  set_outputs(&a, z, entropy, logprob, logsumexp);
  run(Function::tangents, z, a, level);
}

void second_tangents(const Tensor& z, const Tensor& du, const Tensor& dz, const Tensor& y, const Tensor& tau,
                     const Tensor& entropy, const Tensor& logprob, const Tensor& logsumexp, int64_t level) {
  Args a = arguments(z, y, tau);
  a.du = rows_of(du, z, &a.du_stride, "du");
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  set_outputs(&a, z, entropy, logprob, logsumexp);
  run(Function::second_tangents, z, a, level);
}

void set_weight(Args* a, int k, const Tensor& z, const Tensor& w) {
  check_vector(w, a->R, compute_dtype(z), "a cotangent");
  a->weights[k] = w.const_data_ptr();
}

void cotangents(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& q, const Tensor& g, const Tensor& l,
                const Tensor& out, int64_t level) {
  Args a = arguments(z, y, tau);
  const Tensor* weights[3] = {&q, &g, &l};
  for (int k = 0; k < 3; k++) set_weight(&a, k, z, *weights[k]);
  set_gradient(&a, z, out);
  run(Function::cotangents, z, a, level);
}

void cotangent_tangents(const Tensor& z, const Tensor& dz, const Tensor& y, const Tensor& tau, const Tensor& q,
                        const Tensor& g, const Tensor& l, const Tensor& dq, const Tensor& dg, const Tensor& dl,
                        const Tensor& out, int64_t level) {
  Args a = arguments(z, y, tau);
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  const Tensor* weights[6] = {&q, &g, &l, &dq, &dg, &dl};
  for (int k = 0; k < 6; k++) set_weight(&a, k, z, *weights[k]);
  set_gradient(&a, z, out);
  run(Function::cotangent_tangents, z, a, level);
}

TileArgs tile(const Tensor& z, const Tensor& tau) {
  TileArgs a;
  a.z = rows_of(z, z, &a.z_stride, "z");
  a.R = z.size(0), a.V = z.size(1);
  check_vector(tau, a.R, compute_dtype(z), "tau");
  a.tau = tau.const_data_ptr();
  return a;
}

void check_carry(const Tensor& x, int64_t R, int64_t numbers, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == R && x.size(1) == numbers && x.is_contiguous() &&
                      x.scalar_type() == Dtype::Double,
                  "rows: ", name, " must be a contiguous [R, ", numbers, "] in float64");
}

void tile_values(const Tensor& z, const Tensor& tau, const Tensor& carry, int64_t level) {
  TileArgs a = tile(z, tau);
  check_carry(carry, a.R, 3, "the carry");
  a.carry = carry.mutable_data_ptr<double>();
  over_rows(pick_tile(TileFunction::values, z.scalar_type(), level), a);
}

void tile_tangents(const Tensor& z, const Tensor& dz, const Tensor& tau, const Tensor& carry, int64_t level) {
  TileArgs a = tile(z, tau);
  a.dz = rows_of(dz, z, &a.dz_stride, "dz");
  check_carry(carry, a.R, 6, "the carry");
  a.carry = carry.mutable_data_ptr<double>();
  over_rows(pick_tile(TileFunction::tangents, z.scalar_type(), level), a);
}

void tile_cotangents(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& state, const Tensor& q,
                     const Tensor& g, const Tensor& l, const Tensor& out, int64_t level) {
  TileArgs a = tile(z, tau);
  check_vector(y, a.R, Dtype::Long, "y");
  a.y = y.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < a.R; r++) STD_TORCH_CHECK(a.y[r] < a.V, "rows: target ", a.y[r], " is outside ", a.V, " columns");
  check_carry(state, a.R, 3, "the state");
  a.state = state.const_data_ptr<double>();
  const Tensor* weights[3] = {&q, &g, &l};
  for (int k = 0; k < 3; k++) {
    check_vector(*weights[k], a.R, compute_dtype(z), "a cotangent");
    a.weights[k] = weights[k]->const_data_ptr();
  }
  int64_t stride = 0;
  rows_of(out, z, &stride, "the output");
  STD_TORCH_CHECK(out.is_contiguous(), "rows: the output must be contiguous");
  a.out = out.mutable_data_ptr();
  over_rows(pick_tile(TileFunction::cotangents, z.scalar_type(), level), a);
}

TruncatedArgs truncation(const Tensor& z, const Tensor& tau, const Tensor& top_k, const Tensor& top_p, const Tensor& threshold) {
  TruncatedArgs a;
  a.z = rows_of(z, z, &a.z_stride, "z");
  a.R = z.size(0), a.V = z.size(1);
  STD_TORCH_CHECK(a.V > 0 || a.R == 0, "rows: a row needs at least one column");
  check_vector(tau, a.R, compute_dtype(z), "tau");
  check_vector(top_k, a.R, Dtype::Long, "top_k");
  check_vector(top_p, a.R, Dtype::Double, "top_p");
  check_vector(threshold, a.R, compute_dtype(z), "the threshold");
  a.tau = tau.const_data_ptr(), a.k = top_k.const_data_ptr<int64_t>(), a.p = top_p.const_data_ptr<double>();
  a.threshold = threshold.mutable_data_ptr();
  for (int64_t r = 0; r < a.R; r++)
    STD_TORCH_CHECK(a.k[r] > 0 && a.p[r] > 0, "rows: top_k and top_p must be positive, got ", a.k[r], " and ", a.p[r]);
  return a;
}

void thresholds(const Tensor& z, const Tensor& tau, const Tensor& top_k, const Tensor& top_p, const Tensor& threshold,
                int64_t level) {
  over_rows(pick_truncated(z.scalar_type(), level), truncation(z, tau, top_k, top_p, threshold));
}

#include "part_ops.h"

// Kept mass, tail and full entropy only where all three are given.
void truncated_values(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& top_k, const Tensor& top_p,
                      const Tensor& threshold, const Tensor& entropy, const Tensor& logprob, const Tensor& kept_mass,
                      const Tensor& kept_count, const Tensor& tail_entropy, const Tensor& full_entropy, bool with_tail, int64_t level) {
  TruncatedArgs a = truncation(z, tau, top_k, top_p, threshold);
  a.y = arguments(z, y, tau).y;
  check_vector(kept_count, a.R, Dtype::Long, "kept_count");
  a.count = kept_count.mutable_data_ptr<int64_t>();
  const Tensor* out[5] = {&entropy, &logprob, &kept_mass, &tail_entropy, &full_entropy};
  for (int i = 0; i < (with_tail ? 5 : 2); i++) {
    check_vector(*out[i], a.R, compute_dtype(z), "an output");
    a.out[i] = out[i]->mutable_data_ptr();
  }
  over_rows(pick_truncated(z.scalar_type(), level), a);
}

// part_values of the set that top-k and top-p define, and its threshold; without the tail as though it were empty.
void truncated_parts(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& top_k, const Tensor& top_p,
                     const Tensor& threshold, const Tensor& entropy, const Tensor& logprob, const Tensor& log_odds,
                     const Tensor& tail_entropy, const Tensor& kept_count, const Tensor& state, bool with_tail, int64_t level) {
  TruncatedArgs a = truncation(z, tau, top_k, top_p, threshold);
  a.parts = part_arguments(z, threshold, y, tau);
  set_part_values(&a.parts, entropy, logprob, log_odds, tail_entropy);
  check_vector(kept_count, a.R, Dtype::Long, "kept_count");
  set_part_state(&a.parts, state);
  a.parts.with_tail = with_tail;
  a.y = a.parts.y, a.count = a.parts.count = kept_count.mutable_data_ptr<int64_t>();
  over_rows(pick_truncated(z.scalar_type(), level), a);
}

}  // namespace

#define EK_OUT "Tensor(a!) entropy, Tensor(b!) logprob, Tensor(c!) logsumexp, int level) -> ()"
#define EK_PARTS "Tensor(a!) entropy, Tensor(b!) logprob, Tensor(c!) log_odds, Tensor(d!) tail_entropy"

STABLE_TORCH_LIBRARY(entropy_kernels, m) {
  m.def("best_level() -> int");
  m.def("row_values(Tensor z, Tensor y, Tensor tau, " EK_OUT);
  m.def("row_tangents(Tensor z, Tensor dz, Tensor y, Tensor tau, " EK_OUT);
  m.def("row_second_tangents(Tensor z, Tensor du, Tensor dz, Tensor y, Tensor tau, " EK_OUT);
  m.def("row_cotangents(Tensor z, Tensor y, Tensor tau, Tensor q, Tensor g, Tensor l, Tensor(a!) out, int level) -> ()");
  m.def(
      "row_cotangent_tangents(Tensor z, Tensor dz, Tensor y, Tensor tau, Tensor q, Tensor g, Tensor l, "
      "Tensor dq, Tensor dg, Tensor dl, Tensor(a!) out, int level) -> ()");
  m.def("tile_values(Tensor z, Tensor tau, Tensor(a!) carry, int level) -> ()");
  m.def("tile_tangents(Tensor z, Tensor dz, Tensor tau, Tensor(a!) carry, int level) -> ()");
  m.def(
      "tile_cotangents(Tensor z, Tensor y, Tensor tau, Tensor state, Tensor q, Tensor g, Tensor l, Tensor(a!) out, int level) "
      "-> ()");
  m.def("row_thresholds(Tensor z, Tensor tau, Tensor top_k, Tensor top_p, Tensor(a!) threshold, int level) -> ()");
  m.def(
      "truncated_values(Tensor z, Tensor y, Tensor tau, Tensor top_k, Tensor top_p, Tensor(a!) threshold, Tensor(b!) entropy, "
      "Tensor(c!) logprob, Tensor(d!) kept_mass, Tensor(e!) kept_count, Tensor(f!) tail_entropy, Tensor(g!) full_entropy, "
      "bool with_tail, int level) -> ()");
  m.def(
      "truncated_parts(Tensor z, Tensor y, Tensor tau, Tensor top_k, Tensor top_p, Tensor(g!) threshold, " EK_PARTS
      ", Tensor(e!) kept_count, Tensor(f!) state, bool with_tail, int level) -> ()");
  m.def(
      "part_values(Tensor z, Tensor kept, Tensor y, Tensor tau, " EK_PARTS
      ", Tensor(e!) kept_count, Tensor(f!) state, int level) -> ()");
  m.def("part_tangents(Tensor z, Tensor kept, Tensor dz, Tensor y, Tensor tau, " EK_PARTS ", int level) -> ()");
  m.def("part_second_tangents(Tensor z, Tensor kept, Tensor du, Tensor dz, Tensor y, Tensor tau, " EK_PARTS ", int level) -> ()");
  m.def(
      "part_cotangents(Tensor z, Tensor kept, Tensor y, Tensor tau, Tensor state, Tensor q, Tensor g, Tensor l, Tensor h, "
      "Tensor(a!) out, int level) -> ()");
  m.def(
      "part_cotangent_tangents(Tensor z, Tensor kept, Tensor dz, Tensor y, Tensor tau, Tensor q, Tensor g, Tensor l, Tensor h, "
      "Tensor dq, Tensor dg, Tensor dl, Tensor dh, Tensor(a!) out, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels, CompositeExplicitAutograd, m) { m.impl("best_level", TORCH_BOX(&best_level)); }

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels, CPU, m) {
  m.impl("row_values", TORCH_BOX(&values));
  m.impl("row_tangents", TORCH_BOX(&tangents));
  m.impl("row_second_tangents", TORCH_BOX(&second_tangents));
  m.impl("row_cotangents", TORCH_BOX(&cotangents));
  m.impl("row_cotangent_tangents", TORCH_BOX(&cotangent_tangents));
  m.impl("tile_values", TORCH_BOX(&tile_values));
  m.impl("tile_tangents", TORCH_BOX(&tile_tangents));
  m.impl("tile_cotangents", TORCH_BOX(&tile_cotangents));
  m.impl("row_thresholds", TORCH_BOX(&thresholds));
  m.impl("truncated_values", TORCH_BOX(&truncated_values));
  m.impl("truncated_parts", TORCH_BOX(&truncated_parts));
  m.impl("part_values", TORCH_BOX(&part_values));
  m.impl("part_tangents", TORCH_BOX(&part_tangents));
  m.impl("part_second_tangents", TORCH_BOX(&part_second_tangents));
  m.impl("part_cotangents", TORCH_BOX(&part_cotangents));
  m.impl("part_cotangent_tangents", TORCH_BOX(&part_cotangent_tangents));
}

// Truncated rows on a GPU as operators of torch: checks, the choice of kernels, launches. The kernels are in truncated.cuh.
//
// Against torch's stable ABI only. A library of its own beside rows.cpp's, loaded where torch has CUDA (entropy_kernels/ops/cuda.py).
// What k, p and y hold is checked by the caller: looking would wait for the device. A k or p that is not positive makes its row undefined.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#define EK_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace {

#include "truncated.cuh"

using torch::stable::Tensor;
using Dtype = torch::headeronly::ScalarType;

Dtype compute_dtype(const Tensor& z) { return z.scalar_type() == Dtype::Double ? Dtype::Double : Dtype::Float; }

void check_vector(const Tensor& x, const Tensor& z, Dtype dtype, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == z.size(0) && x.is_contiguous() && x.scalar_type() == dtype, "truncated rows: ", name,
                  " must be a contiguous [R] of the right dtype");
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == z.get_device_index(), "truncated rows: ", name, " must be on the device of z");
}

Rows rows_of(const Tensor& z, const Tensor& tau, const Tensor& top_k, const Tensor& top_p, const Tensor& threshold, const Tensor& pending) {
  STD_TORCH_CHECK(z.dim() == 2 && z.is_cuda(), "truncated rows: z must be [R, V] on a GPU");
  STD_TORCH_CHECK(z.size(1) == 1 || z.stride(1) == 1, "truncated rows: the rows of z must be contiguous");
  STD_TORCH_CHECK(z.size(1) > 0 || z.size(0) == 0, "truncated rows: a row needs at least one column");
  STD_TORCH_CHECK(std::max(z.size(0), z.size(1)) < std::numeric_limits<int32_t>::max(), "truncated rows: fewer than 2^31 - 1 rows and columns, got [",
                  z.size(0), ", ", z.size(1), "]");
  check_vector(tau, z, compute_dtype(z), "tau");
  check_vector(top_k, z, Dtype::Long, "top_k");
  check_vector(top_p, z, Dtype::Double, "top_p");
  check_vector(threshold, z, compute_dtype(z), "the threshold");
  check_vector(pending, z, Dtype::Int, "pending");
  Rows a{};
  a.R = z.size(0), a.V = int(z.size(1)), a.z_row = z.stride(0), a.z = z.const_data_ptr();
  a.tau = tau.const_data_ptr(), a.k = top_k.const_data_ptr<int64_t>(), a.p = top_p.const_data_ptr<double>();
  a.threshold = threshold.mutable_data_ptr(), a.pending = pending.mutable_data_ptr<int>();
  return a;
}

// Bins for the magnitudes [2^-24, 2^12) of bfloat16; for float16 all from its smallest on that the memory of a block has room for.
void set_window(Rows& a, BFloat16, int64_t) { a.window_low = (127 - 24) << 7, a.window_high = (127 + 12) << 7; }
void set_window(Rows& a, Float16, int64_t bytes) {
  a.window_low = 1;
  a.window_high = int(std::min<int64_t>(0x7c00, (bytes - int64_t(sizeof(CountMemory))) / 8));
}

template <class In>
void launch_by_counts(Rows& a, int device, cudaStream_t stream) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  set_window(a, In{}, bytes);
  const int needed = int(sizeof(CountMemory)) + 8 * (a.window_high - a.window_low);
  STD_CUDA_CHECK(cudaFuncSetAttribute(by_counts<In>, cudaFuncAttributeMaxDynamicSharedMemorySize, needed));
  const int threads = needed > bytes / 3 ? COUNTING_THREADS : COUNTING_THREADS / 2;
  by_counts<In><<<unsigned(a.R), threads, needed, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class In>
void launch_by_keys(const Rows& a, cudaStream_t stream) {
  by_keys<In><<<unsigned(a.R), KEY_THREADS, sizeof(KeyMemory), stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch(Rows a, const Tensor& z) {
  if (a.R == 0) return;
  const int device = z.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &current) == AOTI_TORCH_SUCCESS, "truncated rows: no stream on the device");
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  switch (z.scalar_type()) {
    case Dtype::BFloat16: launch_by_counts<BFloat16>(a, device, stream); return launch_by_keys<BFloat16>(a, stream);
    case Dtype::Half: launch_by_counts<Float16>(a, device, stream); return launch_by_keys<Float16>(a, stream);
    case Dtype::Float: a.pending = nullptr; return launch_by_keys<float>(a, stream);
    case Dtype::Double: a.pending = nullptr; return launch_by_keys<double>(a, stream);
    default: STD_TORCH_CHECK(false, "truncated rows: z must be float64, float32, bfloat16 or float16");
  }
}

void thresholds(const Tensor& z, const Tensor& tau, const Tensor& top_k, const Tensor& top_p, const Tensor& threshold, const Tensor& pending) {
  launch(rows_of(z, tau, top_k, top_p, threshold, pending), z);
}

void values(const Tensor& z, const Tensor& y, const Tensor& tau, const Tensor& top_k, const Tensor& top_p, const Tensor& threshold,
            const Tensor& pending, const Tensor& entropy, const Tensor& logprob, const Tensor& kept_mass, const Tensor& kept_count,
            const Tensor& tail_entropy, const Tensor& full_entropy) {
  Rows a = rows_of(z, tau, top_k, top_p, threshold, pending);
  check_vector(y, z, Dtype::Long, "y");
  check_vector(kept_count, z, Dtype::Long, "kept_count");
  a.y = y.const_data_ptr<int64_t>(), a.count = kept_count.mutable_data_ptr<int64_t>();
  const Tensor* out[5] = {&entropy, &logprob, &kept_mass, &tail_entropy, &full_entropy};
  for (int i = 0; i < 5; i++) {
    check_vector(*out[i], z, compute_dtype(z), "an output");
    a.out[i] = out[i]->mutable_data_ptr();
  }
  launch(a, z);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(entropy_kernels, m) {
  m.def("cuda_thresholds(Tensor z, Tensor tau, Tensor top_k, Tensor top_p, Tensor(a!) threshold, Tensor(b!) pending) -> ()");
  m.def(
      "cuda_truncated_values(Tensor z, Tensor y, Tensor tau, Tensor top_k, Tensor top_p, Tensor(a!) threshold, Tensor(b!) pending, "
      "Tensor(c!) entropy, Tensor(d!) logprob, Tensor(e!) kept_mass, Tensor(f!) kept_count, Tensor(g!) tail_entropy, "
      "Tensor(h!) full_entropy) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels, CUDA, m) {
  m.impl("cuda_thresholds", TORCH_BOX(&thresholds));
  m.impl("cuda_truncated_values", TORCH_BOX(&values));
}

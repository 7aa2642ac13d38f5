// Vectors of one instruction set: loads that widen, stores that round, e^x, sums.
//
// Included once per instruction set by rows.cpp, inside a namespace of its own, with
//   EK_BYTES    the width of a vector
//   EK_TARGET   the attribute that allows the instructions, on every function
// so there is no include guard. The vectors are the compiler's own (GCC and Clang); there are no intrinsics.

#define EK_FN static inline __attribute__((always_inline)) EK_TARGET

typedef float f32v __attribute__((vector_size(EK_BYTES)));
typedef double f64v __attribute__((vector_size(EK_BYTES)));
typedef int32_t i32v __attribute__((vector_size(EK_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(EK_BYTES)));
typedef int64_t i64v __attribute__((vector_size(EK_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(EK_BYTES / 2)));

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using V = f32v;
  static constexpr int n = EK_BYTES / 4;
};
template <>
struct Lanes<double> {
  using V = f64v;
  static constexpr int n = EK_BYTES / 8;
};
template <class T>
using Vec = typename Lanes<T>::V;

EK_FN f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EK_FN f64v load(const double* p) {
  f64v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EK_FN u32v load_u16(const void* p) {
  u16v v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, u32v);
}

EK_FN f32v load(const BFloat16* p) { return (f32v)(load_u16(p) << 16); }

// A half is a float with a narrower exponent: shift it into place and scale by 2^112. Right for subnormals too; the
// exponent of infinities and NaNs is set apart.
EK_FN f32v load(const Float16* p) {
  const u32v h = load_u16(p), magnitude = h & 0x7fff;
  const u32v scaled = (u32v)((f32v)(magnitude << 13) * 0x1p112f);
  const u32v special = (u32v)(magnitude >= 0x7c00) & 0x7f800000u;
  return (f32v)(scaled | special | ((h & 0x8000) << 16));
}

EK_FN void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
EK_FN void store(double* p, f64v v) { __builtin_memcpy(p, &v, sizeof v); }

EK_FN void store_u16(void* p, u32v v) {
  const u16v h = __builtin_convertvector(v, u16v);
  __builtin_memcpy(p, &h, sizeof h);
}

EK_FN void store(BFloat16* p, f32v v) {
  const u32v b = (u32v)v;
  const u32v rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest, ties to even
  store_u16(p, v == v ? rounded : (b >> 16) | 0x40);
}

EK_FN void store(Float16* p, f32v v) {
  const u32v b = (u32v)v, magnitude = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  // Adding 1/2 leaves a subnormal's digits, rounded by the hardware, at the bottom: 2^-24 is the last place of both.
  const u32v subnormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  const u32v normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  u32v h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? (u32v){} + 0x7c00u : h;  // 65520 and above
  h = magnitude > 0x7f800000u ? (u32v){} + 0x7e00u : h;
  store_u16(p, h | sign);
}

EK_FN float widen(float x) { return x; }
EK_FN double widen(double x) { return x; }
template <class In>
EK_FN float widen(In x) {
  In lanes[Lanes<float>::n] = {x};
  return load(lanes)[0];
}

EK_FN void narrow(double x, float& out) { out = float(x); }
EK_FN void narrow(double x, double& out) { out = x; }
template <class In>
EK_FN void narrow(double x, In& out) {
  In lanes[Lanes<float>::n];
  store(lanes, f32v{} + float(x));
  out = lanes[0];
}

// e^x for lowest<T>() ≤ x ≤ 0; NaN stays. x = n ln 2 + r, e^x = 2^n e^r. `lowest` maps to exactly 0: its 2^n has no bits.
template <class T>
EK_FN constexpr T lowest() {
  return sizeof(T) == 4 ? T(-88) : T(-709);
}

// e^r = 1 + r + r² Q(r) on |r| ≤ ln 2 / 2, Q fitted to a relative error of 4e-9.
EK_FN f32v exp_nonpositive(f32v x) {
  const f32v shifted = x * 1.44269504f + 0x1.8p23f;  // n in the last bits
  const f32v n = shifted - 0x1.8p23f;
  const f32v r = x - n * 0x1.63p-1f - n * -2.12194440054690582e-4f;
  f32v q = r * 1.3813144393352815e-3f + 8.369418846540869e-3f;
  q = q * r + 4.166845678979837e-2f;
  q = q * r + 1.6666514791278042e-1f;
  q = q * r + 4.9999993050712316e-1f;
  const f32v scale = (f32v)(((i32v)shifted + 127) << 23);
  return ((q * (r * r) + r) + 1.0f) * scale;
}

// The same with the Taylor series to r¹³/13!, whose remainder is 4e-18.
EK_FN f64v exp_nonpositive(f64v x) {
  const f64v shifted = x * 1.4426950408889634 + 0x1.8p52;
  const f64v n = shifted - 0x1.8p52;
  const f64v r = x - n * 0x1.62e42fefap-1 - n * 1.646594958289708e-12;
  f64v q = r * (1 / 6227020800.0) + 1 / 479001600.0;
  q = q * r + 1 / 39916800.0;
  q = q * r + 1 / 3628800.0;
  q = q * r + 1 / 362880.0;
  q = q * r + 1 / 40320.0;
  q = q * r + 1 / 5040.0;
  q = q * r + 1 / 720.0;
  q = q * r + 1 / 120.0;
  q = q * r + 1 / 24.0;
  q = q * r + 1 / 6.0;
  q = q * r + 0.5;
  const f64v scale = (f64v)(((i64v)shifted + 1023) << 52);
  return ((q * (r * r) + r) + 1.0) * scale;
}

template <class V>
EK_FN V at_least(V v, V bound) {
  return bound > v ? bound : v;  // a NaN in v stays
}

template <class V>
EK_FN V larger(V v, V best) {
  return v > best ? v : best;  // a NaN in v is passed over
}

template <class T>
EK_FN double sum(Vec<T> v) {
  constexpr int n = Lanes<T>::n;
  T lane[n];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

template <class T>
EK_FN T largest(Vec<T> v) {
  constexpr int n = Lanes<T>::n;
  T lane[n];
  __builtin_memcpy(lane, &v, sizeof v);
  T best = lane[0];
  for (int i = 1; i < n; i++) best = lane[i] > best ? lane[i] : best;
  return best;
}

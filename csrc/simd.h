// Vectors of one instruction set: loads that widen, stores that round, e^x, sums.
//
// Included once per instruction set by rows.cpp, inside a namespace of its own, with
//   EK_BYTES    the width of a vector
//   EK_TARGET   the attribute that allows the instructions, on every function
// so there is no include guard. The vectors are the compiler's own (GCC and Clang); intrinsics only where it converts badly.

#define EK_FN static inline __attribute__((always_inline)) EK_TARGET
#define EK_LOOP static __attribute__((noinline)) EK_TARGET  // long enough to be called; one copy compiles faster than many

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
#if EK_BYTES == 64
  return (u32v)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif EK_BYTES == 32
  return (u32v)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  u16v v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, u32v);
#endif
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
#if EK_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif EK_BYTES == 32
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  const u16v h = __builtin_convertvector(v, u16v);
  __builtin_memcpy(p, &h, sizeof h);
#endif
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

// The logarithm of the smallest weight there is, about 2^-126 and 2^-1022: what is below counts as exactly 0.
template <class T>
EK_FN constexpr T lowest() {
  return sizeof(T) == 4 ? T(-88) : T(-709);
}

// e^{d/τ} for d ≤ 0, from 2^n 2^f with n + f = d log₂e/τ. The factor is kept in two parts so that f is good to the last
// place for any τ where multiply and add are fused (the x86 baseline rounds once more); d is clamped where 2^n has no bits left and the result is exactly 0. NaN stays.
template <class T>
struct Exp {
  Vec<T> high, low, least;

  EK_FN Exp of(double inv_tau) {
    const double factor = 1.4426950408889634 * inv_tau;
    // log₂e = 1.4426950408889634 + 2.04e-17
    const double rest = sizeof(T) == 4 ? factor - double(T(factor)) : 2.0355273740931033e-17 * inv_tau;
    return {Vec<T>{} + T(factor), Vec<T>{} + T(rest), Vec<T>{} + T(lowest<T>() / inv_tau)};
  }
};

EK_FN f32v clamp(f32v d, const Exp<float>& x) { return x.least > d ? x.least : d; }
EK_FN f64v clamp(f64v d, const Exp<double>& x) { return x.least > d ? x.least : d; }

// 2^f on |f| ≤ 1/2, fitted to a relative error of 2e-9.
EK_FN f32v weight(f32v d, const Exp<float>& x) {
  constexpr float shift = 0x1.8p23f + 127;  // leaves n + 127 in the last bits, ready to be an exponent
  const f32v shifted = d * x.high + shift;
  const f32v n = shifted - shift;
  const f32v f = d * x.low + (d * x.high - n);
  f32v q = f * 0.0001535315386718139f + 0.001339913229458034f;
  q = q * f + 0.009618439711630344f;
  q = q * f + 0.05550331994891167f;
  q = q * f + 0.24022647738456726f;
  q = q * f + 0.6931471824645996f;
  q = q * f + 1.0f;
  return q * (f32v)((u32v)shifted << 23);
}

// 2^f = e^{f ln 2}, by the Taylor series to the 13th power, whose remainder is 4e-18.
EK_FN f64v weight(f64v d, const Exp<double>& x) {
  constexpr double shift = 0x1.8p52 + 1023;
  const f64v shifted = d * x.high + shift;
  const f64v n = shifted - shift;
  const f64v r = (d * x.low + (d * x.high - n)) * 0.6931471805599453;
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
  return ((q * (r * r) + r) + 1.0) * (f64v)((i64v)shifted << 52);
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

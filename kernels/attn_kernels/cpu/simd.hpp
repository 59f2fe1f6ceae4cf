// Vectors of floats as wide as the processor's registers, in GCC's vector extensions (also
// clang's). Intrinsics only where the extensions have no word for an instruction.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Tokens of a key panel and dims of a value panel; a whole number of vectors.
constexpr int PANEL = 16;
constexpr int MAX_HEAD_SIZE = 256;

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int REGISTERS = 16;
#else
constexpr int WIDTH = 4;
constexpr int REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t IntVec __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t UintVec __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(WIDTH * 2)));

typedef int8_t ByteVec __attribute__((vector_size(WIDTH)));

// Storage formats of a cache. Arithmetic is float32 whatever they are. PAIR: a panel's rows come in
// twos, row k and row k + 1 in the halves of 32-bit words, or of bytes (below).
struct Float32 {
  float value;
  static constexpr int PAIR = 1;
};
struct BFloat16 {
  uint16_t bits;
  static constexpr int PAIR = 2;
};
struct Float16 {
  uint16_t bits;
  static constexpr int PAIR = 1;
};
// Quantized values, whose parameters are those of their token (quantized.hpp).
struct Int8 {
  int8_t value;
  static constexpr int PAIR = 1;
};
struct Int4 {
  int8_t values;  // of row k in the low half, of row k + 1 in the high one
  static constexpr int PAIR = 2;
};
template <class T>
constexpr bool QUANTIZED = false;
template <>
inline constexpr bool QUANTIZED<Int8> = true;
template <>
inline constexpr bool QUANTIZED<Int4> = true;

// How many objects hold so many elements, of whole pairs of rows.
template <class T>
constexpr ptrdiff_t units(ptrdiff_t elements) {
  return elements;
}
template <>
constexpr ptrdiff_t units<Int4>(ptrdiff_t elements) {
  return elements / 2;
}

// f(N, i) for the floats [i, i + N * WIDTH) of `count`, and f(1, i) for each vector of the rest: N
// of them side by side where each step of a calculation waits for the one before.
template <int N, class F>
inline void side_by_side(int count, F&& f) {
  int i = 0;
  for (; i + N * WIDTH <= count; i += N * WIDTH) f(std::integral_constant<int, N>(), i);
  for (; i < count; i += WIDTH) f(std::integral_constant<int, 1>(), i);
}

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec square_root(Vec a) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(a);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a);
#else
  for (int lane = 0; lane < WIDTH; lane++) a[lane] = std::sqrt(a[lane]);
  return a;
#endif
}

inline Vec absolute(Vec a) { return (Vec)((IntVec)a & 0x7fffffff); }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const UintVec u = __builtin_convertvector(h, UintVec);
  const Vec magnitude = (Vec)((u & 0x7fff) << 13) * 0x1p112f;  // exact, subnormals too
  const UintVec infinite = (UintVec)(magnitude >= 0x1p16f) & 0x7f800000u;
  return (Vec)((UintVec)magnitude | infinite | (u & 0x8000) << 16);
#endif
}

inline Vec load(const Float32* p) { return load((const float*)p); }

inline Vec load(const BFloat16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UintVec) << 16);
}

// Rows k to k + PAIR - 1 of WIDTH columns of a panel, of which `p` is the first element. A pair of
// bfloat16 rows is widened by one shift and one mask.
inline void load_rows(const Float32* p, Vec rows[1]) { rows[0] = load((const float*)p); }
inline void load_rows(const Float16* p, Vec rows[1]) { rows[0] = load(p); }
inline void load_rows(const BFloat16* p, Vec rows[2]) {
  UintVec words;
  std::memcpy(&words, p, sizeof words);
  rows[0] = (Vec)(words << 16);
  rows[1] = (Vec)(words & 0xffff0000u);
}

inline IntVec load_bytes(const void* p) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
#endif
}
inline void load_rows(const Int8* p, Vec rows[1]) {
  rows[0] = __builtin_convertvector(load_bytes(p), Vec);
}
inline void load_rows(const Int4* p, Vec rows[2]) {
  const IntVec bytes = load_bytes(p);
#if defined(__AVX512F__)
  // A lookup reads the low four bits of a lane, and gives a float.
  const Vec table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  rows[0] = _mm512_permutexvar_ps((__m512i)bytes, table);
  rows[1] = _mm512_permutexvar_ps((__m512i)(bytes >> 4), table);
#else
  rows[0] = __builtin_convertvector(bytes << 28 >> 28, Vec);
  rows[1] = __builtin_convertvector(bytes >> 4, Vec);
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Moves those of `count` values, whole vectors, that are above `least` to the front, and zeros
// behind them for two panels. `columns` [count] gets which they are, the first value being number
// `first`. Returns how many there are.
inline int keep_above(float least, int count, int first, float* values, int32_t* columns) {
  int kept = 0;
#if defined(__AVX512F__)
  IntVec numbers = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
  for (int i = 0; i < count; i += WIDTH, numbers += WIDTH) {
    const Vec v = load(values + i);
    const __mmask16 above = _mm512_cmp_ps_mask(v, broadcast(least), _CMP_GT_OQ);
    // Compressed in registers: to memory it is many times slower on some processors.
    store(values + kept, _mm512_maskz_compress_ps(above, v));
    _mm512_storeu_si512(columns + kept, _mm512_maskz_compress_epi32(above, (__m512i)numbers));
    kept += __builtin_popcount(above);
  }
#else
  for (int i = 0; i < count; i++) {
    const float v = values[i];
    values[kept] = v;
    columns[kept] = first + i;
    kept += v > least;
  }
#endif
  for (int i = 0; i < 2 * PANEL; i += WIDTH) store(values + kept + i, Vec{});
  return kept;
}

inline void store_bytes(void* p, IntVec v) {  // the low byte of each lane
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

// Of each lane the one whose number differs in the bit STEP.
template <int STEP>
inline Vec exchange(Vec v) {
  IntVec from;
  for (int lane = 0; lane < WIDTH; lane++) from[lane] = lane ^ STEP;
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)from, v);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(v, (__m256i)from);
#else
  Vec out;
  for (int lane = 0; lane < WIDTH; lane++) out[lane] = v[from[lane]];
  return out;
#endif
}

// first, first + 1, ...
inline Vec counting_from(float first) {
  float lanes[WIDTH];
  for (int i = 0; i < WIDTH; i++) lanes[i] = i;
  Vec v;
  std::memcpy(&v, lanes, sizeof v);
  return v + first;
}

inline float horizontal_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float top = v[0];
  for (int i = 1; i < WIDTH; i++) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

inline float horizontal_sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[WIDTH];
  store(lanes, v);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

inline float to_float(Float32 x) { return x.value; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  uint32_t bits = (uint32_t)(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  std::memcpy(&bits, &f, 4);
  bits |= sign | (f >= 0x1p16f ? 0x7f800000u : 0);
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void convert(float x, Float32& out) { out.value = x; }
inline void convert(float x, BFloat16& out) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void convert(float x, Float16& out) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x)
    out.bits = 0x7e00;
  else if (magnitude >= 65520.f)
    out.bits = sign | 0x7c00;
  else if (magnitude < 0x1p-14f)
    out.bits = sign | (uint16_t)std::lrint(magnitude * 0x1p24f);
  else
    out.bits =
        sign | (uint16_t)(((bits & 0x7fffffff) - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

// ---- powers of two. Scores are in units of log2(e), so that exponents are integers and rescaling
// by a difference of exponents is exact.

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;

// Adding it to |x| < 2^22 rounds x to an integer, which is then in the low bits.
constexpr float ROUNDER = 0x1.8p23f;

inline float nearest(float x) { return std::nearbyint(x); }
inline float larger(float a, float b) { return a > b ? a : b; }  // std::fmax is a call

// The nearest whole numbers n of y, and 2^(n - exponent); 0 where that is 2^-127. `exponent` is a
// whole number, and -127 <= y - exponent <= 127.
struct Whole {
  Vec n, power;
  Whole(Vec y, float exponent) {
    const float rounder = ROUNDER + 127 - exponent;
    const Vec bits = y + rounder;
    n = bits - rounder;
    power = (Vec)((IntVec)bits << 23);
  }
};
inline float power_of_two(float n) {
  const int32_t bits = n <= -127.f ? 0 : ((int32_t)n + 127) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// (2^r - 1) for |r| <= 1/2, with a relative error of 1e-8 before rounding.
template <int N>
inline void exp2m1_fraction(Vec (&r)[N]) {
  constexpr float POLYNOMIAL[] = {0.00133907353f, 0.00961823761f, 0.0555035733f, 0.240226492f,
                                  0.693147182f};
  Vec p[N];
  for (Vec& each : p) each = broadcast(0.000154035122f);
#pragma GCC unroll 5
  for (float coefficient : POLYNOMIAL)
    for (int i = 0; i < N; i++) p[i] = p[i] * r[i] + coefficient;
  for (int i = 0; i < N; i++) r[i] *= p[i];
}
inline Vec exp2m1_fraction(Vec r) {
  Vec one[1] = {r};
  exp2m1_fraction(one);
  return one[0];
}

// 2^(y - exponent) for y <= exponent + 127; exactly 0 below exponent - 127. NaN stays NaN.
template <int N>
inline void exp2(Vec (&y)[N], float exponent = 0.f) {
  Vec power[N];
  for (int i = 0; i < N; i++) {
    y[i] = max(broadcast(exponent - 127.f), y[i]);
    const Whole whole(y[i], exponent);
    y[i] -= whole.n;
    power[i] = whole.power;
  }
  exp2m1_fraction(y);
  for (int i = 0; i < N; i++) y[i] = y[i] * power[i] + power[i];
}
inline Vec exp2(Vec y, float exponent = 0.f) {
  Vec one[1] = {y};
  exp2(one, exponent);
  return one[0];
}

// m / (m + 2) with m = e^2|x| - 1, which keeps small x exact.
inline Vec tanh(Vec x) {
  const Vec y = -max(broadcast(-40.f), absolute(x) * (-2 * LOG2E));
  const Whole whole(y, 0.f);
  const Vec m = exp2m1_fraction(y - whole.n) * whole.power + (whole.power - 1.f);
  const Vec t = m / (m + 2.f);
  return x < 0.f ? -t : t;
}

// log2(1 + 2^y), that is softplus in units of ln 2; 0 at -infinity. Several vectors side by side,
// since each step waits for the one before.
template <int N>
inline void softplus2(Vec (&y)[N]) {
  constexpr float POLYNOMIAL[] = {-0.0425670631f, 0.112856194f, -0.197118968f, 0.275641411f,
                                  -0.358408481f,  0.480692953f, -0.721340179f, 1.44269502f};
  Vec u[N], p[N];
  for (int i = 0; i < N; i++) u[i] = (Vec)((IntVec)y[i] | (int32_t)0x80000000);  // -|y|
  exp2(u);
  for (Vec& each : p) each = broadcast(0.00754918205f);
#pragma GCC unroll 8
  for (float coefficient : POLYNOMIAL)
    for (int i = 0; i < N; i++) p[i] = p[i] * u[i] + coefficient;
  for (int i = 0; i < N; i++) y[i] = p[i] * u[i] + max(Vec{}, y[i]);
}

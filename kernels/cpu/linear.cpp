// Products of a few rows with matrices that stream through once: y = x W^T + b.
//
// Several matrices that multiply the same rows are one call, and one parallel region. Weights stand as [out, in] or, with
// `crossed`, as [in, out]; either way each of their bytes is read once for all rows. Weights may be bytes: they become
// floats on their way into the product.
//: if general
//
// The file compiles as it stands. For one element type, facts take the place of the values before "//=".
//: endif

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
  uint16_t raw;
};
struct float16 {
  uint16_t raw;
};

using Element = float;  //= element
using Weight = float;   //= weight

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int LINE = 64 / W;  // vectors of bytes in a line of the cache
constexpr int MOST_ROWS = W == 16 ? 8 : 4;  // that are multiplied at once
constexpr int AHEAD = 4096, FAR = 6144;  // bytes: a core that multiplies does not read ahead by itself; FAR with four rows

typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bfloat16 x) { return bits<float>(uint32_t(x.raw) << 16); }
#if defined(__F16C__)
inline float to_float(float16 x) { return _cvtsh_ss(x.raw); }
#else
inline float to_float(float16 x) { return float(bits<_Float16>(x.raw)); }
#endif
inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, bfloat16& to) {  // to nearest, ties to even
  uint32_t raw = bits<uint32_t>(x);
  to.raw = x != x ? 0x7fc0 : uint16_t((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}
#if defined(__F16C__)
inline void from_float(float x, float16& to) { to.raw = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline void from_float(float x, float16& to) { to.raw = bits<uint16_t>(_Float16(x)); }
#endif

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline V load(const int8_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  V v;
  for (int k = 0; k < W; ++k) v[k] = p[k];
  return v;
#endif
}
inline V load(const bfloat16* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return bits<V>(__builtin_convertvector(h, U) << 16);
}
inline V load(const float16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  V v;
  for (int k = 0; k < W; ++k) v[k] = to_float(p[k]);
  return v;
#endif
}
typedef float Quad __attribute__((vector_size(16)));
inline Quad folded(V v) {
  Quad q[W / 4];
  std::memcpy(q, &v, sizeof v);
  Quad all = q[0] + q[1];
  for (int k = 2; k < W / 4; k += 2) all += q[k] + q[k + 1];
  return all;
}
// The sums of COUNT vectors. Four at a time: a sum across a vector is dearer than a product.
template <int COUNT>
inline void sums(const V* v, float* to) {
  int k = 0;
#pragma GCC unroll 4
  for (; k + 4 <= COUNT; k += 4) {
    const Quad a = folded(v[k]), b = folded(v[k + 1]), c = folded(v[k + 2]), d = folded(v[k + 3]);
    const Quad x = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const Quad y = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    const Quad all = __builtin_shufflevector(x, y, 0, 2, 4, 6) + __builtin_shufflevector(x, y, 1, 3, 5, 7);
    std::memcpy(to + k, &all, sizeof all);
  }
  for (; k < COUNT; ++k) {
    const Quad q = folded(v[k]);
    to[k] = (q[0] + q[2]) + (q[1] + q[3]);
  }
}
template <class T>
inline void ask(const T* p, int bytes) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, 2);
}

// All fields are 8 bytes.
struct Matrix {
  const Weight* weight;
  const Element* bias;  // [out], or null
  Element* out;         // row r at out + r * out_row
  int64_t features, out_row, row, crossed;
};

// Outputs o .. o + O - 1 of R rows of x. Rows of x are floats: they are loaded for every output.
template <int R, int O>
inline void dots(const float* x, int64_t width, const Matrix& m, int64_t o) {
  constexpr int N = R * O >= 8 ? 1 : R >= 4 ? 2 : 4;  // sums for each result, so that none waits for the last
  const Weight* w = m.weight + o * m.row;
  V all[R][O][N] = {};
  int64_t k = 0;
  for (; k + N * W <= width; k += N * W) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t at = k + n * W;
      V part[O];
#pragma GCC unroll 4
      for (int p = 0; p < O; ++p) {
        if (sizeof(Weight) > 1 || n % LINE == 0) ask(w + (O == 1 ? 0 : p + O) * m.row + at, O > 1 ? 0 : R < 4 ? AHEAD : FAR);
        part[p] = load(w + p * m.row + at);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V row = load(x + r * width + at);
#pragma GCC unroll 4
        for (int p = 0; p < O; ++p) all[r][p][n] += part[p] * row;
      }
    }
  }
  for (; k + W <= width; k += W)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < O; ++p) all[r][p][0] += load(w + p * m.row + k) * load(x + r * width + k);
  V each[R * O];
  float y[R * O];
#pragma GCC unroll 16
  for (int at = 0; at < R * O; ++at) {
    each[at] = all[at / O][at % O][0];
#pragma GCC unroll 4
    for (int n = 1; n < N; ++n) each[at] += all[at / O][at % O][n];
  }
  sums<R * O>(each, y);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < O; ++p) {
      float total = y[r * O + p];
      for (int64_t rest = k; rest < width; ++rest) total += to_float(w[p * m.row + rest]) * x[r * width + rest];
      from_float(m.bias ? total + to_float(m.bias[o + p]) : total, m.out[r * m.out_row + o + p]);
    }
}
template <int R>
void dots(const float* x, int64_t width, const Matrix& m, int64_t from, int64_t to) {
  constexpr int O = W == 8 || R < 8 ? 1 : 2;  // with many rows, loads of x are shared by two outputs
  int64_t o = from;
  for (; o + O <= to; o += O) dots<R, O>(x, width, m, o);
  for (; o < to; ++o) dots<R, 1>(x, width, m, o);
}

// The same where a row of the matrix has one entry for each output: a block of outputs stays in registers.
template <int R>
void columns(const float* x, int64_t width, const Matrix& m, int64_t from, int64_t to) {
  constexpr int N = R == 1 ? 8 : R == 2 ? 4 : R == 4 ? 4 : 2;
  int64_t o = from;
  for (; o + N * W <= to; o += N * W) {
    V all[R][N] = {};
    for (int64_t k = 0; k < width; ++k) {
      const Weight* w = m.weight + k * m.row + o;
      V part[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        __builtin_prefetch(w + 8 * m.row + n * W, 0, 2);
        part[n] = load(w + n * W);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V factor = V{} + x[r * width + k];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) all[r][n] += part[n] * factor;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        for (int k = 0; k < W; ++k) {
          const int64_t at = o + n * W + k;
          from_float(m.bias ? all[r][n][k] + to_float(m.bias[at]) : all[r][n][k], m.out[r * m.out_row + at]);
        }
  }
  for (; o < to; ++o)
    for (int r = 0; r < R; ++r) {
      float y = 0;
      for (int64_t k = 0; k < width; ++k) y += to_float(m.weight[k * m.row + o]) * x[r * width + k];
      from_float(m.bias ? y + to_float(m.bias[o]) : y, m.out[r * m.out_row + o]);
    }
}

template <int R>
inline void rows_of(const float* x, int64_t width, const Matrix& m, int64_t from, int64_t to) {
  if (m.crossed)
    columns<R>(x, width, m, from, to);
  else
    dots<R>(x, width, m, from, to);
}

// The rows as they are, or as floats one behind the other.
inline const float* as_floats(const float* x, int64_t x_row, int64_t rows, int64_t width, float* scratch) {
  if (x_row == width) return x;
  for (int64_t r = 0; r < rows; ++r) std::memcpy(scratch + r * width, x + r * x_row, width * sizeof *x);
  return scratch;
}
template <class T>
inline const float* as_floats(const T* x, int64_t x_row, int64_t rows, int64_t width, float* scratch) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < width; ++k) scratch[r * width + k] = to_float(x[r * x_row + k]);
  return scratch;
}

}  // namespace

extern "C" {

// Rows of x begin `x_row` entries apart; `scratch` holds `rows * width` floats.
// Each thread takes an equal share of all outputs, so that each reads an equal share of the bytes.
__attribute__((visibility("default"))) void kvpass_linear(
    const Element* x, int64_t x_row, int64_t rows, int64_t width, const Matrix* matrices, int64_t count, int64_t threads, float* scratch) {
  const float* floats = as_floats(x, x_row, rows, width, scratch);
  int64_t all = 0;
  for (int64_t k = 0; k < count; ++k) all += matrices[k].features;
  // Below some 64 KiB of weights a second thread costs more than it gives.
  const int64_t most = (all * width * int64_t(sizeof(Weight))) >> 16;
  const int shares = int(most < 1 ? 1 : most < threads ? most : threads);
#pragma omp parallel for schedule(static, 1) num_threads(shares) if (shares > 1)
  for (int share = 0; share < shares; ++share) {
    // Whole lines of results: two threads that write one line wait for each other.
    const int64_t begin = all * share / shares / 64 * 64, end = share + 1 == shares ? all : all * (share + 1) / shares / 64 * 64;
    int64_t first = 0;
    for (int64_t k = 0; k < count; first += matrices[k++].features) {
      Matrix m = matrices[k];
      const int64_t from = begin > first ? begin - first : 0, to = end - first < m.features ? end - first : m.features;
      if (from >= to) continue;
      // What a core has read of a matrix it multiplies with all rows before it reads on.
      const int64_t chunk = rows > MOST_ROWS ? 64 : to - from;
      for (int64_t o = from; o < to; o += chunk) {
        const int64_t last = o + chunk < to ? o + chunk : to;
        const float* row = floats;
        int64_t rest = rows;
        m.out = matrices[k].out;
        const auto next = [&](int64_t by) { rest -= by, row += by * width, m.out += by * m.out_row; };
        if (W == 16)
          for (; rest >= 8; next(8)) rows_of<8>(row, width, m, o, last);
        for (; rest >= 4; next(4)) rows_of<4>(row, width, m, o, last);
        if (rest >= 2) rows_of<2>(row, width, m, o, last), next(2);
        if (rest >= 1) rows_of<1>(row, width, m, o, last);
      }
    }
  }
}
}

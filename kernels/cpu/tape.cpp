// A decode step as one call: small loops, products and attentions of one graph, run in order.
//
// An instruction is a function and the places of its operands in `base`; sizes that change from call to call stand in `s`.
// What multiplies many rows or reads many keys has threads of its own; a loop over the entries of a few rows has none. Where
// there are many rows, instructions that treat each row for itself follow each other block by block: what one leaves, the
// next finds in the cache of its core, and blocks are shared out to threads.

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
  uint16_t raw;
};
#if defined(__FLT16_MAX__)
typedef _Float16 float16;
#else
typedef __fp16 float16;
#endif

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What is stored in 16 bits is computed with as float.
template <class T>
inline T ld(T x) { return x; }
inline float ld(bfloat16 x) { return bits<float>(uint32_t(x.raw) << 16); }
inline float ld(float16 x) { return float(x); }
template <class T, class X>
inline void st(T& to, X x) { to = T(x); }
template <class X>
inline void st(bfloat16& to, X given) {  // to nearest, ties to even
  const float x = float(given);
  const uint32_t raw = bits<uint32_t>(x);
  to.raw = x != x ? 0x7fc0 : uint16_t((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}

constexpr float INFINITE = __builtin_inff();
constexpr float SMALLEST = -103.97f;  // below it e^x is zero

// e^x as 2^n * p(f) with n + f = x / ln 2 and |f| <= 1/2 (Cody and Waite); in two steps, so that subnormal results are right.
inline float exponential(float x) {
  const float clamped = !(x > -104.0f) ? -104.0f : x < 89.0f ? x : 89.0f;  // NaN as well: it becomes a whole number
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t whole = int32_t(n), half = whole >> 1;
  const float scaled = p * bits<float>((half + 127) << 23) * bits<float>((whole - half + 127) << 23);
  const float result = x < SMALLEST ? 0.0f : x > 88.7228394f ? INFINITE : scaled;
  return x != x ? x : result;
}
inline double exponential(double x) { return __builtin_exp(x); }
// A rational function would lose the small ones: a polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
inline float hyperbolic(float x) {
  const float magnitude = __builtin_fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = x + x * square * p;
  const float large = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? small : x < 0 ? -large : large;
}
inline double hyperbolic(double x) { return __builtin_tanh(x); }
inline float sine(float x) { return __builtin_sinf(x); }
inline double sine(double x) { return __builtin_sin(x); }
inline float cosine(float x) { return __builtin_cosf(x); }
inline double cosine(double x) { return __builtin_cos(x); }
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
inline float power(float x, float y) { return __builtin_powf(x, y); }
inline double power(double x, double y) { return __builtin_pow(x, y); }
inline float error(float x) { return __builtin_erff(x); }
inline double error(double x) { return __builtin_erf(x); }
template <class T>
inline T magnitude(T x) { return x < 0 ? -x : x; }
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }
template <class T>
inline T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }
// NaN stays NaN.
template <class T>
inline T larger(T a, T b) { return a > b || a != a ? a : b; }
template <class T>
inline T smaller(T a, T b) { return a < b || a != a ? a : b; }
inline int64_t floor_div(int64_t a, int64_t n) { return a / n - ((a % n != 0) & ((a < 0) != (n < 0))); }
inline int64_t floor_mod(int64_t a, int64_t n) { return a - n * floor_div(a, n); }
inline float floor_mod(float a, float n) {
  const float rest = __builtin_fmodf(a, n);
  return rest != 0 && (rest < 0) != (n < 0) ? rest + n : rest;
}
inline double floor_mod(double a, double n) {
  const double rest = __builtin_fmod(a, n);
  return rest != 0 && (rest < 0) != (n < 0) ? rest + n : rest;
}
inline int64_t whole_power(int64_t x, int64_t n) {
  int64_t y = 1;
  for (; n > 0; n >>= 1, x *= x) y *= n & 1 ? x : 1;
  return y;
}

struct Matrix {
  const void *weight, *bias;
  void* out;
  int64_t features, out_row, row, crossed;
};
typedef void (*Linear)(const void*, int64_t, int64_t, int64_t, const Matrix*, int64_t, int64_t, float*);
typedef int (*Attention)(const void*);

// Keys or values, as `attention.cpp` has them.
struct Pool {
  const void *data, *table;
  int64_t batch, head, page, row, pages, size;
};
inline const void* moved(const void* from, int64_t bytes) { return static_cast<const char*>(from) + bytes; }
// The pages of a single sequence that follow each other, from page `run` on, are one table.
inline Pool paged(const void* data, const void* table, int64_t run, int64_t pages, int64_t head, int64_t page, int64_t row, int64_t size, int64_t item) {
  if (run < 0) return {data, table, 0, head, page, row, pages, size};
  return {moved(data, run * page * item), nullptr, 0, head, page, row, 0, 0};
}
struct Read {
  const void* data;
  int64_t stride[4];
};
template <int READS>
struct Call {
  const void* query;
  void* out;
  int64_t batch, count, start, rows, threads, tile;
  int64_t q_batch, q_head, q_row;
  int64_t o_batch, o_head, o_row;
  Pool keys, values;
  Read reads[READS];
};

constexpr int NO_MEMORY = 1, OUT_OF_RANGE = 2;

constexpr int64_t ROWS = 0;    //= rows
constexpr int64_t BLOCK = 16;  // rows

typedef int (*Function)(void* const* base, const int32_t* a, const int64_t* s, int64_t first, int64_t last);

//: begin functions
constexpr Function FUNCTIONS[] = {nullptr};
//: end functions

struct Instruction {
  int32_t function, operands, together;  // how many, from this one on, go through the rows block by block
};

int by_blocks(const Instruction* tape, const int32_t* operands, void* const* base, const int64_t* s) {
  const int64_t rows = s[ROWS], threads = s[0], share = (rows + threads - 1) / threads;
  const int64_t block = share < BLOCK ? share : BLOCK, blocks = (rows + block - 1) / block;
  int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * block, last = first + block < rows ? first + block : rows;
    for (int64_t at = 0; at < tape->together && !failed; ++at)
      failed = FUNCTIONS[tape[at].function](base, operands + tape[at].operands, s, first, last);
  }
  return failed;
}

}  // namespace

// The instructions `from .. to - 1`. Stops at the first that fails, and says how.
extern "C" __attribute__((visibility("default"))) int kvpass_tape(
    const Instruction* tape, int64_t from, int64_t to, const int32_t* operands, void* const* base, const int64_t* s) {
  for (int64_t at = from; at < to;) {
    const Instruction& next = tape[at];
    const int failed = next.together ? by_blocks(&next, operands, base, s)
                                     : FUNCTIONS[next.function](base, operands + next.operands, s, 0, 0);
    if (failed) return failed;
    at += next.together ? next.together : 1;
  }
  return 0;
}

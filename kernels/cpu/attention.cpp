// Softmax attention of new rows over cached and new keys, on a CPU.
//
//   decode    a few new rows: keys and values stream through once for all query heads that share them
//   prefill   many new rows: blocks of queries against packed blocks of keys, in registers
//
// Keys and values stand in pages, or in one table per head. A row sees the keys that `visible` keeps, of which `low` and
// `high` say where they can be at all.
//: if general
//
// The file compiles as it stands. For one shape, facts take the place of the values before "//=", and of the sections
// between "begin" and "end".
//: endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
//: if half or brain
#if defined(__F16C__)
#include <immintrin.h>
#endif
//: endif

// The library's own headers are most of the time that it takes to compile this file: little of them is included.
namespace {

constexpr float INFINITE = __builtin_inff();

template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most_of(T a, T b) {
  return a < b ? b : a;
}
inline void fill(float* from, float* to, float value) {
  for (; from != to; ++from) *from = value;
}
template <int N>
struct Number {
  constexpr operator int() const { return N; }
};

struct bfloat16 {
  uint16_t raw;
};
struct float16 {
  uint16_t raw;
};

// ---- the shape -----------------------------------------------------------------------------------------------------

constexpr int KV_HEADS = 8;                 //= kv_heads
constexpr int GROUP = 4;                    //= group
constexpr int D = 128;                      //= head_size
constexpr int DV = 128;                     //= value_size
constexpr int TILE = 32;                    //= tile
constexpr float SCALE = 0.08838834764f;     //= scale
constexpr bool EMPTY_IS_NAN = false;        //= empty_is_nan
constexpr bool PLAIN_SCORE = true;          //= plain_score
constexpr bool HAS_SINK = false;            //= has_sink
constexpr int READS = 1;                    //= reads
constexpr bool INTERLEAVED = false;         //= interleaved
using Element = float;                      //= element

struct Read {
  const void* data;
  int64_t stride[4];
};

// All fields are 8 bytes. Strides count elements; the last axis of queries, keys, values and results has stride one.

// Keys or values: pages of `size` rows, or one table for each sequence and head.
struct Pool {
  const void* data;
  const int32_t* table;  // [batch, pages], or null
  int64_t batch, head, page, row, pages, size;
};

struct Call {
  const void* query;
  void* out;
  int64_t batch, count, start, rows, threads;  // queries `start .. start + count - 1` against `rows` keys
  int64_t tile;                                // rows of a tile, which lies in one page of the keys and one of the values
  int64_t q_batch, q_head, q_row;
  int64_t o_batch, o_head, o_row;
  Pool keys, values;
  Read reads[READS];
};

// ---- vectors -------------------------------------------------------------------------------------------------------

constexpr int W = 8;  // two registers on a machine of 128 bits
#if defined(__AVX512F__)
constexpr int WIDE = 16;  // for products of matrices; sums across a vector, as in decode, are dearer than the width gives
#else
constexpr int WIDE = 8;
#endif
#if defined(__AVX512VL__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int CHUNK = 2 * W;
constexpr int STREAMS = 4;  // tiles that are read side by side
constexpr int SPAN = most_of(STREAMS, least(2048, 262144 / (most_of(D, DV) * int(sizeof(Element)))) / TILE) * TILE;  // keys of one softmax step
constexpr int CHUNKS = (D + CHUNK - 1) / CHUNK, D_PAD = CHUNKS * CHUNK;
constexpr int V_CHUNK = 2 * WIDE, V_CHUNKS = (DV + V_CHUNK - 1) / V_CHUNK, DV_PAD = V_CHUNKS * V_CHUNK;

typedef float V __attribute__((vector_size(4 * W)));
typedef float WideV __attribute__((vector_size(4 * WIDE)));

template <class T>
struct Pair {
  T a, b;
};

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T = V>
inline T load_floats(const float* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_floats(float* p, T v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T = V>
inline T splat(float x) {
  return x - T{};  // 0 + x is not x where x is -0
}
// Keeps a value in a register: some compilers would rather load it again for each use.
template <class T>
inline T held(T v) {
#if defined(__AVX__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits<float>(uint32_t(x.raw) << 16); }
//: if half
#if defined(__aarch64__)
typedef __fp16 Half;
#elif !defined(__F16C__)
typedef _Float16 Half;
#endif
inline float to_float(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.raw);
#else
  return float(bits<Half>(x.raw));
#endif
}
//: endif
inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, bfloat16& to) {  // to nearest, ties to even
  uint32_t raw = bits<uint32_t>(x);
  to.raw = x != x ? 0x7fc0 : uint16_t((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}
//: if half
inline void from_float(float x, float16& to) {
#if defined(__F16C__)
  to.raw = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  to.raw = bits<uint16_t>(Half(x));
#endif
}
//: endif

// One chunk, two vectors, in an order of its own: for bfloat16 the even entries and the odd ones, which are a shift and a
// mask away from floats. Dot products do not mind, as queries are loaded by the same function; results are put back by
// `spread`.
template <class T>
inline Pair<T> load_pair(const float* p) {
  return {load_floats<T>(p), load_floats<T>(p + sizeof(T) / 4)};
}
template <class T>
inline Pair<T> load_pair(const bfloat16* p) {
  typedef uint32_t U __attribute__((vector_size(sizeof(T))));
  U u;
  std::memcpy(&u, p, sizeof u);
  return {bits<T>(u << 16), bits<T>(u & 0xffff0000u)};
}
//: if half
template <class T>
inline T load_halves(const float16* p) {
  T v;
  for (int k = 0; k < int(sizeof(T)) / 4; ++k) v[k] = to_float(p[k]);
  return v;
}
#if defined(__F16C__)
template <>
inline V load_halves(const float16* p) {
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif
#if defined(__AVX512F__)
template <>
inline WideV load_halves(const float16* p) {
  return (WideV)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif
template <class T>
inline Pair<T> load_pair(const float16* p) {
  return {load_halves<T>(p), load_halves<T>(p + sizeof(T) / 4)};
}
//: endif

// Chunk `c` of a row of SIZE entries; the last one is filled up with zeros and reads nothing behind the row.
template <int SIZE, class T, class Source>
inline Pair<T> load_chunk(const Source* row, int c) {
  constexpr int ENTRIES = int(sizeof(T)) / 2;
  if (SIZE % ENTRIES != 0 && c == SIZE / ENTRIES) {
    Source rest[ENTRIES] = {};
    std::memcpy(rest, row + c * ENTRIES, (SIZE % ENTRIES) * sizeof(Source));
    return load_pair<T>(rest);
  }
  return load_pair<T>(row + c * ENTRIES);
}

inline WideV rounded(float* to, WideV x) { return store_floats(to, x), x; }
//: if brain
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
// Stores floats as bfloat16 and gives what was stored.
inline WideV rounded(bfloat16* to, WideV x) {
  const __m256bh small = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &small, sizeof small);
  return bits<WideV>(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)small), 16));
}
#endif

// One chunk as it stands in memory.
template <int SIZE, class T>
inline T load_raw(const Element* row, int c) {
  constexpr int ENTRIES = int(sizeof(T) / sizeof(Element));
  if (SIZE % ENTRIES != 0 && c == SIZE / ENTRIES) {
    T rest{};
    std::memcpy(&rest, row + c * ENTRIES, SIZE % ENTRIES * sizeof(Element));
    return rest;
  }
  return load_floats<T>(reinterpret_cast<const float*>(row + c * ENTRIES));
}
//: endif

// What products of queries and keys are made of: one chunk of a row, as floats.
template <bool PAIRED>
struct OperandOf {
  V a, b;

  static OperandOf of(const Element* row, int c) {
    const Pair<V> x = load_chunk<D, V>(row, c);
    return {x.a, x.b};
  }
  static OperandOf at(const float* p) { return {load_floats(p), load_floats(p + W)}; }
  void store(float* p) const { store_floats(p, a), store_floats(p + W, b); }
  OperandOf hold() const { return {held(a), held(b)}; }
  void times(OperandOf x, V& sum) const {
    sum += a * x.a;
    sum += b * x.b;
  }
};
//: if brain
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
// As bfloat16: the machine multiplies pairs of them and sums in float.
template <>
struct OperandOf<true> {
  V raw;

  static OperandOf of(const Element* row, int c) {
    return {load_raw<D, V>(row, c)};
  }
  static OperandOf at(const float* p) { return {load_floats(p)}; }
  void store(float* p) const { store_floats(p, raw); }
  OperandOf hold() const { return {held(raw)}; }
  void times(OperandOf x, V& sum) const { sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)raw, (__m256bh)x.raw); }
};
#endif
//: endif
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
constexpr bool PAIRED = INTERLEAVED;
#else
constexpr bool PAIRED = false;
#endif
using Operand = OperandOf<PAIRED>;

// Where entry `d` of a result stands in its chunks.
inline int spread(int d) {
  if (PAIRED) {  // of each 16 bytes of a row the first half, then the second
    int in = d % V_CHUNK;
    return d - in + in / 8 * 4 + in % 4 + in / 4 % 2 * WIDE;
  }
  if (INTERLEAVED) {
    int in = d % V_CHUNK;
    return d - in + in / 2 + (in % 2) * WIDE;
  }
  return d;
}

inline V pairs(V x, V y) {
  return __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
}
inline V quads(V x, V y) {
  return __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
}
// The sums of eight vectors, in order.
inline V sums(const V* v) {
  V x = quads(pairs(v[0], v[1]), pairs(v[2], v[3])), y = quads(pairs(v[4], v[5]), pairs(v[6], v[7]));
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}

// e^x for |x| <= 88, as 2^n * p(f) with n + f = x / ln 2 and |f| <= 1/2: Cody and Waite's split of ln 2, a polynomial of
// degree six.
template <class T, class I>
inline T raised(T x) {
  const T shifted = x * 1.44269504088896341f + 12582912.0f;
  const T n = shifted - 12582912.0f;
  const T f = x - n * 0.693359375f + n * 2.12194440e-4f;
  T p = T{} + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * bits<T>((bits<I>(shifted) << 23) + 0x3f800000);
}
constexpr float SMALLEST = -87.33654f;  // below it e^x is exact zero, not subnormal, so that a masked key weighs nothing
inline float exponential(float x) {
  const float clamped = x > 88.0f ? 88.0f : x < SMALLEST ? SMALLEST : x;
  return x < SMALLEST ? 0.0f : x > 88.0f ? INFINITE : raised<float, uint32_t>(clamped);
}
// The same for numbers that are not positive.
inline WideV decay(WideV x) {
  typedef uint32_t I __attribute__((vector_size(sizeof(WideV))));
  const WideV least = splat<WideV>(SMALLEST);
  return x < least ? WideV{} : raised<WideV, I>(x < least ? least : x);
}

// A rational function would lose the small ones: a polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
inline float hyperbolic(float x) {
  float magnitude = __builtin_fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  float small = x + x * square * p;
  float large = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? small : x < 0 ? -large : large;
}

inline int floor_div(int a, int n) { return a >= 0 ? a / n : -((n - 1 - a) / n); }
inline int floor_mod(int a, int n) { return a - n * floor_div(a, n); }

// ---- scores and masks ----------------------------------------------------------------------------------------------
// b sequence, h query head, i row of the query, j row of the key.

//: begin score
// The score, from the scaled product of query and key.
inline float score(const Call& call, float score, int b, int h, int i, int j) { return score; }
//: end score

//: begin visible
inline bool visible(const Call& call, int b, int h, int i, int j) { return j <= i; }
//: end visible

//: begin sink
inline float sink(const Call& call, int h) { return -INFINITE; }
//: end sink

// Row i sees no key outside `low(i) <= j < high(i)` of the ranges, and every key inside of one that is exact.
//: begin ranges
constexpr int RANGES = 1;
constexpr bool EXACT[] = {true};
inline int low(int range, int i) { return 0; }
inline int high(int range, int i, int rows) { return i + 1; }
//: end ranges

struct Tile {
  int first, count;
  bool masked;  // not every row of the block sees all of its keys
};

struct Tiles {
  Tile* data = nullptr;
  int count = 0, room = 0;

  ~Tiles() { std::free(data); }
  void push(Tile tile) {
    if (count == room) {
      room = 2 * room + 64;
      void* grown = std::realloc(data, room * sizeof(Tile));
      if (grown == nullptr) throw std::bad_alloc();
      data = static_cast<Tile*>(grown);
    }
    data[count++] = tile;
  }
};

// The tiles of keys that rows `i0 .. i1` can see. Tiles begin at multiples of `size`.
inline void tiles_of(Tiles& tiles, int i0, int i1, int rows, int size) {
  tiles.count = 0;
  int done = 0;
  for (int range = 0; range < RANGES; ++range) {
    int first = most_of(done, low(range, i0) / size * size), last = least(rows, high(range, i1, rows));
    int seen_from = low(range, i1), seen_to = high(range, i0, rows);
    for (int j = first; j < last; j += size) {
      int count = least(size, (RANGES == 1 ? last : rows) - j);  // another range may go on in this tile
      tiles.push({j, count, !EXACT[range] || j < seen_from || j + count > seen_to});
      done = j + size;
    }
  }
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Grows and stays with its thread.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  float* get(size_t floats) {
    if (floats > size) {
      ::operator delete(data, std::align_val_t(64));
      data = nullptr;
      size = 0;
      data = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
      size = floats;
    }
    return data;
  }
};

struct Rows {
  const Element* base;
  const int32_t* table;
  int64_t page, row, size;

  inline const Element* at(int j) const {
    if (table == nullptr) return base + j * row;
    return base + table[j / size] * page + (j % size) * row;
  }
};
inline Rows rows_of(const Pool& pool, int b, int k) {
  const Element* base = static_cast<const Element*>(pool.data) + k * pool.head;
  if (pool.table == nullptr) return {base + b * pool.batch, nullptr, 0, pool.row, 1};
  return {base, pool.table + b * pool.pages, pool.page, pool.row, pool.size};
}

// The larger one, or the one that is NaN: a NaN must not be lost.
inline float upper(float a, float b) { return b > a || b != b ? b : a; }

inline float largest(const float* s, int count) {
  float most = -INFINITE;
  int j = 0;
  WideV some = splat<WideV>(most);
  for (; j + WIDE <= count; j += WIDE) {
    WideV x = load_floats<WideV>(s + j);
    some = (x > some) | (x != x) ? x : some;
  }
  for (int k = 0; k < WIDE; ++k) most = upper(most, some[k]);
  for (; j < count; ++j) most = upper(most, s[j]);
  return most;
}

// The state of an online softmax (Milakov and Gimelshein 2018): for each query the largest score so far, the sum of
// the exponentials and the weighted sum of the values.
struct State {
  float *most, *sum, *out;

  void clear(int queries, int width) {
    fill(most, most + queries, -INFINITE);
    fill(sum, sum + queries, 0.0f);
    fill(out, out + size_t(queries) * width, 0.0f);
  }
  static size_t floats(int queries, int width) { return size_t(queries) * (width + 2) + 16; }
  static State at(float* memory, int queries, int width) {
    float* out = memory;
    return {out + size_t(queries) * width, out + size_t(queries) * (width + 1), out};
  }
};

// Scores become weights, and the state is brought to the new maximum. Rows of `s` have stride `stride`. Weights of the type
// bfloat16 take the first half of a row; their sum is that of the rounded ones.
template <class Weight>
inline void weigh(State& state, float* s, int stride, int queries, int count, int width) {
  for (int m = 0; m < queries; ++m) {
    float* row = s + size_t(m) * stride;
    float most = upper(state.most[m], largest(row, count));
    if (most == -INFINITE) {
      fill(row, row + count, 0.0f);
      continue;
    }
    float sum = 0;
    Weight* weights = reinterpret_cast<Weight*>(row);
    WideV total{};
    int j = 0;
    for (; j + WIDE <= count; j += WIDE) total += rounded(weights + j, decay(load_floats<WideV>(row + j) - most));
    for (int k = 0; k < WIDE; ++k) sum += total[k];
    for (; j < count; ++j) {
      Weight weight;
      from_float(exponential(row[j] - most), weight);
      std::memcpy(weights + j, &weight, sizeof weight);
      sum += to_float(weight);
    }
    if (most != state.most[m]) {
      float shrink = exponential(state.most[m] - most);
      state.sum[m] *= shrink;
      float* out = state.out + size_t(m) * width;
      for (int d = 0; d < width; d += W) store_floats(out + d, load_floats(out + d) * shrink);
      state.most[m] = most;
    }
    state.sum[m] += sum;
  }
}

// Queries are numbered row by row, the heads of a group side by side: m = n * GROUP + g.
inline void adjust(const Call& call, float* s, int stride, int queries, const Tile& tile, int b, int k, int row) {
  if (PLAIN_SCORE && !tile.masked) return;
  for (int m = 0; m < queries; ++m) {
    float* line = s + size_t(m) * stride;
    int h = k * GROUP + m % GROUP, i = row + m / GROUP;
    if (!tile.masked) {
#pragma GCC ivdep
      for (int r = 0; r < tile.count; ++r) line[r] = score(call, line[r], b, h, i, tile.first + r);
    } else {
#pragma GCC ivdep
      for (int r = 0; r < tile.count; ++r) {
        float changed = score(call, line[r], b, h, i, tile.first + r);
        line[r] = visible(call, b, h, i, tile.first + r) ? changed : -INFINITE;
      }
    }
  }
}

inline void finish(const Call& call, const State& state, int m, int b, int h, int n, int width, bool scattered) {
  float most = state.most[m], sum = state.sum[m], scale = 1;
  if (HAS_SINK) {
    float s = sink(call, h), top = upper(most, s);
    scale = most == -INFINITE ? 0.0f : exponential(most - top);
    sum = sum * scale + exponential(s - top);
  }
  float by = sum == 0 ? (EMPTY_IS_NAN ? __builtin_nanf("") : 0.0f) : scale / sum;
  Element* out = static_cast<Element*>(call.out) + b * call.o_batch + h * call.o_head + n * call.o_row;
  const float* from = state.out + size_t(m) * width;
  for (int d = 0; d < DV; ++d) from_float(from[scattered ? spread(d) : d] * by, out[d]);
}

// ---- decode --------------------------------------------------------------------------------------------------------

// A core that goes from page to page waits for the first lines of each, and does not read ahead while it computes. Tiles
// that are read side by side, a row of each in turn, wait together; and each row asks for one that comes AHEAD rows later.
struct Strip {
  const Element* first[STREAMS];  // row 0 of each tile
  int64_t row;
  int streams, count;             // tiles side by side, STREAMS or 1, and rows of each
};

constexpr int ROW_BYTES = most_of(D, DV) * int(sizeof(Element));
constexpr int AHEAD = most_of(1, 8192 / (STREAMS * ROW_BYTES));

struct Ahead {
  const Strip &now, &next;
  bool wanted;

  // The row that comes AHEAD rows after row r of tile t.
  inline const Element* row(int t, int r) const {
    const int behind = r + AHEAD - now.count;
    return behind < 0 ? now.first[t] + (r + AHEAD) * now.row : next.first[t] + behind * next.row;
  }
};

// Into the second level of the cache: the first one has too few places for lines that are on their way. Chunk `c` begins a
// line of the cache.
template <int ENTRIES>
inline void fetch_chunk(const Element* row, int c) {
  constexpr int BYTES = ENTRIES * int(sizeof(Element));
#pragma GCC unroll 4
  for (int x = 0; x < BYTES; x += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + c * BYTES + x, 0, 2);
}
// Calls `run` for all chunks, and tells it at which of them a line of the cache begins.
template <int CHUNKS, int ENTRIES, class Run>
inline void in_chunks(Run run) {
  constexpr int LINE_CHUNKS = most_of(1, 64 / (ENTRIES * int(sizeof(Element))));
  int c = 0;
  for (; c + LINE_CHUNKS <= CHUNKS; c += LINE_CHUNKS)
#pragma GCC unroll 4
    for (int x = 0; x < LINE_CHUNKS; ++x) run(c + x, x == 0);
#pragma GCC unroll 4
  for (int x = 0; x < CHUNKS % LINE_CHUNKS; ++x) run(c + x, x == 0);
}

// From the scores of a query to those of the next: lines at a distance of a power of two would share one set of a cache.
constexpr int LINE = SPAN + 16;
constexpr int BATCH = most_of(8, 16384 / (STREAMS * ROW_BYTES));  // rows of a tile that stay at hand

constexpr int OPERAND = int(sizeof(Operand)) / 4;

// Products of Q queries with R rows; the one with row x goes to place at[x].
template <int Q, int R>
inline void products(const float* query, const Element* const* rows, const Element* const* later, const int* at, float* s) {
  constexpr int SUMS = (Q * R + 7) / 8 * 8;
  V sum[SUMS] = {};
  if (Q == 1) {  // whole rows, in the order of memory
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < CHUNKS; ++c) {
        if (c * CHUNK * int(sizeof(Element)) % 64 == 0) fetch_chunk<CHUNK>(later[r], c);
        Operand::at(query + c * OPERAND).times(Operand::of(rows[r], c), sum[r]);
      }
  } else {
    in_chunks<CHUNKS, CHUNK>([&](int c, bool begins) {
      Operand x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (begins) fetch_chunk<CHUNK>(later[r], c);
        x[r] = Operand::of(rows[r], c).hold();
      }
#pragma GCC unroll 4
      for (int m = 0; m < Q; ++m) {
        const Operand q = Operand::at(query + size_t(m) * D_PAD + c * OPERAND).hold();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) q.times(x[r], sum[m * R + r]);
      }
    });
  }
#pragma GCC unroll 2
  for (int part = 0; part < SUMS; part += 8) {
    V all = sums(sum + part) * SCALE;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
      if (part + k < Q * R) s[size_t((part + k) / R) * LINE + at[(part + k) % R]] = all[k];
  }
}

// Scores of Q queries with R rows at a time, of T of S tiles, from row `from` on; gives the first row that is left.
template <int Q, int S, int R, int T>
inline int scores_by(const float* query, const Ahead& ahead, int from, int to, float* s) {
  const Strip& keys = ahead.now;
  for (; from + R / T <= to; from += R / T)
    for (int t = 0; t < S; t += T) {
      const Element *rows[R], *later[R];
      int at[R];
#pragma GCC unroll 8
      for (int x = 0; x < R; ++x) {
        const int tile = t + x % T, j = from + x / T;
        rows[x] = keys.first[tile] + j * keys.row;
        at[x] = tile * keys.count + j;
        later[x] = ahead.wanted ? ahead.row(tile, j) : rows[x];
      }
      products<Q, R>(query, rows, later, at, s);
    }
  return from;
}
// Eight sums side by side keep a machine busy whose multiply-add takes four cycles; `vdpbf16ps` takes six, and four rows of
// one tile are better then than one of each of four. Long rows of floats are faster two at a time.
template <int Q, int S>
inline void scores_of(const float* query, const Ahead& ahead, int from, int to, float* s) {
  constexpr bool FOUR = Q > 2 && REGISTERS == 32 && (PAIRED || ROW_BYTES <= 256);
  constexpr int R = FOUR ? 4 : 8 / (Q == 3 ? 4 : Q), T = FOUR && PAIRED ? 1 : least(R, S);
  from = scores_by<Q, S, R, T>(query, ahead, from, to, s);
  if constexpr (R > T) scores_by<Q, S, T, T>(query, ahead, from, to, s);
}

// What weighted sums of values are made of: one chunk of ROWS rows.
template <bool PAIRED>
struct ValuesOf {
  using Weight = float;
  static constexpr int ROWS = 1;
  WideV a, b;

  static WideV weight(const Weight* w, bool) { return held(splat<WideV>(*w)); }
  static ValuesOf of(const Element* const* rows, bool, int c) {
    const Pair<WideV> v = load_chunk<DV, WideV>(rows[0], c);
    return {held(v.a), held(v.b)};
  }
  void times(WideV w, WideV& x, WideV& y) const {
    x += w * a;
    y += w * b;
  }
};
//: if brain
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
// Entries of two rows side by side, and two weights: `whole` is false where there is no second row.
template <>
struct ValuesOf<true> {
  using Weight = bfloat16;
  static constexpr int ROWS = 2;
  WideV a, b;

  static WideV weight(const Weight* w, bool whole) {
    uint32_t both = 0;
    std::memcpy(&both, w, whole ? 4 : 2);
    return held(splat<WideV>(bits<float>(both)));
  }
  static ValuesOf of(const Element* const* rows, bool whole, int c) {
    const __m512i first = (__m512i)load_raw<DV, WideV>(rows[0], c), second = whole ? (__m512i)load_raw<DV, WideV>(rows[1], c) : __m512i{};
    return {held((WideV)_mm512_unpacklo_epi16(first, second)), held((WideV)_mm512_unpackhi_epi16(first, second))};
  }
  void times(WideV w, WideV& x, WideV& y) const {
    x = (WideV)_mm512_dpbf16_ps((__m512)x, (__m512bh)w, (__m512bh)a);
    y = (WideV)_mm512_dpbf16_ps((__m512)y, (__m512bh)w, (__m512bh)b);
  }
};
#endif
//: endif
using Values = ValuesOf<PAIRED>;
using Weight = Values::Weight;
constexpr int WEIGHTS = LINE * int(sizeof(float) / sizeof(Weight));  // from the weights of a query to those of the next

// Adds R weighted rows to the results of Q queries. The weights stay in registers, the results do not.
template <int Q, int R>
inline void add_rows(float* out, const Weight* weight, const Element* const* rows, const Element* const* later, const int* at) {
  constexpr int STEPS = (R + Values::ROWS - 1) / Values::ROWS;
  constexpr bool WHOLE = R % Values::ROWS == 0;
  WideV w[Q][STEPS];
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m)
#pragma GCC unroll 8
    for (int x = 0; x < STEPS; ++x) w[m][x] = Values::weight(weight + size_t(m) * WEIGHTS + at[x * Values::ROWS], WHOLE);
  in_chunks<V_CHUNKS, V_CHUNK>([&](int c, bool begins) {
    WideV a[Q], b[Q];
#pragma GCC unroll 4
    for (int m = 0; m < Q; ++m) {
      a[m] = load_floats<WideV>(out + size_t(m) * DV_PAD + c * V_CHUNK);
      b[m] = load_floats<WideV>(out + size_t(m) * DV_PAD + c * V_CHUNK + WIDE);
    }
#pragma GCC unroll 8
    for (int x = 0; x < STEPS; ++x) {
#pragma GCC unroll 2
      for (int k = x * Values::ROWS; k < least(R, (x + 1) * Values::ROWS); ++k)
        if (begins) fetch_chunk<V_CHUNK>(later[k], c);
      const Values v = Values::of(rows + x * Values::ROWS, WHOLE, c);
#pragma GCC unroll 4
      for (int m = 0; m < Q; ++m) v.times(w[m][x], a[m], b[m]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < Q; ++m) {
      store_floats(out + size_t(m) * DV_PAD + c * V_CHUNK, a[m]);
      store_floats(out + size_t(m) * DV_PAD + c * V_CHUNK + WIDE, b[m]);
    }
  });
}

constexpr int Q_AT_ONCE = REGISTERS == 32 ? 4 : 2;
constexpr int HELD = REGISTERS == 32 && sizeof(Element) == 2 ? 16 : 8;  // weights in registers

template <int Q, int S>
inline void weighted(float* out, const Weight* weight, const Ahead& ahead, int from, int to) {
  const Strip& values = ahead.now;
  constexpr int N = Values::ROWS, R = least(8, N * HELD / (Q == 3 ? 4 : Q)), T = least(R / N, S);
  const auto rows_at = [&](auto number, int t, int r) {
    constexpr int COUNT = number;
    const Element *rows[COUNT], *later[COUNT];
    int at[COUNT];
#pragma GCC unroll 8
    for (int x = 0; x < COUNT; ++x) {
      const int tile = t + x / N % T, j = r + x / N / T * N + x % N;
      rows[x] = values.first[tile] + j * values.row;
      at[x] = tile * values.count + j;
      later[x] = ahead.wanted ? ahead.row(tile, j) : rows[x];
    }
    add_rows<Q, COUNT>(out, weight, rows, later, at);
  };
  int r = from;
  for (; r + R / T <= to; r += R / T)
    for (int t = 0; t < S; t += T) rows_at(Number<R>(), t, r);
  for (; r < to; ++r)
    for (int t = 0; t < S; ++t) rows_at(Number<1>(), t, r);
}

// Calls `run` with a number and the first query, for blocks of at most MOST. There are as many queries as a multiple of
// the group.
template <int MOST, class Run>
inline void in_blocks(int queries, Run run) {
  constexpr int STEP = GROUP % MOST == 0 ? MOST : GROUP % 2 == 0 ? 2 : 1;
  int m = 0;
  for (; m + MOST <= queries; m += MOST) run(Number<MOST>(), m);
  if constexpr (MOST > 3 && STEP == 1)
    if (queries - m == 3) run(Number<3>(), m);
  if constexpr (MOST > 2 && STEP <= 2)
    if (queries - m == 2) run(Number<2>(), m);
  if constexpr (MOST > 1 && STEP == 1)
    if (queries - m == 1) run(Number<1>(), m);
}

struct Decode {
  const Call& call;
  int queries, row;  // row: the first new one

  void load_queries(float* query, int b, int k) const {
    const Element* from = static_cast<const Element*>(call.query) + b * call.q_batch;
    for (int m = 0; m < queries; ++m) {
      const Element* line = from + (k * GROUP + m % GROUP) * call.q_head + m / GROUP * call.q_row;
      for (int c = 0; c < CHUNKS; ++c) Operand::of(line, c).store(query + size_t(m) * D_PAD + c * OPERAND);
    }
  }

  // The first tiles: STREAMS whole ones, or a single one; none at all where `count` is 0.
  Strip strip_of(const Rows& rows, const Tile* tiles, int count) const {
    Strip strip{{}, rows.row, 0, 0};
    if (count <= 0) return strip;
    while (strip.streams < least(STREAMS, count) && tiles[strip.streams].count == call.tile) ++strip.streams;
    if (strip.streams != STREAMS) strip.streams = 1;
    strip.count = tiles[0].count;
    for (int x = 0; x < STREAMS; ++x) strip.first[x] = rows.at(tiles[x % strip.streams].first);
    return strip;
  }

  // Calls `run` for all strips of the tiles; `after` is what is read behind them.
  template <int MOST, class Run>
  void in_strips(const Rows& rows, const Tile* tiles, int count, const Strip& after, Run run) const {
    Strip strip = strip_of(rows, tiles, count);
    for (int t = 0, at = 0; t < count;) {
      const int then = t + strip.streams;
      const Strip next = then < count ? strip_of(rows, tiles + then, count - then) : after.streams ? after : strip;
      for (int from = 0, by = BATCH * STREAMS / strip.streams; from < strip.count; from += by)
        in_blocks<MOST>(queries, [&](auto q, int m) {
          const int to = least(from + by, strip.count);
          const Ahead ahead{strip, next, m == 0};
          if (strip.streams == STREAMS)
            run(q, Number<STREAMS>(), ahead, at, from, to, m);
          else
            run(q, Number<1>(), ahead, at, from, to, m);
        });
      at += strip.streams * strip.count;
      t = then;
      strip = next;
    }
  }

  // One step of the softmax: all keys of a span, then all values. Behind it come `more` tiles.
  void span(State& state, const float* query, float* s, const Rows& keys, const Rows& values, const Tile* tiles, int count, int more, int b, int k) const {
    in_strips<4>(keys, tiles, count, strip_of(values, tiles, count), [&](auto q, auto streams, const Ahead& ahead, int at, int from, int to, int m) {
      scores_of<q, streams>(query + size_t(m) * D_PAD, ahead, from, to, s + size_t(m) * LINE + at);
    });
    int all = 0;
    for (int t = 0; t < count; all += tiles[t++].count) adjust(call, s + all, LINE, queries, tiles[t], b, k, row);
    weigh<Weight>(state, s, LINE, queries, all, DV_PAD);
    in_strips<Q_AT_ONCE>(values, tiles, count, strip_of(keys, tiles + count, more), [&](auto q, auto streams, const Ahead& ahead, int at, int from, int to, int m) {
      weighted<q, streams>(state.out + size_t(m) * DV_PAD, reinterpret_cast<const Weight*>(s + size_t(m) * LINE) + at, ahead, from, to);
    });
  }

  void write(const State& state, int b, int k) const {
    for (int m = 0; m < queries; ++m) finish(call, state, m, b, k * GROUP + m % GROUP, m / GROUP, DV_PAD, true);
  }
};

// One state into another: the two parts of a softmax.
inline void merge(State& into, const State& from, int queries) {
  for (int m = 0; m < queries; ++m) {
    float most = upper(into.most[m], from.most[m]);
    if (most == -INFINITE) continue;
    float mine = exponential(into.most[m] - most), theirs = exponential(from.most[m] - most);
    into.sum[m] = into.sum[m] * mine + from.sum[m] * theirs;
    for (int d = 0; d < DV_PAD; ++d) {
      size_t at = size_t(m) * DV_PAD + d;
      into.out[at] = into.out[at] * mine + from.out[at] * theirs;
    }
    into.most[m] = most;
  }
}

thread_local Scratch mine, shared;
thread_local Tiles tiles;

// 0, or 1 where there was no memory: no exception may leave a parallel region.
template <class Run>
inline int guarded(Run run) {
  try {
    run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

int decode(const Call& call) {
  const int tile = int(call.tile), queries = int(call.count) * GROUP;
  const Decode work{call, queries, int(call.start)};
  tiles_of(tiles, int(call.start), int(call.start + call.count) - 1, int(call.rows), tile);
  const Tiles& list = tiles;
  const int64_t each = most_of<int64_t>(1, list.count), heads = call.batch * KV_HEADS, total = heads * each;
  // Below some 64 KiB of keys and values a second thread costs more than it gives.
  const int64_t bytes = total * tile * (D + DV) * int64_t(sizeof(Element));
  const int shares = int(most_of<int64_t>(1, least(least(call.threads, total), bytes >> 16)));
  // All tiles of all heads, in order, are cut into equal shares. A head that is cut leaves a part at the end of one
  // share and one at the beginning of the next.
  const size_t state_floats = (State::floats(queries, DV_PAD) + 15) / 16 * 16;
  float* parts = shared.get(2 * shares * state_floats);
  int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(shares) reduction(| : failed) if (shares > 1)
  for (int share = 0; share < shares; ++share)
    failed |= guarded([&] {
      float* query = mine.get(state_floats + size_t(queries) * (D_PAD + LINE) + 16);
      float* s = query + size_t(queries) * D_PAD;
      float* own = query + (size_t(queries) * (D_PAD + LINE) + 15) / 16 * 16;
      const int64_t from = total * share / shares, to = total * (share + 1) / shares;
      for (int64_t at = from; at < to;) {
        const int64_t head = at / each, end = least(to, (head + 1) * each);
        const bool begins = at == head * each, whole = begins && end == (head + 1) * each;
        const int b = int(head / KV_HEADS), k = int(head % KV_HEADS);
        State state = State::at(whole ? own : parts + (2 * share + begins) * state_floats, queries, DV_PAD);
        state.clear(queries, DV_PAD);
        work.load_queries(query, b, k);
        const Rows keys = rows_of(call.keys, b, k), values = rows_of(call.values, b, k);
        for (int64_t next; at < end; at = next) {
          next = least(end, at + SPAN / tile);
          if (list.count != 0)
            work.span(state, query, s, keys, values, list.data + (at - head * each), int(next - at), int(end - next), b, k);
        }
        if (whole) work.write(state, b, k);
      }
    });
  if (failed) return 1;
  // Heads that were cut: the first part belongs to the share in which the head begins.
  for (int share = 0; share + 1 < shares; ++share) {
    const int64_t to = total * (share + 1) / shares, head = to / each;
    if (to % each == 0 || total * share / shares > head * each) continue;
    State state = State::at(parts + (2 * share + 1) * state_floats, queries, DV_PAD);
    for (int next = share + 1; next < shares && total * next / shares < (head + 1) * each; ++next)
      merge(state, State::at(parts + 2 * next * state_floats, queries, DV_PAD), queries);
    work.write(state, int(head / KV_HEADS), int(head % KV_HEADS));
  }
  return 0;
}

// ---- prefill -------------------------------------------------------------------------------------------------------

constexpr int MR = 6, NR = 2 * WIDE;       // the block of results that stays in registers
constexpr int BLOCK_KEYS = 64;
constexpr int BLOCK_ROWS = GROUP >= 192 ? 1 : 192 / GROUP;
constexpr int QUERIES = (BLOCK_ROWS * GROUP + MR - 1) / MR * MR;
constexpr int DV_NR = (DV + NR - 1) / NR * NR;

// c[MR][NR] (+)= a[MR][depth] * b[depth][NR]
template <bool ADD>
inline void multiply(const float* a, int a_row, const float* b, int b_row, float* c, int c_row, int depth) {
  WideV sum[MR][2];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    sum[m][0] = ADD ? load_floats<WideV>(c + size_t(m) * c_row) : WideV{};
    sum[m][1] = ADD ? load_floats<WideV>(c + size_t(m) * c_row + WIDE) : WideV{};
  }
  for (int d = 0; d < depth; ++d) {
    WideV x = load_floats<WideV>(b + size_t(d) * b_row), y = load_floats<WideV>(b + size_t(d) * b_row + WIDE);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      WideV q = splat<WideV>(a[size_t(m) * a_row + d]);
      sum[m][0] += q * x;
      sum[m][1] += q * y;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    store_floats(c + size_t(m) * c_row, sum[m][0]);
    store_floats(c + size_t(m) * c_row + WIDE, sum[m][1]);
  }
}

// Eight vectors, rows of a square, become its columns.
inline void transpose(V* v) {
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    V x = v[i], y = v[i + 1];
    v[i] = __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14);
    v[i + 1] = __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    int i = k / 2 * 4 + k % 2;
    V x = v[i], y = v[i + 2];
    v[i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 2] = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    V x = v[i], y = v[i + 4];
    v[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Keys as [D][BLOCK_KEYS], so that a vector holds one entry of many keys. Keys behind the last one are zero.
inline void pack_keys(float* to, const Rows& keys, const Tile& tile) {
  for (int j = 0; j < BLOCK_KEYS; j += W) {
    const Element* rows[W];
    for (int r = 0; r < W; ++r) rows[r] = keys.at(tile.first + least(j + r, tile.count - 1));
    for (int c = 0; c < CHUNKS; ++c) {
      V a[W], b[W];
#pragma GCC unroll 8
      for (int r = 0; r < W; ++r) {
        const Pair<V> x = load_chunk<D, V>(rows[r], c);
        a[r] = j + r < tile.count ? x.a : V{};
        b[r] = j + r < tile.count ? x.b : V{};
      }
      transpose(a);
      transpose(b);
      for (int r = 0; r < W; ++r) {
        const int first = c * CHUNK + (INTERLEAVED ? 2 * r : r), second = c * CHUNK + (INTERLEAVED ? 2 * r + 1 : W + r);
        if (first < D) store_floats(to + size_t(first) * BLOCK_KEYS + j, a[r]);
        if (second < D) store_floats(to + size_t(second) * BLOCK_KEYS + j, b[r]);
      }
    }
  }
}

inline void pack_values(float* to, const Rows& values, const Tile& tile) {
  for (int r = 0; r < tile.count; ++r) {
    const Element* row = values.at(tile.first + r);
    float* line = to + size_t(r) * DV_NR;
    for (int d = 0; d < DV; ++d) line[d] = to_float(row[d]);
  }
}

void prefill_block(const Call& call, int b, int k, int first) {
  const int count = least<int>(BLOCK_ROWS, int(call.count) - first), used = count * GROUP;
  const int queries = (used + MR - 1) / MR * MR, row = int(call.start) + first;
  float* query = mine.get(size_t(QUERIES) * (D + BLOCK_KEYS) + State::floats(QUERIES, DV_NR) + size_t(BLOCK_KEYS) * (D + DV_NR) + 64);
  float* s = query + size_t(QUERIES) * D;
  float* packed_keys = s + size_t(QUERIES) * BLOCK_KEYS;
  float* packed_values = packed_keys + size_t(BLOCK_KEYS) * D;
  State state = State::at(packed_values + size_t(BLOCK_KEYS) * DV_NR, QUERIES, DV_NR);
  state.clear(QUERIES, DV_NR);
  fill(packed_values, packed_values + size_t(BLOCK_KEYS) * DV_NR, 0.0f);
  fill(query, query + size_t(queries) * D, 0.0f);
  for (int m = 0; m < used; ++m) {
    const Element* line = static_cast<const Element*>(call.query) + b * call.q_batch +
                          (k * GROUP + m % GROUP) * call.q_head + (first + m / GROUP) * call.q_row;
    for (int d = 0; d < D; ++d) query[size_t(m) * D + d] = to_float(line[d]) * SCALE;
  }
  tiles_of(tiles, row, row + count - 1, int(call.rows), BLOCK_KEYS);
  const Rows keys = rows_of(call.keys, b, k), values = rows_of(call.values, b, k);
  for (int t = 0; t < tiles.count; ++t) {
    const Tile& tile = tiles.data[t];
    pack_keys(packed_keys, keys, tile);
    pack_values(packed_values, values, tile);
    for (int j = 0; j < tile.count; j += NR)
      for (int m = 0; m < queries; m += MR)
        multiply<false>(query + size_t(m) * D, D, packed_keys + j, BLOCK_KEYS, s + size_t(m) * BLOCK_KEYS + j, BLOCK_KEYS, D);
    adjust(call, s, BLOCK_KEYS, used, tile, b, k, row);
    weigh<float>(state, s, BLOCK_KEYS, used, tile.count, DV_NR);
    for (int d = 0; d < DV_NR; d += NR)
      for (int m = 0; m < queries; m += MR)
        multiply<true>(s + size_t(m) * BLOCK_KEYS, BLOCK_KEYS, packed_values + d, DV_NR, state.out + size_t(m) * DV_NR + d, DV_NR, tile.count);
  }
  for (int m = 0; m < used; ++m) finish(call, state, m, b, k * GROUP + m % GROUP, first + m / GROUP, DV_NR, false);
}

int prefill(const Call& call) {
  const int64_t blocks = (call.count + BLOCK_ROWS - 1) / BLOCK_ROWS, total = call.batch * KV_HEADS * blocks;
  const int threads = int(most_of<int64_t>(1, least(call.threads, total)));
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(| : failed) if (threads > 1)
  for (int64_t at = 0; at < total; ++at) {
    // The last blocks see the most keys: they come first.
    const int64_t block = blocks - 1 - at / (call.batch * KV_HEADS), head = at % (call.batch * KV_HEADS);
    failed |= guarded([&] { prefill_block(call, int(head / KV_HEADS), int(head % KV_HEADS), int(block) * BLOCK_ROWS); });
  }
  return failed;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// 0, or 1 where there was no memory.
EXPORT int kvpass_decode(const Call* call) {
  int failed = 0;
  return guarded([&] { failed = decode(*call); }) | failed;
}

EXPORT int kvpass_prefill(const Call* call) {
  int failed = 0;
  return guarded([&] { failed = prefill(*call); }) | failed;
}
}

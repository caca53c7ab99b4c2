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
//: if half
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

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;  // two registers on a machine of 128 bits
#endif
constexpr int CHUNK = 2 * W;
constexpr int SPAN = most_of(1, 131072 / (most_of(D, DV) * int(sizeof(Element))) / TILE) * TILE;  // keys of one softmax step
constexpr int CHUNKS = (D + CHUNK - 1) / CHUNK, V_CHUNKS = (DV + CHUNK - 1) / CHUNK;
constexpr int D_PAD = CHUNKS * CHUNK, DV_PAD = V_CHUNKS * CHUNK;

typedef float V __attribute__((vector_size(4 * W)));
typedef float V8 __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(4 * W)));

struct Pair {
  V a, b;
};

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline V load_floats(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_floats(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V splat(float x) { return V{} + x; }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits<float>(uint32_t(x.raw) << 16); }
//: if half
inline float to_float(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.raw);
#else
  return float(bits<_Float16>(x.raw));
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
  to.raw = bits<uint16_t>(_Float16(x));
#endif
}
//: endif

// One chunk in an order of its own: for bfloat16 the even entries and the odd ones, which are a shift and a mask away
// from floats. Dot products do not mind, as queries are loaded by the same function; results are put back by `spread`.
inline Pair load_pair(const float* p) { return {load_floats(p), load_floats(p + W)}; }
inline Pair load_pair(const bfloat16* p) {
  U u;
  std::memcpy(&u, p, sizeof u);
  return {bits<V>(u << 16), bits<V>(u & 0xffff0000u)};
}
//: if half
inline Pair load_pair(const float16* p) {
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
          _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + W)))};
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + W)))};
#else
  Pair out;
  for (int k = 0; k < W; ++k) out.a[k] = to_float(p[k]), out.b[k] = to_float(p[k + W]);
  return out;
#endif
}
//: endif

// Chunk `c` of a row of SIZE entries; the last one is filled up with zeros and reads nothing behind the row.
template <int SIZE, class T>
inline Pair load_chunk(const T* row, int c) {
  if (SIZE % CHUNK != 0 && c == SIZE / CHUNK) {
    T rest[CHUNK] = {};
    std::memcpy(rest, row + c * CHUNK, (SIZE % CHUNK) * sizeof(T));
    return load_pair(rest);
  }
  return load_pair(row + c * CHUNK);
}

// Where entry `d` of a row stands in its chunks.
inline int spread(int d) {
  if (INTERLEAVED) {
    int in = d % CHUNK;
    return d - in + in / 2 + (in % 2) * W;
  }
  return d;
}

inline V8 half(V v) {
#if defined(__AVX512F__)
  V8 lo = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), hi = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return lo + hi;
#else
  return v;
#endif
}
inline V8 pairs(V8 x, V8 y) {
  return __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
}
inline V8 quads(V8 x, V8 y) {
  return __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
}
// The sums of eight vectors, in order.
inline V8 sums(const V* v) {
  V8 x = quads(pairs(half(v[0]), half(v[1])), pairs(half(v[2]), half(v[3])));
  V8 y = quads(pairs(half(v[4]), half(v[5])), pairs(half(v[6]), half(v[7])));
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}

// 2^n * p(f), with n + f = x / ln 2 and |f| <= 1/2; Cody and Waite's split of ln 2, a polynomial of degree six. Exact
// zero below the smallest normal number, so that a masked key weighs nothing.
inline float exponential(float x) {
  float clamped = x > 88.0f ? 88.0f : x < -88.0f ? -88.0f : x;
  float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  float scale = bits<float>((bits<int32_t>(shifted) << 23) + 0x3f800000);
  return x < -87.33654f ? 0.0f : x > 88.0f ? INFINITE : p * scale;
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
  V some = splat(most);
  for (; j + W <= count; j += W) {
    V x = load_floats(s + j);
    some = (x > some) | (x != x) ? x : some;
  }
  for (int k = 0; k < W; ++k) most = upper(most, some[k]);
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

// Scores become weights, and the state is brought to the new maximum. Rows of `s` have stride `stride`.
inline void weigh(State& state, float* s, int stride, int queries, int count, int width) {
  for (int m = 0; m < queries; ++m) {
    float* row = s + size_t(m) * stride;
    float most = upper(state.most[m], largest(row, count));
    if (most == -INFINITE) {
      fill(row, row + count, 0.0f);
      continue;
    }
    float sum = 0;
#pragma GCC ivdep
    for (int j = 0; j < count; ++j) row[j] = exponential(row[j] - most);
    V total{};
    int j = 0;
    for (; j + W <= count; j += W) total += load_floats(row + j);
    for (int k = 0; k < W; ++k) sum += total[k];
    for (; j < count; ++j) sum += row[j];
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

constexpr int LINE = SPAN + 8;  // the scores of one query; a block of products may run over the end

// Products of Q queries with R rows.
template <int Q, int R>
inline void products(const float* query, const Element* const* rows, float* s, int stride, int first) {
  V sum[8] = {};
  constexpr int STEP = Q == 1 ? CHUNKS : 1;  // a single query reads whole rows, in the order of memory
  for (int c0 = 0; c0 < CHUNKS; c0 += STEP) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = c0; c < c0 + STEP; ++c) {
        Pair x = load_chunk<D>(rows[r], c);
#pragma GCC unroll 4
        for (int m = 0; m < Q; ++m) {
          const float* q = query + size_t(m) * D_PAD + c * CHUNK;
          sum[m * R + r] += load_floats(q) * x.a;
          sum[m * R + r] += load_floats(q + W) * x.b;
        }
      }
  }
  V8 all = sums(sum);
#pragma GCC unroll 8
  for (int k = 0; k < Q * R; ++k) s[size_t(k / R) * stride + first + k % R] = all[k];
}

template <int Q>
inline void scores_of(const float* query, const Rows& keys, const Tile& tile, float* s) {
  constexpr int R = Q == 1 ? 8 : Q == 2 ? 4 : 2;
  const Element* key = keys.at(tile.first);
  for (int r = 0; r < tile.count; r += R) {
    const Element* rows[R];
    for (int x = 0; x < R; ++x) rows[x] = key + least(r + x, tile.count - 1) * keys.row;
    products<Q, R>(query, rows, s, LINE, r);
  }
}

// Values that are read next. Chunks go through a tile in columns, in which the machine sees no stream: the next tile is
// fetched line by line, in the order of memory, beside the work on this one.
struct Ahead {
  static constexpr int LINES = (DV * int(sizeof(Element)) + 63) / 64;
  const Element* first;
  int64_t row;
  int count;

  inline void fetch(int line) const {
    if (line < count * LINES)
      __builtin_prefetch(reinterpret_cast<const char*>(first + line / LINES * row) + line % LINES * 64);
  }
};

// Weighted values of Q queries, C chunks at a time.
template <int Q, int C>
inline void values_into(float* out, const float* weight, const Element* value, int64_t row, int count, int c, const Ahead& ahead) {
  V a[Q][C], b[Q][C];
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m)
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      a[m][x] = load_floats(out + size_t(m) * DV_PAD + (c + x) * CHUNK);
      b[m][x] = load_floats(out + size_t(m) * DV_PAD + (c + x) * CHUNK + W);
    }
  constexpr int FETCHED = (Ahead::LINES * C + V_CHUNKS - 1) / V_CHUNKS;
  for (int r = 0; r < count; ++r) {
    for (int x = 0; x < FETCHED; ++x) ahead.fetch((c / C * count + r) * FETCHED + x);
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      Pair v = load_chunk<DV>(value + r * row, c + x);
#pragma GCC unroll 4
      for (int m = 0; m < Q; ++m) {
        V w = splat(weight[size_t(m) * LINE + r]);
        a[m][x] += w * v.a;
        b[m][x] += w * v.b;
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m)
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      store_floats(out + size_t(m) * DV_PAD + (c + x) * CHUNK, a[m][x]);
      store_floats(out + size_t(m) * DV_PAD + (c + x) * CHUNK + W, b[m][x]);
    }
}

template <int Q>
inline void weighted(float* out, const float* weight, const Element* value, int64_t row, int count, const Ahead& ahead) {
  constexpr int C = most_of(1, least(V_CHUNKS, (W == 16 ? 8 : 4) / Q));
  int c = 0;
  for (; c + C <= V_CHUNKS; c += C) values_into<Q, C>(out, weight, value, row, count, c, ahead);
  for (; c < V_CHUNKS; ++c) values_into<Q, 1>(out, weight, value, row, count, c, ahead);
}

// Calls `run` with a number and the first query, for blocks of at most four.
template <class Run>
inline void in_blocks(int queries, Run run) {
  int m = 0;
  for (; m + 4 <= queries; m += 4) run(Number<4>(), m);
  if (queries - m == 3) run(Number<3>(), m);
  if (queries - m == 2) run(Number<2>(), m);
  if (queries - m == 1) run(Number<1>(), m);
}

struct Decode {
  const Call& call;
  int queries, row;  // row: the first new one

  void load_queries(float* query, int b, int k) const {
    const Element* from = static_cast<const Element*>(call.query) + b * call.q_batch;
    for (int m = 0; m < queries; ++m) {
      const Element* line = from + (k * GROUP + m % GROUP) * call.q_head + m / GROUP * call.q_row;
      for (int c = 0; c < CHUNKS; ++c) {
        Pair x = load_chunk<D>(line, c);
        store_floats(query + size_t(m) * D_PAD + c * CHUNK, x.a * SCALE);
        store_floats(query + size_t(m) * D_PAD + c * CHUNK + W, x.b * SCALE);
      }
    }
  }

  // One step of the softmax: all keys of a span, then all values, so that memory sees long streams.
  void span(State& state, const float* query, float* s, const Rows& keys, const Rows& values, const Tile* tiles, int count, int b, int k) const {
    int at = 0;
    for (int t = 0; t < count; ++t) {
      in_blocks(queries, [&](auto q, int m) {
        scores_of<q>(query + size_t(m) * D_PAD, keys, tiles[t], s + size_t(m) * LINE + at);
      });
      adjust(call, s + at, LINE, queries, tiles[t], b, k, row);
      at += tiles[t].count;
    }
    weigh(state, s, LINE, queries, at, DV_PAD);
    at = 0;
    for (int t = 0; t < count; ++t) {
      const Ahead ahead{values.at(tiles[least(t + 1, count - 1)].first), values.row, t + 1 < count ? tiles[t + 1].count : 0};
      in_blocks(queries, [&](auto q, int m) {
        weighted<q>(state.out + size_t(m) * DV_PAD, s + size_t(m) * LINE + at, values.at(tiles[t].first), values.row,
                    tiles[t].count, m == 0 ? ahead : Ahead{});
      });
      at += tiles[t].count;
    }
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
            work.span(state, query, s, keys, values, list.data + (at - head * each), int(next - at), b, k);
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

constexpr int MR = 6, NR = 2 * W;          // the block of results that stays in registers
constexpr int BLOCK_KEYS = 64;
constexpr int BLOCK_ROWS = GROUP >= 96 ? 1 : 96 / GROUP;
constexpr int QUERIES = (BLOCK_ROWS * GROUP + MR - 1) / MR * MR;
constexpr int DV_NR = (DV + NR - 1) / NR * NR;

// c[MR][NR] (+)= a[MR][depth] * b[depth][NR]
template <bool ADD>
inline void multiply(const float* a, int a_row, const float* b, int b_row, float* c, int c_row, int depth) {
  V sum[MR][2];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    sum[m][0] = ADD ? load_floats(c + size_t(m) * c_row) : V{};
    sum[m][1] = ADD ? load_floats(c + size_t(m) * c_row + W) : V{};
  }
  for (int d = 0; d < depth; ++d) {
    V x = load_floats(b + size_t(d) * b_row), y = load_floats(b + size_t(d) * b_row + W);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      V q = splat(a[size_t(m) * a_row + d]);
      sum[m][0] += q * x;
      sum[m][1] += q * y;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    store_floats(c + size_t(m) * c_row, sum[m][0]);
    store_floats(c + size_t(m) * c_row + W, sum[m][1]);
  }
}

// Keys as [D][BLOCK_KEYS], so that a vector holds one entry of many keys. Keys behind the last one are zero.
inline void pack_keys(float* to, const Rows& keys, const Tile& tile) {
  constexpr int SIDE = 8;
  for (int j0 = 0; j0 < BLOCK_KEYS; j0 += SIDE) {
    const Element* rows[SIDE];
    for (int r = 0; r < SIDE; ++r) rows[r] = j0 + r < tile.count ? keys.at(tile.first + j0 + r) : nullptr;
    for (int d = 0; d < D; ++d)
      for (int r = 0; r < SIDE; ++r) to[size_t(d) * BLOCK_KEYS + j0 + r] = rows[r] == nullptr ? 0.0f : to_float(rows[r][d]);
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
    weigh(state, s, BLOCK_KEYS, used, tile.count, DV_NR);
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

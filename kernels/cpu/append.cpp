// New rows into the pages of a pool, on a CPU.
//
// A pool is a list of heads, each with the rows of all pages one behind the other. A row of one head is a piece of BYTES
// bytes, and so is what is copied at a time.
//: if general
//
// The file compiles as it stands. For one shape, facts take the place of the values before "//=".
//: endif

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BYTES = 512;  //= bytes

// All fields are 8 bytes; strides count bytes.
struct Call {
  char* pool;
  const char* rows;
  const int64_t* place;  // [count], page * page size + offset; where two rows have one place, either may stay
  int64_t heads, count, pool_head, rows_head, rows_row, threads;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void kvpass_append(const Call* call) {
  const Call& c = *call;
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
  for (int64_t k = 0; k < c.count * c.heads; ++k) {
    const int64_t row = k / c.heads, head = k % c.heads;
    std::memcpy(c.pool + head * c.pool_head + c.place[row] * BYTES, c.rows + head * c.rows_head + row * c.rows_row, BYTES);
  }
}

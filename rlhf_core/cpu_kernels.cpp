// What CPUs do most of the time when torch's kernels reach a fraction of their speed: attention, and products of few rows.
//
// Attention is computed in fp32 whatever the type of what is read and written: the causal one of rows side by side, forwards and
// backwards (`rows_*`), and that of one new token of each row over what a cache holds (`token_*`). Products of a few rows with
// weights that are laid out for it (`pack`, `few_rows_*`) cost what reading the weights costs, so they are fetched ahead. What a
// token is drawn by takes one pass over its logits (`weights_*`).
//
// Each output is computed by one thread in one order: results do not depend on the number of threads. Vectors are those of GCC
// and Clang, which compile to whatever the processor has. Called by cpu_kernels.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, TALL = 6, WIDE = 4;  // a tile of a product: 6 rows of 4 vectors of 16 numbers
constexpr int64_t TILE = LANES * WIDE;
constexpr int64_t BLOCK = 8 * TALL;  // queries whose weights are kept at once in the backward pass

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
struct Bf16 { uint16_t bits; };

float widened(float x) { return x; }
float widened(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
void store(float x, float* to) { *to = x; }
void store(float x, Bf16* to) {  // to the nearest, ties to even, as torch rounds
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, 64);
  return v;
}
Floats load(const Bf16* from) {
  typedef uint16_t Shorts __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  Shorts s;
  std::memcpy(&s, from, 32);
  return (Floats)(__builtin_convertvector(s, Words) << 16);
}
void put(float* to, Floats v) { std::memcpy(to, &v, 64); }
float total(Floats v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half h[2];
  std::memcpy(h, &v, 64);
  const Half a = h[0] + h[1];
  Quarter q[2];
  std::memcpy(q, &a, 32);
  const Quarter b = q[0] + q[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// e^x for x <= 0, to 2 ulp (Cephes' polynomial); 0 where that is below e^-87. NaN stays NaN.
Floats exponential(Floats x) {
  const Floats low = {-87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87, -87};
  const Ints gone = x < low;
  const Floats bounded = gone ? low : x;
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is left of it is the nearest integer
  const Floats n = shifted - 12582912.0f;
  Floats r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return gone ? p * 0.0f : p * power;
}

// C[6][16 V] (+)= A B, with A[i][k] at a[i * down + k * along] and B[k] at b + k * ldb.
template <int V>
void tile(const float* a, int64_t down, int64_t along, const float* b, int64_t ldb, int64_t inner, float* c, int64_t ldc,
          bool add) {
  Floats sum[TALL][V];
  for (int i = 0; i < TALL; i++)
    for (int v = 0; v < V; v++) sum[i][v] = add ? load(c + i * ldc + v * LANES) : Floats{};
  for (int64_t k = 0; k < inner; k++) {
    Floats row[V];
    for (int v = 0; v < V; v++) row[v] = load(b + k * ldb + v * LANES);
    for (int i = 0; i < TALL; i++) {
      const float x = a[i * down + k * along];
      for (int v = 0; v < V; v++) sum[i][v] += x * row[v];
    }
  }
  for (int i = 0; i < TALL; i++)
    for (int v = 0; v < V; v++) put(c + i * ldc + v * LANES, sum[i][v]);
}

// Six rows of a product that is `columns` wide, a multiple of 16.
void six_rows(const float* a, int64_t down, int64_t along, const float* b, int64_t ldb, int64_t inner, float* c, int64_t ldc,
              int64_t columns, bool add) {
  int64_t j = 0;
  for (; j + TILE <= columns; j += TILE) tile<4>(a, down, along, b + j, ldb, inner, c + j, ldc, add);
  switch ((columns - j) / LANES) {
    case 3: tile<3>(a, down, along, b + j, ldb, inner, c + j, ldc, add); break;
    case 2: tile<2>(a, down, along, b + j, ldb, inner, c + j, ldc, add); break;
    case 1: tile<1>(a, down, along, b + j, ldb, inner, c + j, ldc, add); break;
  }
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A thread's scratch memory, kept between calls.
float* scratch(int64_t numbers) {
  static thread_local std::vector<float> kept;
  if (int64_t(kept.size()) < numbers + LANES) kept.resize(numbers + LANES);
  float* at = kept.data();
  return at + (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / 4;
}

struct Taker {  // parts of a thread's scratch memory, each from a boundary of 64 bytes
  float* next;
  float* take(int64_t numbers) {
    float* at = next;
    next += up(numbers, LANES);
    return at;
  }
};

// Tokens of one head as fp32 `[rows][d]`, zeros below them.
template <typename T>
void widen(const T* from, int64_t stride, int64_t n, int64_t rows, int64_t d, float factor, float* to) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t x = 0; x < d; x += LANES) put(to + i * d + x, load(from + i * stride + x) * factor);
  std::fill(to + n * d, to + rows * d, 0.0f);
}

// The same turned round, `[d][columns]`, zeros from column n on; `columns`: n, up to a multiple of 16.
template <typename T>
void turn(const T* from, int64_t stride, int64_t n, int64_t columns, int64_t d, float* to) {
  for (int64_t x = 0; x < d; x += LANES) {
    for (int64_t j = 0; j < n; j += LANES) {
      float part[LANES][LANES];
      for (int64_t y = 0; y < LANES; y++)
        put(part[y], j + y < n ? load(from + (j + y) * stride + x) : Floats{});
      for (int64_t z = 0; z < LANES; z++)
        for (int64_t y = 0; y < LANES; y++) to[(x + z) * columns + j + y] = part[y][z];
    }
  }
}

template <typename T>
void narrow(const float* from, int64_t n, int64_t d, T* to, int64_t stride) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t x = 0; x < d; x++) store(from[i * d + x], to + i * stride + x);
}

const Ints COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Row i of scores to weights e^(s - shift), 0 from column `seen` on up to `width`; their sum.
Floats weigh(float* s, int64_t seen, int64_t width, float shift) {
  Floats sum = {};
  int64_t j = 0;
  for (; j + LANES <= seen; j += LANES) {
    const Floats e = exponential(load(s + j) - shift);
    put(s + j, e);
    sum += e;
  }
  if (j < seen) {
    const Ints inside = COUNT < int32_t(seen - j);
    const Floats none = {};
    const Floats x = load(s + j) - shift;
    const Floats e = inside ? exponential(inside ? x : none) : none;
    put(s + j, e);
    sum += e;
    j += LANES;
  }
  std::fill(s + j, s + std::max(j, width), 0.0f);
  return sum;
}

float largest(const float* s, int64_t seen) {
  float most = -INFINITY;
  for (int64_t j = 0; j < seen; j++) most = s[j] > most ? s[j] : most;
  return most;
}

struct Heads {  // strides between tokens and between heads, in numbers
  int64_t token, head;
};

template <typename T>
void forward(const T* q, const T* k, const T* v, T* out, float* logs, int64_t tokens, const int64_t* ends, int64_t rows,
             int64_t heads, int64_t kv_heads, int64_t d, Heads of_q, Heads of_k, Heads of_v, float scale) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < rows * heads; task++) {
    const int64_t row = task / heads, head = task % heads, shared = head * kv_heads / heads;
    const int64_t begin = row ? ends[row - 1] : 0, n = ends[row] - begin;
    if (n <= 0) continue;
    const int64_t width = up(n, LANES);
    Taker part{scratch(d * width + n * d + TALL * (2 * d + width) + 5 * LANES)};
    float *kt = part.take(d * width), *vs = part.take(n * d), *qs = part.take(TALL * d), *s = part.take(TALL * width),
          *o = part.take(TALL * d);
    turn(k + begin * of_k.token + shared * of_k.head, of_k.token, n, width, d, kt);
    widen(v + begin * of_v.token + shared * of_v.head, of_v.token, n, n, d, 1.0f, vs);
    for (int64_t i = 0; i < n; i += TALL) {
      const int64_t count = std::min(TALL, n - i), seen = std::min(n, i + TALL), columns = up(seen, LANES);
      widen(q + (begin + i) * of_q.token + head * of_q.head, of_q.token, count, TALL, d, scale, qs);
      six_rows(qs, d, 1, kt, width, d, s, width, columns, false);
      float sums[TALL];
      for (int64_t r = 0; r < TALL; r++) {
        const int64_t here = std::min(i + r + 1, n);
        const float most = largest(s + r * width, here);
        sums[r] = total(weigh(s + r * width, here, columns, most));
        if (r < count) logs[head * tokens + begin + i + r] = most + std::log(sums[r]);
      }
      six_rows(s, width, 1, vs, d, seen, o, d, d, false);
      for (int64_t r = 0; r < count; r++) {
        const float share = 1.0f / sums[r];
        for (int64_t x = 0; x < d; x++) o[r * d + x] *= share;
      }
      narrow(o, count, d, out + ((begin + i) * heads + head) * d, heads * d);
    }
  }
}

// With P the weights, D the gradient of the result O: dV = P' D, dS = P (D V' - sum D O), dQ = dS K, dK = dS' Q, the last two scaled
// (Dao et al. 2022, algorithm 4). Queries that share keys are one thread's, as it adds up the gradients of those keys.
template <typename T>
void backward(const T* given, const T* q, const T* k, const T* v, const T* out, const float* logs, T* dq, T* dk, T* dv,
              int64_t tokens, const int64_t* ends, int64_t rows, int64_t heads, int64_t kv_heads, int64_t d, Heads of_given,
              Heads of_q, Heads of_k, Heads of_v, float scale) {
  const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < rows * kv_heads; task++) {
    const int64_t row = task / kv_heads, shared = task % kv_heads;
    const int64_t begin = row ? ends[row - 1] : 0, n = ends[row] - begin;
    if (n <= 0) continue;
    const int64_t width = up(n, LANES), tall = up(n, TALL);
    Taker part{scratch(2 * d * width + n * d + 2 * tall * d + 2 * BLOCK * (width + TALL) + 3 * BLOCK * d + 12 * LANES)};
    float *kt = part.take(d * width), *vt = part.take(d * width), *ks = part.take(n * d), *gk = part.take(tall * d),
          *gv = part.take(tall * d), *p = part.take(BLOCK * (width + TALL)), *ds = part.take(BLOCK * (width + TALL)),
          *qs = part.take(BLOCK * d), *gs = part.take(BLOCK * d), *gq = part.take(BLOCK * d);
    const T *this_k = k + begin * of_k.token + shared * of_k.head, *this_v = v + begin * of_v.token + shared * of_v.head;
    turn(this_k, of_k.token, n, width, d, kt);
    turn(this_v, of_v.token, n, width, d, vt);
    widen(this_k, of_k.token, n, n, d, 1.0f, ks);
    std::fill(gk, gk + tall * d, 0.0f);
    std::fill(gv, gv + tall * d, 0.0f);
    const int64_t ld = width + TALL;  // the last keys are read six at a time
    for (int64_t head = shared * group; head < (shared + 1) * group; head++) {
      for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t count = std::min(BLOCK, n - first), full = up(count, TALL), end = first + count;
        const int64_t at = (begin + first) * heads + head;
        widen(q + (begin + first) * of_q.token + head * of_q.head, of_q.token, count, full, d, scale, qs);
        widen(given + (begin + first) * of_given.token + head * of_given.head, of_given.token, count, full, d, 1.0f, gs);
        for (int64_t i = 0; i < full; i += TALL) {
          const int64_t seen = std::min(n, first + i + TALL), columns = up(seen, LANES);
          six_rows(qs + i * d, d, 1, kt, width, d, p + i * ld, ld, columns, false);
          six_rows(gs + i * d, d, 1, vt, width, d, ds + i * ld, ld, columns, false);
          for (int64_t r = i; r < i + TALL; r++) {
            float *weights = p + r * ld, *changes = ds + r * ld;
            if (r >= count) {
              std::fill(weights, weights + ld, 0.0f);
              std::fill(changes, changes + ld, 0.0f);
              continue;
            }
            weigh(weights, first + r + 1, ld, logs[head * tokens + begin + first + r]);
            Floats sum = {};
            for (int64_t x = 0; x < d; x += LANES) sum += load(gs + r * d + x) * load(out + at * d + r * heads * d + x);
            const float shift = total(sum);
            for (int64_t j = 0; j < columns; j += LANES) put(changes + j, load(weights + j) * (load(changes + j) - shift));
            std::fill(changes + columns, changes + ld, 0.0f);
          }
        }
        for (int64_t i = 0; i < full; i += TALL) {
          six_rows(ds + i * ld, ld, 1, ks, d, std::min(n, first + i + TALL), gq + i * d, d, d, false);
        }
        for (int64_t j = 0; j < end; j += TALL) {
          const int64_t from = std::max(int64_t(0), (j - first) / TALL * TALL);  // earlier queries do not see these keys
          six_rows(p + from * ld + j, 1, ld, gs + from * d, d, full - from, gv + j * d, d, d, true);
          six_rows(ds + from * ld + j, 1, ld, qs + from * d, d, full - from, gk + j * d, d, d, true);
        }
        for (int64_t x = 0; x < count * d; x++) gq[x] *= scale;
        narrow(gq, count, d, dq + at * d, heads * d);
      }
    }
    narrow(gk, n, d, dk + (begin * kv_heads + shared) * d, kv_heads * d);
    narrow(gv, n, d, dv + (begin * kv_heads + shared) * d, kv_heads * d);
  }
}

constexpr int64_t NEXT = 8;  // tokens of keys that are fetched ahead

template <typename T>
void fetch(const T* from, int64_t d) {
  for (int64_t x = 0; x < d; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + x);
}

template <typename T>
float dot(const float* a, const T* b, int64_t d) {
  Floats sum = {};
  for (int64_t x = 0; x < d; x += LANES) sum += load(a + x) * load(b + x);
  return total(sum);
}

template <typename T>
void token(const T* q, const T* k, const T* v, T* out, const uint8_t* mask, int64_t mask_stride, int64_t rows, int64_t heads,
           int64_t kv_heads, int64_t columns, int64_t d, int64_t row_stride, Heads of_k, float scale) {
  const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < rows * kv_heads; task++) {
    const int64_t row = task / kv_heads, shared = task % kv_heads;
    const uint8_t* seen = mask ? mask + row * mask_stride : nullptr;
    int64_t low = 0;
    while (seen && low < columns && !seen[low]) low++;
    Taker part{scratch(columns + 2 * d + 4 * LANES)};
    float *s = part.take(columns + LANES), *qs = part.take(d), *o = part.take(d);
    const T *keys = k + row * row_stride + shared * of_k.head, *values = v + row * row_stride + shared * of_k.head;
    for (int64_t head = shared * group; head < (shared + 1) * group; head++) {
      widen(q + (row * heads + head) * d, d, 1, 1, d, scale, qs);
      for (int64_t j = low; j < columns; j++) {
        if (head == shared * group) {
          fetch(keys + (j + NEXT) * of_k.token, d);
          fetch(values + j * of_k.token, d);
        }
        s[j] = dot(qs, keys + j * of_k.token, d);
      }
      for (int64_t j = low; seen && j < columns; j++) s[j] = seen[j] ? s[j] : -INFINITY;
      const float sum = total(weigh(s + low, columns - low, 0, largest(s + low, columns - low)));
      std::fill(o, o + d, 0.0f);
      for (int64_t x = 0; x < d; x += LANES * WIDE) {
        const int64_t parts = std::min(WIDE, (d - x) / LANES);
        Floats sums[WIDE] = {};
        for (int64_t j = low; j < columns; j++)
          for (int64_t y = 0; y < parts; y++) sums[y] += s[j] * load(values + j * of_k.token + x + y * LANES);
        for (int64_t y = 0; y < parts; y++) put(o + x + y * LANES, sums[y] / sum);
      }
      narrow(o, 1, d, out + (row * heads + head) * d, d);
    }
  }
}

constexpr int64_t TOGETHER = 128;  // numbers of a row whose weights are summed up together

// Of each row of logits: the largest over the temperature, the weights e^(x - largest), their sums by blocks, and the sum of
// weight times x - largest.
template <typename T>
void weights(const T* logits, int64_t stride, float* made, double* sums, float* largest_of, double* products, int64_t rows,
             int64_t size, int64_t blocks, float temperature) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = logits + row * stride;
    float* to = made + row * blocks * TOGETHER;
    const int64_t whole = size / LANES * LANES;
    float rest[LANES];
    std::fill(rest, rest + LANES, -INFINITY);
    for (int64_t j = whole; j < size; j++) rest[j - whole] = widened(from[j]);
    Floats most = load(rest);
    for (int64_t j = 0; j < whole; j += LANES) {
      const Floats x = load(from + j);
      most = x > most ? x : most;
    }
    float each[LANES];
    put(each, most / temperature);
    const float shift = largest(each, LANES);
    double product = 0;
    for (int64_t block = 0; block < blocks; block++) {
      Floats sum = {}, weighed = {};
      for (int64_t j = block * TOGETHER; j < (block + 1) * TOGETHER; j += LANES) {
        Floats weight = {};
        if (j < size) {
          const Floats below = (j < whole ? load(from + j) : load(rest)) / temperature - shift;
          weight = exponential(below);
          const Floats none = {};
          weighed += weight == none ? none : weight * below;
        }
        put(to + j, weight);
        sum += weight;
      }
      sums[row * blocks + block] = total(sum);
      product += total(weighed);
    }
    largest_of[row] = shift;
    products[row] = product;
  }
}

constexpr int64_t AHEAD = 16384;  // bytes of weights that are fetched ahead

// The product of M rows with one panel of 16 outputs, laid out `[inner][16]`.
template <int M>
void panel(const float* x, const float* weights, const float* bias, float* to, int64_t inner, int64_t stride) {
  Floats sum[M] = {};
  for (int64_t k = 0; k < inner; k++) {
    const Floats w = load(weights + k * LANES);
    __builtin_prefetch(reinterpret_cast<const char*>(weights + k * LANES) + AHEAD);
    for (int m = 0; m < M; m++) sum[m] += x[m * inner + k] * w;
  }
  for (int m = 0; m < M; m++) put(to + m * stride, sum[m] + load(bias));
}

// The same for pairs of bf16 numbers, `[inner / 2][16][2]`.
template <int M>
void panel(const Bf16* x, const Bf16* weights, const Bf16* bias, Bf16* to, int64_t inner, int64_t stride) {
#ifdef __AVX512BF16__
  Floats sum[M] = {};
  for (int64_t k = 0; k < inner; k += 2) {
    const __m512bh w = (__m512bh)_mm512_loadu_si512(weights + k * LANES);
    __builtin_prefetch(reinterpret_cast<const char*>(weights + k * LANES) + AHEAD);
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * inner + k, 4);
      sum[m] = (Floats)_mm512_dpbf16_ps((__m512)sum[m], (__m512bh)_mm512_set1_epi32(pair), w);
    }
  }
  for (int m = 0; m < M; m++) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(sum[m] + load(bias)));
    std::memcpy(to + m * stride, &rounded, 32);
  }
#else
  __builtin_trap();  // has_bfloat16 said so
#endif
}

template <typename T, size_t... M>
void rows_of_panel(int64_t rows, std::index_sequence<M...>, const T* x, const T* weights, const T* bias, T* to, int64_t inner,
                   int64_t stride) {
  typedef void (*Panel)(const T*, const T*, const T*, T*, int64_t, int64_t);
  static constexpr Panel each[] = {&panel<M + 1>...};
  each[rows - 1](x, weights, bias, to, inner, stride);
}

template <typename T>
void few_rows(const T* x, const T* weights, const T* bias, T* to, int64_t rows, int64_t inner, int64_t outputs) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < up(outputs, LANES) / LANES; p++) {
    const int64_t count = std::min(LANES, outputs - p * LANES);
    T added[LANES] = {}, kept[LANES * LANES];
    if (bias) std::copy(bias + p * LANES, bias + p * LANES + count, added);
    for (int64_t m = 0; m < rows; m += LANES) {
      const int64_t part = std::min(LANES, rows - m);
      T* at = to + m * outputs + p * LANES;
      rows_of_panel(part, std::make_index_sequence<LANES>(), x + m * inner, weights + p * inner * LANES, added,
                    count == LANES ? at : kept, inner, count == LANES ? outputs : LANES);
      for (int64_t i = 0; count < LANES && i < part; i++)
        std::copy(kept + i * LANES, kept + i * LANES + count, at + i * outputs);
    }
  }
}

}  // namespace

// Weights `[outputs][words]` as panels `[words][16]`, the last filled up with zeros; a word is an fp32 number or two bf16 ones.
extern "C" void pack(const uint32_t* from, uint32_t* to, int64_t outputs, int64_t words) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < up(outputs, LANES) / LANES; p++) {
    for (int64_t w = 0; w < words; w++)
      for (int64_t i = 0; i < LANES; i++)
        to[(p * words + w) * LANES + i] = p * LANES + i < outputs ? from[(p * LANES + i) * words + w] : 0;
  }
}

// Whether vectors are as wide as these kernels were written and measured for, and whether products of bf16 are there.
extern "C" int has_float32() {
#ifdef __AVX512F__
  return 1;
#else
  return 0;
#endif
}
extern "C" int has_bfloat16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

#define WEIGHTS(NAME, T)                                                                                                     \
  extern "C" void weights_##NAME(const T* logits, int64_t stride, float* made, double* sums, float* largest, double* products, \
                                 int64_t rows, int64_t size, int64_t blocks, float temperature) {                            \
    weights(logits, stride, made, sums, largest, products, rows, size, blocks, temperature);                                 \
  }

WEIGHTS(float32, float)
WEIGHTS(bfloat16, Bf16)

#define FEW_ROWS(NAME, T)                                                                                                    \
  extern "C" void few_rows_##NAME(const T* x, const T* weights, const T* bias, T* to, int64_t rows, int64_t inner,           \
                                  int64_t outputs) {                                                                         \
    few_rows(x, weights, bias, to, rows, inner, outputs);                                                                    \
  }

FEW_ROWS(float32, float)
FEW_ROWS(bfloat16, Bf16)

#define ROWS(NAME, T)                                                                                                        \
  extern "C" void rows_forward_##NAME(const T* q, const T* k, const T* v, T* out, float* logs, int64_t tokens,               \
                                      const int64_t* ends, int64_t rows, int64_t heads, int64_t kv_heads, int64_t d,         \
                                      const int64_t* strides, float scale) {                                                 \
    forward(q, k, v, out, logs, tokens, ends, rows, heads, kv_heads, d, {strides[0], strides[1]}, {strides[2], strides[3]},  \
            {strides[4], strides[5]}, scale);                                                                                \
  }                                                                                                                          \
  extern "C" void rows_backward_##NAME(const T* given, const T* q, const T* k, const T* v, const T* out, const float* logs,  \
                                       T* dq, T* dk, T* dv, int64_t tokens, const int64_t* ends, int64_t rows,               \
                                       int64_t heads, int64_t kv_heads, int64_t d, const int64_t* strides, float scale) {    \
    backward(given, q, k, v, out, logs, dq, dk, dv, tokens, ends, rows, heads, kv_heads, d, {strides[6], strides[7]},        \
             {strides[0], strides[1]}, {strides[2], strides[3]}, {strides[4], strides[5]}, scale);                           \
  }                                                                                                                          \
  extern "C" void token_##NAME(const T* q, const T* k, const T* v, T* out, const uint8_t* mask, int64_t mask_stride,         \
                               int64_t rows, int64_t heads, int64_t kv_heads, int64_t columns, int64_t d,                    \
                               const int64_t* strides, float scale) {                                                        \
    token(q, k, v, out, mask, mask_stride, rows, heads, kv_heads, columns, d, strides[0], {strides[1], strides[2]}, scale);  \
  }

ROWS(float32, float)
ROWS(bfloat16, Bf16)

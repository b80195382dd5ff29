/* Rows of few tokens on a CPU: quantizers with what stands before them, products of codes, attention over a cache.

   Plain C, no headers of torch: built once a machine (build.py), called through ctypes. Numbers are float32 or bfloat16
   (`bf16` = 1) in memory and float32 in here; every rounding step is that of mxfx/formats, to the bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

typedef union { float f; int32_t i; uint32_t u; } word;
typedef union { double f; int64_t i; } wide;

/* A format with blocks and E8M0 scales: mxfx.formats.Format. */
typedef struct {
  int32_t is_float, block, rule, emax, mantissa, emin, exact; /* exact: errors of `mse` are sums of int32 */
  float largest, least, fraction;                             /* fraction: frexp(largest)[0] */
  double unit;                                                /* of a squared error under `mse`, inverted */
} format;

enum { FLOOR, RCEIL, EVEN, CEIL, MSE };
enum { LOWEST = -127, HIGHEST = 127, BROKEN = 128 };

static inline float from_bf16(uint16_t h) { word w = {.u = (uint32_t)h << 16}; return w.f; }
static inline uint16_t to_bf16(float f) {
  word w = {.f = f};
  if (f != f) return 0x7fc0;
  return (uint16_t)((w.u + 0x7fff + ((w.u >> 16) & 1)) >> 16);
}
static inline float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

static void load(const void *from, float *to, long n, int bf16) {
  if (!bf16) { memcpy(to, from, n * sizeof(float)); return; }
  const uint16_t *h = from;
  for (long i = 0; i < n; i++) to[i] = from_bf16(h[i]);
}
static void save(const float *from, void *to, long n, int bf16) {
  if (!bf16) { memcpy(to, from, n * sizeof(float)); return; }
  uint16_t *h = to;
  for (long i = 0; i < n; i++) h[i] = to_bf16(from[i]);
}
static void narrow(float *x, long n, int bf16) {
  if (bf16) for (long i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i]));
}

/* 2^e; 2^-127 is subnormal, 2^128 NaN: power_of_two of mxfx/formats/e8m0.py. */
static inline float power(int e) {
  uint32_t code = (uint32_t)(e + 127);
  word w = {.u = code << 23 | (uint32_t)(code == 0 || code == 255) << 22};
  return w.f;
}
static inline float inverse(int e) { return power(-e < LOWEST ? LOWEST : -e); }

/* x = fraction · 2^exponent, fraction in [0.5, 1), of a finite x > 0. */
static inline int split(float x, float *fraction) {
  word w = {.f = x};
  int shift = 0;
  if (w.u < 0x00800000) { w.f *= 16777216.0f; shift = 24; }
  int exponent = (int)(w.u >> 23) - 126 - shift;
  w.u = (w.u & 0x007fffff) | 0x3f000000;
  *fraction = w.f;
  return exponent;
}

static inline int exponent_of(const float *x, long n, const format *f) {
  int32_t most = 0;
  for (long i = 0; i < n; i++) {
    word w = {.f = x[i]};
    int32_t magnitude = w.i & 0x7fffffff; /* NaN is above Inf is above every number */
    most = magnitude > most ? magnitude : most;
  }
  if (most >= 0x7f800000) return BROKEN;
  if (most == 0) return LOWEST;
  word w = {.i = most};
  float fraction;
  int e = split(w.f, &fraction) - 1 - f->emax;
  switch (f->rule) {
    case RCEIL: case MSE: e += fraction > f->fraction; break;
    case EVEN: e += fraction >= 1.0f - ldexpf(1.0f, -(f->mantissa + 2)); break;
    case CEIL: e += (fraction > 0.5f) - !f->is_float; break;
  }
  return e < LOWEST ? LOWEST : e > HIGHEST ? HIGHEST : e;
}

static inline float element(float y, const format *f) {
  y = clip(y, f->least, f->largest);
  if (!f->is_float) return (y + 12582912.0f) - 12582912.0f;
  word binade = {.f = y};
  binade.u &= 0x7f800000;
  float low = power(f->emin), size = binade.f < low ? low : binade.f;
  float magic = size * (1.5f * power(23 - f->mantissa));
  return copysignf((y + magic) - magic, y);
}

/* A block onto the grid, in place: E8M0.round of mxfx/formats/e8m0.py. `limit`: largest number of the dtype. */
static inline __attribute__((always_inline)) void round_block(float *x, long n, const format *f, float limit) {
  int e = exponent_of(x, n, f);
  float step = power(e), inv = inverse(e);
  int lower_wins = 0;
  if (f->rule == MSE && e != BROKEN && e > LOWEST) {
    if (f->exact) {
      int32_t sum = 0;
      float unit = (float)f->unit;
      for (long i = 0; i < n; i++) {
        float s = x[i] * inv, u = element(s, f), l = element(s * 2, f) * 0.5f;
        sum += (int32_t)((u - l) * (s * 2 - (u + l)) * unit);
      }
      lower_wins = sum < 0;
    } else {
      int64_t sum = 0;
      for (long i = 0; i < n; i++) {
        float s = x[i] * inv, u = element(s, f), l = element(s * 2, f) * 0.5f;
        sum += (int64_t)((double)(u - l) * (double)((s - l) + (s - u)) * f->unit);
      }
      lower_wins = sum < 0;
    }
  }
  if (lower_wins)
    for (long i = 0; i < n; i++) x[i] = clip(element(x[i] * inv * 2, f) * 0.5f * step, -limit, limit);
  else
    for (long i = 0; i < n; i++) x[i] = clip(element(x[i] * inv, f) * step, -limit, limit);
}

/* Inlined with a constant length and kind of element, and a format that no store may change, loops become vectors. */
static inline __attribute__((always_inline)) void round_blocks(float *x, long n, long block, int is_float,
                                                               const format *given, float limit) {
  format f = *given;
  f.is_float = is_float;
  long i = 0;
  for (; i + block <= n; i += block) round_block(x + i, block, &f, limit);
  if (i < n) round_block(x + i, n - i, &f, limit);
}

static void round_row(float *x, long n, const format *f, int bf16) {
  float limit = bf16 ? 3.38953139e38f : 3.40282347e38f;
  if (f->block == 32 && !f->is_float) round_blocks(x, n, 32, 0, f, limit);
  else if (f->block == 32) round_blocks(x, n, 32, 1, f, limit);
  else round_blocks(x, n, f->block, f->is_float, f, limit);
}

/* Each block of b times its matrix, into `to`. */
static inline void transform_blocks(const float *x, float *to, long n, long b, const void *matrix, int bf16, long stride) {
  for (long at = 0, m = 0; at < n; at += b, m += stride) {
    float sums[b]; /* of a constant b: registers */
    memset(sums, 0, b * sizeof(float));
    for (long i = 0; i < b; i++) {
      float v = x[at + i];
      const uint16_t *half = (const uint16_t *)matrix + m + i * b;
      const float *full = (const float *)matrix + m + i * b;
      for (long j = 0; j < b; j++) sums[j] += v * (bf16 ? from_bf16(half[j]) : full[j]);
    }
    memcpy(to + at, sums, b * sizeof(float));
  }
}

static void transform_row(const float *x, float *to, long n, long b, const void *matrix, int bf16, long stride) {
  if (b == 32 && bf16) transform_blocks(x, to, n, 32, matrix, 1, stride);
  else if (b == 32) transform_blocks(x, to, n, 32, matrix, 0, stride);
  else transform_blocks(x, to, n, b, matrix, bf16, stride);
}

/* e^x within two units of the last place, 0 below the normal numbers: a loop of it fills vectors, one of expf does not. */
static inline float power_e(float x) {
  x = clip(x, -87.0f, 88.5f);
  float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  word w = {.i = ((int32_t)k + 127) << 23};
  return (p * r * r + r + 1.0f) * w.f;
}

/* What stands before a quantizer, in one row; NULL and 0 for what does not. */
typedef struct {
  const void *gain, *up, *cos, *sin, *matrix;
  float eps, offset;
  int32_t norm, gain_first, gain_bf16, matrix_bf16;
  int64_t order, blocks, heads, group; /* matrices (heads, blocks, order, order); blocks = 0: one for all */
  int64_t turns;                       /* rows of x that share a row of cos and sin */
  int64_t angles;                      /* rows of cos and sin */
} before;

static void norm_row(float *x, long n, const before *p, int bf16) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < n; i++) sum += (double)x[i] * x[i];
  float factor = 1.0f / sqrtf((float)(sum / n) + p->eps);
  for (long i = 0; i < n; i++) x[i] *= factor;
  if (p->gain == NULL) { narrow(x, n, bf16); return; }
  if (!p->gain_first) narrow(x, n, bf16);
  for (long i = 0; i < n; i++) {
    float g = p->gain_bf16 ? from_bf16(((const uint16_t *)p->gain)[i]) : ((const float *)p->gain)[i];
    x[i] *= p->gain_first && p->offset != 0 ? p->offset + g : g;
  }
  narrow(x, n, bf16);
}

static void silu_row(float *x, long n, const void *up, int bf16) {
  for (long i = 0; i < n; i++) x[i] = x[i] / (1.0f + power_e(-x[i]));
  narrow(x, n, bf16);
  if (bf16) for (long i = 0; i < n; i++) x[i] *= from_bf16(((const uint16_t *)up)[i]);
  else for (long i = 0; i < n; i++) x[i] *= ((const float *)up)[i];
  narrow(x, n, bf16);
}

static void turn_row(const float *x, float *to, long n, const before *p, long row, int bf16) {
  long half = n / 2, at = row / p->turns % p->angles * n;
  for (long i = 0; i < n; i++) {
    float c, s, other = i < half ? -x[i + half] : x[i - half];
    if (bf16) {
      c = from_bf16(((const uint16_t *)p->cos)[at + i]), s = from_bf16(((const uint16_t *)p->sin)[at + i]);
      to[i] = from_bf16(to_bf16(x[i] * c)) + from_bf16(to_bf16(other * s));
    } else {
      c = ((const float *)p->cos)[at + i], s = ((const float *)p->sin)[at + i];
      to[i] = x[i] * c + other * s;
    }
  }
  narrow(to, n, bf16);
}

/* rows × n numbers: rope, norm or silu·up, then a transform, then a format; each if it is given. 0 if it went well. */
int mxfx_rows(const void *x, void *y, long rows, long n, int bf16, const before *p, const format *f, int threads) {
  long size = bf16 ? 2 : 4;
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long row = 0; row < rows; row++) {
    float *a = malloc(2 * n * sizeof(float)), *b = a + n;
    if (a == NULL) { failed = 1; continue; }
    float *now = a;
    load((const char *)x + row * n * size, a, n, bf16);
    if (p != NULL) {
      if (p->cos != NULL) { turn_row(a, b, n, p, row, bf16); now = b; }
      if (p->norm) norm_row(now, n, p, bf16);
      if (p->up != NULL) silu_row(now, n, (const char *)p->up + row * n * size, bf16);
      if (p->matrix != NULL) {
        float *next = now == a ? b : a;
        long square = p->order * p->order, head = row / p->group % p->heads;
        const char *matrix = (const char *)p->matrix + head * p->blocks * square * (p->matrix_bf16 ? 2 : 4);
        transform_row(now, next, n, p->order, matrix, p->matrix_bf16, p->blocks ? square : 0);
        narrow(next, n, bf16);
        now = next;
      }
    }
    if (f != NULL) round_row(now, n, f, bf16);
    save(now, (char *)y + row * n * size, n, bf16);
    free(a);
  }
  return failed;
}

/* Codes and scales of a row that lies on the grid: store_on_grid of mxfx/formats/stored.py, of 4 or 8 bits. */
static void store_row(const float *x, uint8_t *codes, uint8_t *scales, long n, const format *f, int bits, int ebits) {
  float least = f->least, largest = f->largest;
  int bias = f->is_float ? (1 << (ebits - 1)) - 1 : 0;
  if (bits == 4) memset(codes, 0, (n + 1) / 2);
  for (long at = 0; at < n; at += f->block) {
    long stop = n - at < f->block ? n : at + f->block;
    float high = 0, low = 0;
    int finite = 1, e = LOWEST;
    for (long i = at; i < stop; i++) {
      high = x[i] > high ? x[i] : high, low = x[i] < low ? x[i] : low;
      finite &= isfinite(x[i]) != 0;
    }
    float a = high / largest, b = low / least, need = a > b ? a : b, fraction;
    if (!finite) e = BROKEN;
    else if (need > 0) {
      e = split(need, &fraction);
      e -= fraction == 0.5f;
      e = e < LOWEST ? LOWEST : e > HIGHEST ? HIGHEST : e;
      if (high > largest * power(e) || low < least * power(e)) e = e + 1 > HIGHEST ? HIGHEST : e + 1;
    }
    scales[at / f->block] = (uint8_t)(e + 127);
    float inv = inverse(e);
    for (long i = at; i < stop; i++) {
      float v = e == BROKEN ? 0.0f : element(x[i] * inv, f);
      uint32_t code;
      if (f->is_float) {
        word w = {.f = fabsf(v) * power(bias - 127)};
        code = w.u >> (23 - f->mantissa) | (uint32_t)(signbit(v) != 0) << (bits - 1);
      } else code = (uint32_t)(int32_t)v;
      if (bits == 4) codes[i / 2] |= (code & 15) << (i % 2 * 4);
      else codes[i] = (uint8_t)code;
    }
  }
}

/* A row of codes as numbers; table: (256, 8 / bits), the elements behind each byte. */
static inline void restore_row(const uint8_t *codes, const uint8_t *scales, float *to, long n, long block, int bits,
                               const float *table) {
  if (bits == 4) {
    for (long i = 0; i < n / 2; i++) memcpy(to + 2 * i, table + 2 * codes[i], 2 * sizeof(float));
    if (n % 2) to[n - 1] = table[2 * codes[n / 2]];
  } else
    for (long i = 0; i < n; i++) to[i] = table[codes[i]];
  for (long at = 0; at < n; at += block) {
    float scale = power((int)scales[at / block] - 127);
    long stop = n - at < block ? n : at + block;
    for (long i = at; i < stop; i++) to[i] *= scale;
  }
}

int mxfx_restore(const uint8_t *codes, const uint8_t *scales, void *y, long rows, long n, long block, int bits,
                 const float *table, int bf16, int threads) {
  long bytes = (n * bits + 7) / 8, count = (n + block - 1) / block;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *row = malloc(n * sizeof(float));
    if (row == NULL) failed = 1;
    else {
#pragma omp for
      for (long r = 0; r < rows; r++) {
        float *to = bf16 ? row : (float *)y + r * n;
        restore_row(codes + r * bytes, scales + r * count, to, n, block, bits, table);
        if (bf16) save(row, (uint16_t *)y + r * n, n, 1);
      }
      free(row);
    }
  }
  return failed;
}

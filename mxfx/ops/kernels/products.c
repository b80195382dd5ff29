/* Behind rows.c, in one unit with it: few rows times a packed weight or a plain one, and the attention of one token over a cache. */

/* A row that lies on the grid of some integers: int8 codes, even ones and odd ones apart as the nibbles of a weight are,
   and an exponent a block. 1 if it does not. `start`: what the products of `bias` take away, four codes a lane. */
static int encode_row(const float *x, long n, long block, int bias, int8_t *even, int8_t *odd, int32_t *start,
                      int32_t *exponents) {
  for (long at = 0; at < n; at += block) {
    long stop = n - at < block ? n : at + block;
    float most = 0;
    int broken = 0;
    for (long i = at; i < stop; i++) {
      float m = fabsf(x[i]);
      broken |= !(m <= 3.40282347e38f);
      most = m > most ? m : most;
    }
    if (broken || (most > 0 && most < 1e-30f)) return 1;
    float fraction;
    int e = most > 0 ? split(most, &fraction) - 7 : 0, tries = 0, wrong;
    do {
      float inv = inverse(e);
      wrong = 0;
      for (long i = at; i < stop; i++) {
        float v = x[i] * inv, r = (v + 12582912.0f) - 12582912.0f;
        wrong |= (r != v) | (r > 127.0f) | (r < -128.0f);
        int8_t code = (int8_t)(int32_t)clip(r, -128.0f, 127.0f);
        if (i % 2) odd[i / 2] = code;
        else even[i / 2] = code;
      }
      if (wrong) e--; /* -128 alone may stand above a block of 8 bits */
    } while (wrong && tries++ == 0);
    if (wrong) return 1;
    exponents[at / block] = e;
  }
  for (long lane = 0; lane < (n / 2 + 3) / 4; lane++) {
    int32_t sum = 0;
    for (long i = lane * 4; i < lane * 4 + 4 && i < n / 2; i++) sum += even[i] + odd[i];
    start[lane] = -bias * sum;
  }
  return 0;
}

typedef struct { const int8_t *even, *odd; const int32_t *start, *exponents; } encoded;

/* The product of two rows of codes, summed in float64: exact while the exponents of a row span some 36 octaves. */
static double product(const uint8_t *codes, const uint8_t *scales, encoded x, long n, long block, const int8_t *table,
                      int unit) {
  long count = (n + block - 1) / block;
  double sum = 0;
  for (long j = 0; j < count; j++) {
    if (scales[j] == 255) return NAN;
    long start = j * block / 2, stop = start + block / 2 < n / 2 ? start + block / 2 : n / 2;
    int32_t dot = 0;
    for (long i = start; i < stop; i++)
      dot += (int32_t)table[codes[i] & 15] * x.even[i] + (int32_t)table[codes[i] >> 4] * x.odd[i];
    wide power = {.i = (int64_t)(scales[j] + x.exponents[j] + unit - 127 + 1023) << 52};
    sum += dot * power.f;
  }
  return sum;
}

#ifdef __AVX512VNNI__
/* Four rows of a weight in blocks of 32 at once: 64 bytes are four blocks, a lane of 32 bits is a quarter of one. */
static void four_products(const uint8_t *codes, const uint8_t *scales, long rows, encoded x, long n, __m512i values,
                          int unit, double *sums) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i first = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), last = _mm512_setr_epi64(2, 2, 2, 2, 3, 3, 3, 3);
  long count = (n + 31) / 32, bytes = n / 2;
  __m512d low[4], high[4];
  __mmask8 broken[4] = {0, 0, 0, 0};
  for (int r = 0; r < 4; r++) low[r] = high[r] = _mm512_setzero_pd();
  for (long from = 0; from < count; from += 4) {
    long left = bytes - from * 16;
    __mmask64 held = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
    __mmask8 blocks = count - from >= 4 ? 15 : (1 << (count - from)) - 1;
    __m512i even = _mm512_loadu_si512(x.even + from * 16), odd = _mm512_loadu_si512(x.odd + from * 16);
    __m512i start = _mm512_loadu_si512(x.start + from * 4);
    __m128i exponent = _mm_loadu_si128((const __m128i *)(x.exponents + from));
    exponent = _mm_add_epi32(exponent, _mm_set1_epi32(unit - 127 + 1023));
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      long row = r < rows ? r : 0;
      __m512i c = _mm512_maskz_loadu_epi8(held, codes + row * bytes + from * 16);
      __m512i l = _mm512_shuffle_epi8(values, _mm512_and_si512(c, nibble));
      __m512i h = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble));
      __m512i dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, l, even), h, odd);
      __m128i e = _mm_cvtepu8_epi32(_mm_maskz_loadu_epi8(blocks, scales + row * count + from));
      broken[r] |= _mm_cmpeq_epi32_mask(e, _mm_set1_epi32(255));
      __m512i powers = _mm512_castsi256_si512(_mm256_cvtepi32_epi64(_mm_add_epi32(e, exponent)));
      powers = _mm512_slli_epi64(powers, 52);
      __m512d one = _mm512_castsi512_pd(_mm512_permutexvar_epi64(first, powers));
      __m512d two = _mm512_castsi512_pd(_mm512_permutexvar_epi64(last, powers));
      low[r] = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(dots)), one, low[r]);
      high[r] = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(dots, 1)), two, high[r]);
    }
  }
  for (int r = 0; r < 4; r++) sums[r] = broken[r] ? NAN : _mm512_reduce_add_pd(_mm512_add_pd(low[r], high[r]));
}
#endif

/* y (rows, outs) = x (rows, n) times a weight (outs, n) of 4-bit codes, plus bias. table: the 16 elements in units of
   2^unit. 1 if x does not lie on a grid of int8, 2 without memory: y is not written then. */
int mxfx_product(const void *x, const uint8_t *codes, const uint8_t *scales, const void *bias, void *y, long rows, long n,
                 long outs, long block, const int8_t *table, int most, int unit, int bf16, int threads) {
  long count = (n + block - 1) / block, half = (n / 2 + 127) / 64 * 64, size = bf16 ? 2 : 4;
  long each = 2 * half + half + (count + 4) * 4 + 64;
  char *space = calloc(rows, each);
  float *wide_row = malloc(n * sizeof(float));
  encoded *found = malloc(rows * sizeof(encoded));
  int failed = space == NULL || wide_row == NULL || found == NULL ? 2 : 0;
  for (long r = 0; r < rows && !failed; r++) {
    char *own = space + r * each;
    load((const char *)x + r * n * size, wide_row, n, bf16);
    int8_t *even = (int8_t *)own, *odd = even + half;
    int32_t *start = (int32_t *)(odd + half), *exponents = start + half / 4;
    found[r] = (encoded){even, odd, start, exponents};
    failed = encode_row(wide_row, n, block, most, even, odd, start, exponents);
  }
  if (!failed) {
#ifdef __AVX512VNNI__
    int8_t biased[16];
    for (int i = 0; i < 16; i++) biased[i] = (int8_t)(table[i] + most);
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)biased));
#endif
#pragma omp parallel for num_threads(threads) if (threads > 1 && outs * n > 65536) schedule(static)
    for (long o = 0; o < outs; o += 4)
      for (long r = 0; r < rows; r++) {
        const uint8_t *own = codes + o * (n / 2), *powers = scales + o * count;
        long here = outs - o < 4 ? outs - o : 4;
        double sums[4];
#ifdef __AVX512VNNI__
        if (block == 32) four_products(own, powers, here, found[r], n, values, unit, sums);
        else
#endif
          for (long i = 0; i < here; i++)
            sums[i] = product(own + i * (n / 2), powers + i * count, found[r], n, block, table, unit);
        for (long i = 0; i < here; i++) {
          float v = (float)sums[i];
          if (bias != NULL) v += bf16 ? from_bf16(((const uint16_t *)bias)[o + i]) : ((const float *)bias)[o + i];
          if (bf16) ((uint16_t *)y)[r * outs + o + i] = to_bf16(v);
          else ((float *)y)[r * outs + o + i] = v;
        }
      }
  }
  free(space), free(wide_row), free(found);
  return failed;
}

#ifdef __AVX512BF16__
/* A row of a plain weight times up to eight rows: of a constant number of them, so that sums stay in registers. */
static inline __attribute__((always_inline)) void plain_products(const uint16_t *w, const uint16_t *x, long n, int rows,
                                                                 float *sums) {
  __m512 dots[8];
  for (int r = 0; r < rows; r++) dots[r] = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 32) {
    __mmask32 held = n - i >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (n - i)) - 1;
    __m512bh own = (__m512bh)_mm512_maskz_loadu_epi16(held, w + i);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
      dots[r] = _mm512_dpbf16_ps(dots[r], own, (__m512bh)_mm512_maskz_loadu_epi16(held, x + r * n + i));
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) sums[r] = _mm512_reduce_add_ps(dots[r]);
}
#endif

/* y (rows, outs) = x (rows, n) times a weight (outs, n) plus bias, all bfloat16, sums in float32: a few rows wait for the
   weight, which a library lays out anew in every call. 1 on a CPU without products of bfloat16. */
int mxfx_linear(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, long rows, long n, long outs,
                int threads) {
#ifdef __AVX512BF16__
#pragma omp parallel for num_threads(threads) if (threads > 1 && outs * n > 65536) schedule(static)
  for (long o = 0; o < outs; o++) { /* one after the other, as the memory's prefetcher expects */
    float sums[8], own = bias == NULL ? 0 : from_bf16(bias[o]);
    for (long r = 0, taken; r < rows; r += taken) {
      const uint16_t *weight = w + o * n, *given = x + r * n;
      taken = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : 1;
      if (taken == 8) plain_products(weight, given, n, 8, sums);
      else if (taken == 4) plain_products(weight, given, n, 4, sums);
      else plain_products(weight, given, n, 1, sums);
      for (long j = 0; j < taken; j++) y[(r + j) * outs + o] = to_bf16(sums[j] + own);
    }
  }
  return 0;
#else
  return 1;
#endif
}

/* One tensor of a cache: strides in bytes; bits = 0 for plain numbers. */
typedef struct {
  void *codes, *scales;
  int64_t batch, head, row, scales_batch, scales_head, scales_row, width;
  const float *table;
  const format *rule;
  int32_t bits, ebits;
} cache;

static inline const float *cached_row(const cache *c, long b, long h, long t, float *room, int bf16) {
  const char *row = (const char *)c->codes + b * c->batch + h * c->head + t * c->row;
  if (c->bits) {
    const uint8_t *scales = (const uint8_t *)c->scales + b * c->scales_batch + h * c->scales_head + t * c->scales_row;
    restore_row((const uint8_t *)row, scales, room, c->width, c->rule->block, c->bits, c->table);
    narrow(room, c->width, bf16);
    return room;
  }
  if (!bf16) return (const float *)row;
  load(row, room, c->width, 1);
  return room;
}

static void write_row(const cache *c, long b, long h, long t, const void *x, float *room, int bf16) {
  char *row = (char *)c->codes + b * c->batch + h * c->head + t * c->row;
  if (!c->bits) { memcpy(row, x, c->width * (bf16 ? 2 : 4)); return; }
  load(x, room, c->width, bf16);
  uint8_t *scales = (uint8_t *)c->scales + b * c->scales_batch + h * c->scales_head + t * c->scales_row;
  store_row(room, (uint8_t *)row, scales, c->width, c->rule, c->bits, c->ebits);
}

/* One token a text: k and v to their place, then q over all places. `allowed`: bytes (batch | 1, places) or NULL. */
int mxfx_attend(const void *q, const void *k, const void *v, void *y, const int64_t *slot, const uint8_t *allowed,
                int64_t allowed_batch, const cache *keys, const cache *values, const void *sinks, long batch, long heads,
                long kv_heads, long places, float scale, float softcap, int writes, int bf16, int threads) {
  long group = heads / kv_heads, d = keys->width, dv = values->width, size = bf16 ? 2 : 4, place = *slot % places;
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch * kv_heads * places > 1024)
  for (long at = 0; at < batch * kv_heads; at++) {
    long b = at / kv_heads, h = at % kv_heads;
    float *space = malloc((d + dv + group * (places + d + dv)) * sizeof(float));
    if (space == NULL) { failed = 1; continue; }
    float *room = space, *queries = room + d + dv, *scores = queries + group * d, *sums = scores + group * places;
    if (writes) {
      write_row(keys, b, h, place, (const char *)k + at * d * size, room, bf16);
      write_row(values, b, h, place, (const char *)v + at * dv * size, room, bf16);
    }
    load((const char *)q + at * group * d * size, queries, group * d, bf16);
    const uint8_t *sees = allowed == NULL ? NULL : allowed + b * allowed_batch;
    for (long t = 0; t < places; t++) {
      if (sees != NULL && !sees[t]) {
        for (long g = 0; g < group; g++) scores[g * places + t] = -INFINITY;
        continue;
      }
      const float *row = cached_row(keys, b, h, t, room, bf16);
      for (long g = 0; g < group; g++) {
        float dot = 0;
        const float *query = queries + g * d;
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < d; i++) dot += query[i] * row[i];
        dot *= scale;
        scores[g * places + t] = softcap > 0 ? tanhf(dot / softcap) * softcap : dot;
      }
    }
    memset(sums, 0, group * dv * sizeof(float));
    for (long g = 0; g < group; g++) {
      float *s = scores + g * places, most = -INFINITY, total = 0;
      long head = h * group + g;
      float sink = sinks == NULL ? 0 : bf16 ? from_bf16(((const uint16_t *)sinks)[head]) : ((const float *)sinks)[head];
      for (long t = 0; t < places; t++) most = s[t] > most ? s[t] : most;
      if (sinks != NULL && sink > most) most = sink;
      for (long t = 0; t < places; t++) { s[t] = s[t] <= most - 87.0f ? 0.0f : power_e(s[t] - most); total += s[t]; }
      if (sinks != NULL) total += expf(sink - most);
      for (long t = 0; t < places; t++) s[t] /= total;
    }
    for (long t = 0; t < places; t++) {
      if (sees != NULL && !sees[t]) continue;
      const float *row = cached_row(values, b, h, t, room, bf16);
      for (long g = 0; g < group; g++) {
        float p = scores[g * places + t], *sum = sums + g * dv;
        for (long i = 0; i < dv; i++) sum[i] += p * row[i];
      }
    }
    save(sums, (char *)y + at * group * dv * size, group * dv, bf16);
    free(space);
  }
  return failed;
}

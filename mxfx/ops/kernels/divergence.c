/* Behind rows.c, in one unit with it: rows of logits and how far they are from others. A row is read while it is in the
   cache; ops of a library go through memory once each. Exponentials are float32, sums of them float64. */

enum { CHUNK = 1024 };

/* A row of logits: its largest, the first place of it, and the sum of all exponentials over that of the largest. */
typedef struct { float most; int32_t at; double sum; } total;

/* 1 if a number of the row is not finite. */
static int total_of(const float *x, long n, total *t) {
  float most = x[0], nothing = 0;
#pragma omp simd reduction(max : most) reduction(+ : nothing)
  for (long i = 0; i < n; i++) { most = x[i] > most ? x[i] : most; nothing += x[i] * 0.0f; }
  if (nothing != 0) return 1;
  t->most = most, t->at = 0, t->sum = 0;
  while (x[t->at] != most) t->at++;
  for (long from = 0; from < n; from += CHUNK) {
    long stop = n - from < CHUNK ? n : from + CHUNK;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = from; i < stop; i++) sum += power_e(x[i] - most);
    t->sum += sum;
  }
  return 0;
}

/* KL(expected ‖ actual) in nats. */
static double divergence_of(const float *a, const total *of_a, const float *e, const total *of_e, long n) {
  double mean = 0;
  float most = of_e->most;
  for (long from = 0; from < n; from += CHUNK) {
    long stop = n - from < CHUNK ? n : from + CHUNK;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = from; i < stop; i++) sum += power_e(e[i] - most) * (e[i] - a[i]);
    mean += sum;
  }
  return mean / of_e->sum + ((double)of_a->most - most) + log(of_a->sum / of_e->sum);
}

/* rows × n logits. targets → log_p: log-probability of each row's target; top: its likeliest; with `expected`, kl and
   expected_top; gradient: of kl by the logits, times `share`. NULL for what is not asked. 1 for a row that is not finite,
   2 without memory. */
int mxfx_divergence(const void *actual, const void *expected, const int64_t *targets, float *log_p, int32_t *top,
                    float *kl, int32_t *expected_top, void *gradient, long rows, long n, int bf16, float share,
                    int threads) {
  long size = bf16 ? 2 : 4;
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long row = 0; row < rows; row++) {
    float *a = malloc(2 * n * sizeof(float)), *e = a + n;
    total of_a, of_e;
    if (a == NULL) { failed = 2; continue; }
    load((const char *)actual + row * n * size, a, n, bf16);
    if (expected != NULL) load((const char *)expected + row * n * size, e, n, bf16);
    if (total_of(a, n, &of_a) || (expected != NULL && total_of(e, n, &of_e))) { failed = 1; free(a); continue; }
    if (targets != NULL) log_p[row] = (float)((double)a[targets[row]] - of_a.most - log(of_a.sum));
    if (top != NULL) top[row] = of_a.at;
    if (expected != NULL) {
      kl[row] = (float)divergence_of(a, &of_a, e, &of_e, n);
      if (expected_top != NULL) expected_top[row] = of_e.at;
      if (gradient != NULL) {
        float of_p = share / (float)of_a.sum, of_q = share / (float)of_e.sum, p = of_a.most, q = of_e.most;
        for (long i = 0; i < n; i++) a[i] = power_e(a[i] - p) * of_p - power_e(e[i] - q) * of_q;
        save(a, (char *)gradient + row * n * size, n, bf16);
      }
    }
    free(a);
  }
  return failed;
}

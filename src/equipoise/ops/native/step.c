/* One step of decoding on CPU: window softmax, linear attention, their mix, and the state updated in place.
 *
 * The same arithmetic as equipoise/ops/step.py in one call, float32 sums throughout. Shapes follow the legend in
 * equipoise/ops/types.py; every tensor is contiguous. Keys and values of the window may be float32 or bfloat16.
 * Pointers come as integers: the caller, equipoise/ops/native_step.py, has checked dtypes, sizes and devices.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
/* Inlined by force: what is not would be compiled for the oldest processor, not for a clone's. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef struct {
    /* memories 0: a window alone; sinks: tokens that stay when the window has left them behind */
    Py_ssize_t batch, kv_heads, groups, memories, history, size, value_size, features, sinks;
    const float *q, *phi_q, *gate, *fold_phi, *fold_v; /* gate: a number per head, or NULL for `weight` */
    const float *sink; /* score per head of attending to nothing, or NULL */
    const void *k, *v;
    void *keys, *values, *sink_keys, *sink_values;
    uint8_t *valid, *sink_valid;
    int64_t *ranks; /* how many real tokens came before each of the kept ones */
    float *total, *normalizer, *out, *scratch;
    int64_t *folded; /* per row of the batch: keys in the sums */
    float scale, softcap, epsilon, weight;
    int half, lagging, mixing;
} Step;

enum { CONVEX, SHARED, CALIBRATED };

INLINE float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE float same(float value) { return value; }

INLINE float floored(float x, float epsilon) {
    if (fabsf(x) >= epsilon) return x;
    return x < 0 ? -epsilon : epsilon;
}

/* e^x for x <= 0 to 2e-7, without a branch so that loops over it vectorise: 2^n times a polynomial (Cephes). */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = (float)(int32_t)(x * 1.44269504f - 0.5f); /* rounds towards 0: to the nearest, for x <= 0 */
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Products of a query [D] with rows [n, D], and sums of rows [n, E] by weight added to out [E]; four rows at a
 * time, so that their sums do not wait for one another. */
#define ROWS(NAME, ELEMENT, LOAD)                                                                                      \
    INLINE void NAME##_products(const float *restrict q, const ELEMENT *restrict rows, Py_ssize_t n,            \
                                       Py_ssize_t D, float *restrict out) {                                            \
        Py_ssize_t j = 0;                                                                                              \
        for (; j + 4 <= n; j += 4) {                                                                                   \
            const ELEMENT *restrict a = rows + j * D, *restrict b = a + D, *restrict c = b + D, *restrict d = c + D;   \
            float w = 0, x = 0, y = 0, z = 0;                                                                          \
            for (Py_ssize_t i = 0; i < D; i++) {                                                                       \
                w += q[i] * LOAD(a[i]);                                                                                \
                x += q[i] * LOAD(b[i]);                                                                                \
                y += q[i] * LOAD(c[i]);                                                                                \
                z += q[i] * LOAD(d[i]);                                                                                \
            }                                                                                                          \
            out[j] = w, out[j + 1] = x, out[j + 2] = y, out[j + 3] = z;                                                \
        }                                                                                                              \
        for (; j < n; j++) {                                                                                           \
            float w = 0;                                                                                               \
            for (Py_ssize_t i = 0; i < D; i++) w += q[i] * LOAD(rows[j * D + i]);                                      \
            out[j] = w;                                                                                                \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void NAME##_sums(const float *restrict w, const ELEMENT *restrict rows, Py_ssize_t n, Py_ssize_t E,  \
                                   float *restrict out) {                                                              \
        Py_ssize_t j = 0;                                                                                              \
        for (; j + 4 <= n; j += 4) {                                                                                   \
            if (w[j] == 0 || w[j + 1] == 0 || w[j + 2] == 0 || w[j + 3] == 0) break; /* padding: not even read */      \
            const ELEMENT *restrict a = rows + j * E, *restrict b = a + E, *restrict c = b + E, *restrict d = c + E;   \
            for (Py_ssize_t e = 0; e < E; e++)                                                                         \
                out[e] += w[j] * LOAD(a[e]) + w[j + 1] * LOAD(b[e]) + w[j + 2] * LOAD(c[e]) + w[j + 3] * LOAD(d[e]);   \
        }                                                                                                              \
        for (; j < n; j++) {                                                                                           \
            if (w[j] == 0) continue;                                                                                   \
            for (Py_ssize_t e = 0; e < E; e++) out[e] += w[j] * LOAD(rows[j * E + e]);                                 \
        }                                                                                                              \
    }
ROWS(float, float, same)
ROWS(half, uint16_t, widen)

INLINE void products(const Step *s, const float *q, const void *rows, Py_ssize_t at, Py_ssize_t n, float *out) {
    if (s->half)
        half_products(q, (const uint16_t *)rows + at * s->size, n, s->size, out);
    else
        float_products(q, (const float *)rows + at * s->size, n, s->size, out);
}

INLINE void sums(const Step *s, const float *w, const void *rows, Py_ssize_t at, Py_ssize_t n, float *out) {
    if (s->half)
        half_sums(w, (const uint16_t *)rows + at * s->value_size, n, s->value_size, out);
    else
        float_sums(w, (const float *)rows + at * s->value_size, n, s->value_size, out);
}

/* The window's softmax of query head h over `history` kept tokens and the new one: out [E]; returns the sum of the
 * exponentials of scores less the largest, or, for calibrated mixing, the logarithm of that of the scores. */
INLINE float window(const Step *s, Py_ssize_t b, Py_ssize_t n, Py_ssize_t h, float *restrict out) {
    const Py_ssize_t E = s->value_size, R = s->history, P = s->sinks, at = b * s->kv_heads + n, count = P + R;
    const uint8_t *restrict valid = s->valid + b * R, *restrict filled = s->sink_valid + b * P;
    const float *q = s->q + (b * s->kv_heads * s->groups + h) * s->size;
    float *restrict scores = s->scratch, top = s->sink ? s->sink[h] : -INFINITY, mass = 0;
    if (P) products(s, q, s->sink_keys, at * P, P, scores);
    products(s, q, s->keys, at * R, R, scores + P);
    products(s, q, s->k, at, 1, scores + count);
    for (Py_ssize_t j = 0; j <= count; j++) scores[j] *= s->scale;
    if (s->softcap > 0)
        for (Py_ssize_t j = 0; j <= count; j++) scores[j] = tanhf(scores[j] / s->softcap) * s->softcap;
    for (Py_ssize_t j = 0; j < P; j++) scores[j] = filled[j] ? scores[j] : -INFINITY;
    for (Py_ssize_t j = 0; j < R; j++) scores[P + j] = valid[j] ? scores[P + j] : -INFINITY;
    for (Py_ssize_t j = 0; j <= count; j++) top = scores[j] > top ? scores[j] : top;
    for (Py_ssize_t j = 0; j <= count; j++) scores[j] = exponential(scores[j] - top);
    for (Py_ssize_t j = 0; j < P; j++) scores[j] = filled[j] ? scores[j] : 0;
    for (Py_ssize_t j = 0; j < R; j++) scores[P + j] = valid[j] ? scores[P + j] : 0;
    for (Py_ssize_t j = 0; j <= count; j++) mass += scores[j];
    if (s->sink) mass += exponential(s->sink[h] - top);
    for (Py_ssize_t e = 0; e < E; e++) out[e] = 0;
    if (P) sums(s, scores, s->sink_values, at * P, P, out);
    sums(s, scores + P, s->values, at * R, R, out);
    sums(s, scores + count, s->v, at, 1, out);
    const float over = 1 / mass;
    for (Py_ssize_t e = 0; e < E; e++) out[e] *= over;
    return s->mixing == CALIBRATED ? top + logf(mass) : mass;
}

/* S and z of one memory take in a key: `phi` [F], `value` [E]. */
INLINE void fold(const Step *s, float *restrict total, float *restrict normalizer, const float *restrict phi,
                        const float *restrict value) {
    const Py_ssize_t F = s->features, E = s->value_size;
    for (Py_ssize_t f = 0; f < F; f++) {
        const float weight = phi[f];
        float *restrict line = total + f * E;
        for (Py_ssize_t e = 0; e < E; e++) line[e] += weight * value[e];
    }
    for (Py_ssize_t f = 0; f < F; f++) normalizer[f] += phi[f];
}

/* `fold`, then `linear` of the one query that reads this memory, in one pass over S. */
INLINE float fold_and_read(const Step *s, float *restrict total, float *restrict normalizer, const float *restrict key,
                           const float *restrict value, const float *restrict phi, float *restrict out) {
    const Py_ssize_t F = s->features, E = s->value_size;
    float denominator = 0;
    for (Py_ssize_t f = 0; f < F; f++) normalizer[f] += key[f];
    for (Py_ssize_t f = 0; f < F; f++) denominator += phi[f] * normalizer[f];
    for (Py_ssize_t e = 0; e < E; e++) out[e] = 0;
    Py_ssize_t f = 0;
    for (; f + 4 <= F; f += 4) {
        float *restrict a = total + f * E, *restrict b = a + E, *restrict c = b + E, *restrict d = c + E;
        for (Py_ssize_t e = 0; e < E; e++) {
            const float v = value[e], w = a[e] + key[f] * v, x = b[e] + key[f + 1] * v;
            const float y = c[e] + key[f + 2] * v, z = d[e] + key[f + 3] * v;
            a[e] = w, b[e] = x, c[e] = y, d[e] = z;
            out[e] += phi[f] * w + phi[f + 1] * x + phi[f + 2] * y + phi[f + 3] * z;
        }
    }
    for (; f < F; f++)
        for (Py_ssize_t e = 0; e < E; e++) {
            total[f * E + e] += key[f] * value[e];
            out[e] += phi[f] * total[f * E + e];
        }
    return denominator;
}

/* Linear attention of one query: numerator [E]; returns the denominator. */
INLINE float linear(const Step *s, const float *restrict total, const float *restrict normalizer,
                           const float *restrict phi, float *restrict out) {
    const Py_ssize_t F = s->features, E = s->value_size;
    float denominator = 0;
    for (Py_ssize_t f = 0; f < F; f++) denominator += phi[f] * normalizer[f];
    for (Py_ssize_t e = 0; e < E; e++) out[e] = 0;
    Py_ssize_t f = 0;
    for (; f + 4 <= F; f += 4) {
        const float *restrict a = total + f * E, *restrict b = a + E, *restrict c = b + E, *restrict d = c + E;
        for (Py_ssize_t e = 0; e < E; e++)
            out[e] += phi[f] * a[e] + phi[f + 1] * b[e] + phi[f + 2] * c[e] + phi[f + 3] * d[e];
    }
    for (; f < F; f++)
        for (Py_ssize_t e = 0; e < E; e++) out[e] += phi[f] * total[f * E + e];
    return denominator;
}

INLINE void shift(void *base, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t width, const void *fresh, int half) {
    const size_t bytes = (size_t)width * (half ? 2 : 4);
    char *start = (char *)base + (size_t)at * rows * bytes;
    memmove(start, start + bytes, (size_t)(rows - 1) * bytes);
    memcpy(start + (size_t)(rows - 1) * bytes, (const char *)fresh + (size_t)at * bytes, bytes);
}

/* What leaves the window stays if it is among the first so many real tokens; `valid` of sinks is set once, in run. */
INLINE void stay(void *sinks, const void *rows, Py_ssize_t at, Py_ssize_t count, Py_ssize_t rank, Py_ssize_t history,
                 Py_ssize_t width, int half) {
    const size_t bytes = (size_t)width * (half ? 2 : 4);
    memcpy((char *)sinks + (size_t)(at * count + rank) * bytes, (const char *)rows + (size_t)(at * history) * bytes, bytes);
}

/* The mix of one query head from its window [E] and linear attention [E]. */
INLINE void mix(const Step *s, Py_ssize_t b, Py_ssize_t at, const float *restrict near, float mass,
                const float *restrict far, float sum) {
    const Py_ssize_t E = s->value_size;
    float *restrict out = s->out + at * E, gate = s->gate ? s->gate[at] : s->weight;
    if (s->mixing == CALIBRATED) {
        const float total = sum > s->epsilon ? sum : s->epsilon, apart = mass - gate - logf(total);
        const float smaller = exponential(-fabsf(apart)), larger = 1 / (1 + smaller);
        const float share = apart > 0 ? larger : smaller * larger, rest = (1 - share) / total;
        for (Py_ssize_t e = 0; e < E; e++) out[e] = share * near[e] + rest * far[e];
        return;
    }
    if (s->mixing == SHARED) {
        const float factor = gate * mass, over = 1 / floored(sum + factor, s->epsilon);
        for (Py_ssize_t e = 0; e < E; e++) out[e] = (factor * near[e] + far[e]) * over;
        return;
    }
    if (s->lagging && s->folded[b] <= 0) gate = 1; /* linear attention has no key to see yet */
    const float rest = (1 - gate) / floored(sum, s->epsilon);
    for (Py_ssize_t e = 0; e < E; e++) out[e] = gate * near[e] + rest * far[e];
}

/* All query heads of one key head, n of row b. Its keys and values move on while they are in the first cache. */
INLINE void key_head(const Step *s, Py_ssize_t b, Py_ssize_t n) {
    const Py_ssize_t H = s->kv_heads * s->groups, E = s->value_size, F = s->features, R = s->history, G = s->groups;
    const Py_ssize_t own = s->memories / s->kv_heads, share = s->memories ? H / s->memories : 0;
    float *far = s->scratch + s->sinks + R + 1, *near = far + E, *mass = near + G * E;
    for (Py_ssize_t g = 0; g < G; g++)
        mass[g] = window(s, b, n, n * G + g, near + g * E);
    if (s->sinks && s->valid[b * R] && s->ranks[b * R] < s->sinks) {
        stay(s->sink_keys, s->keys, b * s->kv_heads + n, s->sinks, s->ranks[b * R], R, s->size, s->half);
        stay(s->sink_values, s->values, b * s->kv_heads + n, s->sinks, s->ranks[b * R], R, E, s->half);
    }
    shift(s->keys, b * s->kv_heads + n, R, s->size, s->k, s->half);
    shift(s->values, b * s->kv_heads + n, R, E, s->v, s->half);
    if (!s->memories) {
        memcpy(s->out + (b * H + n * G) * E, near, sizeof(float) * (size_t)(G * E));
        return;
    }
    const float *value = s->fold_v + (b * s->kv_heads + n) * E;
    for (Py_ssize_t m = n * own; m < (n + 1) * own; m++) {
        float *total = s->total + (b * s->memories + m) * F * E;
        float *normalizer = s->normalizer + (b * s->memories + m) * F;
        const float *phi = s->fold_phi + (b * s->memories + m) * F;
        const int alone = !s->lagging && share == 1;
        if (!s->lagging && !alone) fold(s, total, normalizer, phi, value);
        for (Py_ssize_t h = m * share; h < (m + 1) * share; h++) {
            const Py_ssize_t at = b * H + h, g = h - n * G;
            const float *phi_q = s->phi_q + at * F;
            const float sum = alone ? fold_and_read(s, total, normalizer, phi, value, phi_q, far)
                                    : linear(s, total, normalizer, phi_q, far);
            mix(s, b, at, near + g * E, mass[g], far, sum);
        }
        if (s->lagging) fold(s, total, normalizer, phi, value);
    }
}

CLONES static void run(const Step *s) {
    const Py_ssize_t R = s->history;
    for (Py_ssize_t b = 0; b < s->batch; b++) {
        for (Py_ssize_t n = 0; n < s->kv_heads; n++) key_head(s, b, n);
        if (s->memories) s->folded[b] += s->lagging ? s->valid[b * R] : 1;
        if (s->sinks) {
            int64_t *ranks = s->ranks + b * R;
            const int64_t next = ranks[R - 1] + s->valid[(b + 1) * R - 1];
            if (s->valid[b * R] && ranks[0] < s->sinks) s->sink_valid[b * s->sinks + ranks[0]] = 1;
            memmove(ranks, ranks + 1, sizeof(int64_t) * (size_t)(R - 1));
            ranks[R - 1] = next;
        }
        memmove(s->valid + b * R, s->valid + b * R + 1, (size_t)(R - 1));
        s->valid[(b + 1) * R - 1] = 1;
    }
}

static PyObject *step(PyObject *self, PyObject *args) {
    Step s;
    unsigned long long p[18], sink = 0;
    int ok = PyArg_ParseTuple(
        args, "(nnnnnnnnn)(KKKKKKKKKKKKKKKKKK)(ffff)(ppi)|K", &s.batch, &s.kv_heads, &s.groups, &s.memories, &s.history,
        &s.size, &s.value_size, &s.features, &s.sinks, &p[0], &p[1], &p[2], &p[3], &p[4], &p[5], &p[6], &p[7], &p[8],
        &p[9], &p[10], &p[11], &p[12], &p[13], &p[14], &p[15], &p[16], &p[17], &s.scale, &s.softcap, &s.epsilon,
        &s.weight, &s.half, &s.lagging, &s.mixing, &sink);
    (void)self;
    if (!ok) return NULL;
    s.q = (const float *)(uintptr_t)p[0];
    s.k = (const void *)(uintptr_t)p[1];
    s.v = (const void *)(uintptr_t)p[2];
    s.phi_q = (const float *)(uintptr_t)p[3];
    s.fold_phi = (const float *)(uintptr_t)p[4];
    s.fold_v = (const float *)(uintptr_t)p[5];
    s.gate = (const float *)(uintptr_t)p[6];
    s.keys = (void *)(uintptr_t)p[7];
    s.values = (void *)(uintptr_t)p[8];
    s.valid = (uint8_t *)(uintptr_t)p[9];
    s.total = (float *)(uintptr_t)p[10];
    s.normalizer = (float *)(uintptr_t)p[11];
    s.folded = (int64_t *)(uintptr_t)p[12];
    s.out = (float *)(uintptr_t)p[13];
    s.sink_keys = (void *)(uintptr_t)p[14];
    s.sink_values = (void *)(uintptr_t)p[15];
    s.sink_valid = (uint8_t *)(uintptr_t)p[16];
    s.ranks = (int64_t *)(uintptr_t)p[17];
    s.sink = (const float *)(uintptr_t)sink;
    s.scratch = malloc(sizeof(float) * (size_t)(s.sinks + s.history + 1 + s.value_size + s.groups * (s.value_size + 1)));
    if (!s.scratch) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    run(&s);
    Py_END_ALLOW_THREADS
    free(s.scratch);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"step", step, METH_VARARGS, "One decoding step; see equipoise/ops/native_step.py."},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }

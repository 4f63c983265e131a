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
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

typedef struct {
    Py_ssize_t batch, kv_heads, groups, memories, history, size, value_size, features;
    const float *q, *phi_q, *gate, *fold_phi, *fold_v;
    const void *k, *v;
    void *keys, *values;
    uint8_t *valid;
    float *total, *normalizer, *out, *scratch;
    const uint8_t *sees; /* per row of the batch: whether linear attention has a key; NULL when it has */
    float scale, softcap, epsilon;
    int half, lagging, shared;
} Step;

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline float floored(float x, float epsilon) {
    if (fabsf(x) >= epsilon) return x;
    return x < 0 ? -epsilon : epsilon;
}

/* The window's softmax of one query [D] over `history` kept tokens and the new one: out [E], returns the mass. */
static inline float window(const Step *s, Py_ssize_t b, Py_ssize_t n, const float *q, float *out) {
    const Py_ssize_t D = s->size, E = s->value_size, R = s->history, at = b * s->kv_heads + n;
    float *scores = s->scratch, top = -INFINITY, mass = 0;
    for (Py_ssize_t j = 0; j <= R; j++) {
        if (j < R && !s->valid[b * R + j]) {
            scores[j] = -INFINITY;
            continue;
        }
        float sum = 0;
        if (s->half) {
            const uint16_t *key = j < R ? (const uint16_t *)s->keys + (at * R + j) * D : (const uint16_t *)s->k + at * D;
            for (Py_ssize_t d = 0; d < D; d++) sum += q[d] * widen(key[d]);
        } else {
            const float *key = j < R ? (const float *)s->keys + (at * R + j) * D : (const float *)s->k + at * D;
            for (Py_ssize_t d = 0; d < D; d++) sum += q[d] * key[d];
        }
        sum *= s->scale;
        if (s->softcap > 0) sum = tanhf(sum / s->softcap) * s->softcap;
        scores[j] = sum;
        if (sum > top) top = sum;
    }
    for (Py_ssize_t e = 0; e < E; e++) out[e] = 0;
    for (Py_ssize_t j = 0; j <= R; j++) {
        if (scores[j] == -INFINITY) continue;
        const float weight = expf(scores[j] - top);
        mass += weight;
        if (s->half) {
            const uint16_t *value =
                j < R ? (const uint16_t *)s->values + (at * R + j) * E : (const uint16_t *)s->v + at * E;
            for (Py_ssize_t e = 0; e < E; e++) out[e] += weight * widen(value[e]);
        } else {
            const float *value = j < R ? (const float *)s->values + (at * R + j) * E : (const float *)s->v + at * E;
            for (Py_ssize_t e = 0; e < E; e++) out[e] += weight * value[e];
        }
    }
    for (Py_ssize_t e = 0; e < E; e++) out[e] /= mass;
    return mass;
}

/* S and z of one memory take in a key: `phi` [F], `value` [E]. */
static inline void fold(const Step *s, float *total, float *normalizer, const float *phi, const float *value) {
    const Py_ssize_t F = s->features, E = s->value_size;
    for (Py_ssize_t f = 0; f < F; f++) {
        const float weight = phi[f];
        float *line = total + f * E;
        for (Py_ssize_t e = 0; e < E; e++) line[e] += weight * value[e];
        normalizer[f] += weight;
    }
}

/* Linear attention of one query: numerator [E]; returns the denominator. */
static inline float linear(const Step *s, const float *total, const float *normalizer, const float *phi, float *out) {
    const Py_ssize_t F = s->features, E = s->value_size;
    float denominator = 0;
    for (Py_ssize_t e = 0; e < E; e++) out[e] = 0;
    for (Py_ssize_t f = 0; f < F; f++) {
        const float weight = phi[f];
        const float *line = total + f * E;
        for (Py_ssize_t e = 0; e < E; e++) out[e] += weight * line[e];
        denominator += weight * normalizer[f];
    }
    return denominator;
}

static inline void shift(void *base, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t width, const void *fresh, int half) {
    const size_t bytes = (size_t)width * (half ? 2 : 4);
    char *start = (char *)base + (size_t)at * rows * bytes;
    memmove(start, start + bytes, (size_t)(rows - 1) * bytes);
    memcpy(start + (size_t)(rows - 1) * bytes, (const char *)fresh + (size_t)at * bytes, bytes);
}

CLONES static void run(const Step *s) {
    const Py_ssize_t H = s->kv_heads * s->groups, E = s->value_size, F = s->features, share = H / s->memories;
    float *near = s->scratch + s->history + 1, *far = near + E;
    for (Py_ssize_t b = 0; b < s->batch; b++) {
        for (Py_ssize_t m = 0; m < s->memories; m++) {
            float *total = s->total + (b * s->memories + m) * F * E;
            float *normalizer = s->normalizer + (b * s->memories + m) * F;
            const float *phi = s->fold_phi + (b * s->memories + m) * F;
            const float *value = s->fold_v + (b * s->kv_heads + m * s->kv_heads / s->memories) * E;
            if (!s->lagging) fold(s, total, normalizer, phi, value);
            for (Py_ssize_t h = m * share; h < (m + 1) * share; h++) {
                const Py_ssize_t at = b * H + h;
                const float mass = window(s, b, h / s->groups, s->q + at * s->size, near);
                const float sum = linear(s, total, normalizer, s->phi_q + at * F, far);
                float *out = s->out + at * E, gate = s->gate[at];
                if (s->shared) {
                    const float factor = gate * mass, over = 1 / floored(sum + factor, s->epsilon);
                    for (Py_ssize_t e = 0; e < E; e++) out[e] = (factor * near[e] + far[e]) * over;
                } else {
                    if (s->sees && !s->sees[b]) gate = 1;
                    const float rest = (1 - gate) / floored(sum, s->epsilon);
                    for (Py_ssize_t e = 0; e < E; e++) out[e] = gate * near[e] + rest * far[e];
                }
            }
            if (s->lagging) fold(s, total, normalizer, phi, value);
        }
        for (Py_ssize_t n = 0; n < s->kv_heads; n++) {
            shift(s->keys, b * s->kv_heads + n, s->history, s->size, s->k, s->half);
            shift(s->values, b * s->kv_heads + n, s->history, E, s->v, s->half);
        }
        memmove(s->valid + b * s->history, s->valid + b * s->history + 1, (size_t)(s->history - 1));
        s->valid[(b + 1) * s->history - 1] = 1;
    }
}

static PyObject *step(PyObject *self, PyObject *args) {
    Step s;
    unsigned long long p[15];
    int ok = PyArg_ParseTuple(
        args, "(nnnnnnnn)(KKKKKKKKKKKKKKK)(fff)(ppp)", &s.batch, &s.kv_heads, &s.groups, &s.memories, &s.history, &s.size,
        &s.value_size, &s.features, &p[0], &p[1], &p[2], &p[3], &p[4], &p[5], &p[6], &p[7], &p[8], &p[9], &p[10], &p[11],
        &p[12], &p[13], &p[14], &s.scale, &s.softcap, &s.epsilon, &s.half, &s.lagging, &s.shared);
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
    s.out = (float *)(uintptr_t)p[12];
    s.scratch = (float *)(uintptr_t)p[13];
    s.sees = (const uint8_t *)(uintptr_t)p[14];
    Py_BEGIN_ALLOW_THREADS
    run(&s);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"step", step, METH_VARARGS, "One decoding step; see equipoise/ops/native_step.py."},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }

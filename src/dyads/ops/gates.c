// SPDX-License-Identifier: Apache-2.0
// How are softmax gates and their gradients computed in one pass over memory?
//
// All matrices lie with the tokens innermost, t of them. The one that is read and written in place holds [h; scores],
// and comes out as [h; gates]. There are K groups of n experts. A gate of group k and expert i multiplies S ranks:
// those of the group (MoDE: h is K·S rows, u is K·S·n), or, with `own`, those of the expert (MoLORA: K = 1, both n·S).
//
//     g = softmax(scores / temperature)        u = h ∘ g
//     t = du ∘ g        dh = t, summed over i where ranks are shared
//     a_i = Σ_j h ∘ t   dscores = (a_i − g_i Σ_i a_i) / temperature
//
// `inverse` is 1 / temperature; du is multiplied by `scale` first.
//
// It is written for vectors of 16 numbers; a compiler makes of one what the processor has. Along the tokens memory is
// read in runs of CHUNK, which the processor sees coming: token by token the same takes three times as long.

#include <stdint.h>
#include <string.h>

#define LANES 16
#ifndef CHUNK
#define CHUNK 256
#endif
#define BLOCKS (CHUNK / LANES)

typedef float v __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

static inline v all(float x) { return x - (v){0}; }
static inline v pick(vi mask, v a, v b) { return (v)((mask & (vi)a) | (~mask & (vi)b)); }

// exp(x) for x ≤ 0, within two units in the last place; 0 below −87, where single precision ends; NaN stays NaN.
static inline v exponential(v x) {
    v c = pick(x < -87.0f, all(-87.0f), x);
    v n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded: what is below one falls off the mantissa
    v r = (c - n * 0.693359375f) + n * 2.12194440e-4f;    // x − n ln 2, with ln 2 in two parts
    v p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    v two = (v)((__builtin_convertvector(n, vi) + 127) << 23);
    return pick(x < -87.0f, all(0.0f), p * two);
}

static inline v load_f32(const float *p, int64_t left) {
    v x = {0};
    if (left >= LANES) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, left * sizeof *p);
    return x;
}

static inline void store_f32(float *p, v x, int64_t left) {
    if (left >= LANES) memcpy(p, &x, sizeof x);
    else memcpy(p, &x, left * sizeof *p);
}

static inline v as_f32(v x) { return x; }

// bf16 is the upper half of a float; rounded to the nearest, ties to even.
static inline vu upper(v x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return (rounded & ~nan) | (0x7fc0 & nan);
}

static inline v load_bf16(const uint16_t *p, int64_t left) {
    vh x = {0};
    if (left >= LANES) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, left * sizeof *p);
    return (v)(__builtin_convertvector(x, vu) << 16);
}

static inline void store_bf16(uint16_t *p, v x, int64_t left) {
    vh y = __builtin_convertvector(upper(x), vh);
    if (left >= LANES) memcpy(p, &y, sizeof y);
    else memcpy(p, &y, left * sizeof *p);
}

static inline v as_bf16(v x) { return (v)(upper(x) << 16); }

#define EACH_BLOCK for (int64_t b = 0, o = from; b < BLOCKS && o < t; b++, o += LANES)
#define H_ROW(i, j) ((own ? (i) * S : k * S) + (j))
#define U_ROW(i, j) (own ? (i) * S + (j) : (k * S + (j)) * n + (i))

#define KERNELS(T, X)                                                                                                  \
    void mix_##X(T *h, T *scores, T *u, int64_t K, int64_t S, int64_t n, int64_t own, int64_t t, float inverse,        \
                 int64_t threads) {                                                                                    \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t from = 0; from < t; from += CHUNK) {                                                              \
            v g[n][BLOCKS], most[BLOCKS], sum[BLOCKS];                                                                 \
            for (int64_t k = 0; k < K; k++) {                                                                          \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    const T *row = scores + (k * n + i) * t;                                                           \
                    EACH_BLOCK {                                                                                       \
                        v s = load_##X(row + o, t - o) * inverse;                                                      \
                        most[b] = i == 0 ? s : pick(s > most[b], s, most[b]);                                          \
                        g[i][b] = s;                                                                                   \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    EACH_BLOCK {                                                                                       \
                        v e = exponential(g[i][b] - most[b]);                                                          \
                        sum[b] = i == 0 ? e : sum[b] + e;                                                              \
                        g[i][b] = e;                                                                                   \
                    }                                                                                                  \
                }                                                                                                      \
                EACH_BLOCK sum[b] = 1.0f / sum[b];                                                                     \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    T *row = scores + (k * n + i) * t;                                                                 \
                    EACH_BLOCK {                                                                                       \
                        g[i][b] = as_##X(g[i][b] * sum[b]);                                                            \
                        store_##X(row + o, g[i][b], t - o);                                                            \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t j = 0; j < S; j++) {                                                                      \
                    for (int64_t i = 0; i < n; i++) {                                                                  \
                        const T *of_h = h + H_ROW(i, j) * t;                                                           \
                        T *of_u = u + U_ROW(i, j) * t;                                                                 \
                        EACH_BLOCK store_##X(of_u + o, load_##X(of_h + o, t - o) * g[i][b], t - o);                    \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void gradients_##X(const T *h, const T *gates, const T *du, T *u, T *dh, T *dscores, int64_t K, int64_t S,         \
                       int64_t n, int64_t own, int64_t t, float inverse, float scale, int64_t threads) {           \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t from = 0; from < t; from += CHUNK) {                                                              \
            v g[n][BLOCKS], a[n][BLOCKS], sum[BLOCKS];                                                                 \
            for (int64_t k = 0; k < K; k++) {                                                                          \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    const T *row = gates + (k * n + i) * t;                                                            \
                    EACH_BLOCK {                                                                                       \
                        g[i][b] = load_##X(row + o, t - o);                                                            \
                        a[i][b] = all(0.0f);                                                                           \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t j = 0; j < S; j++) {                                                                      \
                    for (int64_t i = 0; i < n; i++) {                                                                  \
                        const T *of_h = h + H_ROW(i, j) * t, *of_du = du + U_ROW(i, j) * t;                            \
                        T *of_u = u + U_ROW(i, j) * t, *of_dh = dh + H_ROW(i, j) * t;                                  \
                        EACH_BLOCK {                                                                                   \
                            v one = load_##X(of_h + o, t - o);                                                         \
                            v part = load_##X(of_du + o, t - o) * scale * g[i][b];                                     \
                            a[i][b] += part * one;                                                                     \
                            sum[b] = own || i == 0 ? part : sum[b] + part;                                             \
                            if (own || i == n - 1) store_##X(of_dh + o, sum[b], t - o);                                \
                            store_##X(of_u + o, one * g[i][b], t - o);                                                 \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t i = 0; i < n; i++) EACH_BLOCK sum[b] = i == 0 ? a[i][b] : sum[b] + a[i][b];               \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    T *row = dscores + (k * n + i) * t;                                                                \
                    EACH_BLOCK store_##X(row + o, (a[i][b] - g[i][b] * sum[b]) * inverse, t - o);                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(uint16_t, bf16)

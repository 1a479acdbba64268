// SPDX-License-Identifier: Apache-2.0
// How are softmax gates and their gradients computed in one pass over memory?
//
// There are K groups of n experts. The gate of group k and expert i multiplies S ranks: those of the group (MoDE: h
// has K·S numbers for a token, u K·S·n), or, with `own`, those of the expert (MoLORA: K = 1, both have n·S).
//
//     g = softmax(scores / temperature)        u = h ∘ g
//     t = du ∘ g        dh = t, summed over i where ranks are shared
//     a_i = Σ_j h ∘ t   dscores = (a_i − g_i Σ_i a_i) / temperature
//
// `inverse` is 1 / temperature; du is multiplied by `scale` first.
//
// A token's numbers lie side by side where a product with the tokens as its rows gives or takes them: z = [h; scores],
// which comes out as [h; g] and may be a part of a wider matrix (the next token's z begins `width` numbers further on),
// u of `mix`, and du. What goes into products over the tokens, u and dz of `gradients`, has
// the tokens innermost. Each is the order in which that product is fastest. In between, CHUNK tokens are turned so that
// a vector holds one number of 16 tokens; a compiler makes of such a vector what the processor has.

#include <stdint.h>
#include <string.h>

#pragma GCC visibility push(default)

#define LANES 16
#define CHUNK 128
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
    else if (left > 0) memcpy(&x, p, left * sizeof *p);
    return x;
}

static inline void store_f32(float *p, v x, int64_t left) {
    if (left >= LANES) memcpy(p, &x, sizeof x);
    else if (left > 0) memcpy(p, &x, left * sizeof *p);
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
    else if (left > 0) memcpy(&x, p, left * sizeof *p);
    return (v)(__builtin_convertvector(x, vu) << 16);
}

static inline void store_bf16(uint16_t *p, v x, int64_t left) {
    vh y = __builtin_convertvector(upper(x), vh);
    if (left >= LANES) memcpy(p, &y, sizeof y);
    else if (left > 0) memcpy(p, &y, left * sizeof *p);
}

static inline v as_bf16(v x) { return (v)(upper(x) << 16); }

// A square of 16 × 16 numbers is turned in four steps: in squares of 2, 4, 8 and 16 two quarters change places.
#if defined(__clang__)
#define PICK_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK_LANES(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define SWAP(w, ...)                                                                                                   \
    for (int i = 0; i < LANES; i++)                                                                                    \
        if (!(i & w)) {                                                                                                \
            v a = x[i], b = x[i + w];                                                                                  \
            x[i] = PICK_LANES(a, b, __VA_ARGS__);                                                                      \
            x[i + w] = PICK_LANES(a, b, OTHER_##w);                                                                    \
        }
#define OTHER_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define OTHER_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define OTHER_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define OTHER_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31

static inline void transpose(v x[LANES]) {
    SWAP(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
    SWAP(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    SWAP(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    SWAP(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
}

// Memory that is about to be read, or written: `pieces` of so many bytes, `apart` from one another.
static inline void fetch(const void *from, int64_t bytes, int64_t apart, int64_t pieces, int write) {
    if (pieces > CHUNK && !write) pieces = CHUNK;
    for (int64_t i = 0; i < pieces; i++)
        for (int64_t b = 0; b < bytes; b += 64) {
            const char *p = (const char *)from + i * apart + b;
            if (write) __builtin_prefetch(p, 1, 2);
            else __builtin_prefetch(p, 0, 2);
        }
}

#define EACH_BLOCK(W) for (int64_t b = 0; b < W; b++)
#define H_ROW(i, j) ((own ? (i) * S : k * S) + (j))
#define U_ROW(i, j) (own ? (i) * S + (j) : (k * S + (j)) * n + (i))

// T: the type of a number, X: how it is read and written, N: a name, W: vectors of tokens that are worked on at once
#define MIX(T, X, N, W)                                                                                                \
    /* `rows` numbers of each token, of which the next begins `width` further on -> [row][token], zeros after them */  \
    static inline void turn_##N(const T *from, v (*to)[W], int64_t rows, int64_t width, int64_t tokens) {              \
        for (int64_t b = 0; b < W; b++)                                                                                \
            for (int64_t r = 0; r < rows; r += LANES) {                                                                \
                v x[LANES];                                                                                            \
                for (int64_t l = 0, o = b * LANES; l < LANES; l++, o++)                                                \
                    x[l] = load_##X(from + o * width + r, o < tokens ? rows - r : 0);                                  \
                transpose(x);                                                                                          \
                for (int64_t l = 0; l < LANES && r + l < rows; l++) to[r + l][b] = x[l];                               \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    /* and back */                                                                                                     \
    static inline void turn_back_##N(v (*from)[W], T *to, int64_t rows, int64_t width, int64_t tokens) {               \
        for (int64_t b = 0; b < W; b++)                                                                                \
            for (int64_t r = 0; r < rows; r += LANES) {                                                                \
                v x[LANES];                                                                                            \
                for (int64_t l = 0; l < LANES; l++) x[l] = r + l < rows ? from[r + l][b] : all(0.0f);                  \
                transpose(x);                                                                                          \
                for (int64_t l = 0, o = b * LANES; l < LANES && o < tokens; l++, o++)                                  \
                    store_##X(to + o * width + r, x[l], rows - r);                                                     \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    void mix_##N(T *z, T *u, int64_t width, int64_t K, int64_t S, int64_t n, int64_t own, int64_t t, float inverse,    \
                 int64_t threads) {                                                                                    \
        const int64_t p = own ? n * S : K * S, s = K * n, q = own ? p : p * n;                                         \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t from = 0; from < t; from += (W * LANES)) {                                                        \
            const int64_t tokens = t - from < (W * LANES) ? t - from : (W * LANES);                                    \
            v turned[p + s][W], mixed[q][W];                                                                           \
            fetch(z + (from + (W * LANES)) * width, (p + s) * sizeof(T), width * sizeof(T), t - from - (W * LANES), 0);\
            fetch(u + from * q, q * sizeof(T), q * sizeof(T), tokens, 1);                                              \
            turn_##N(z + from * width, turned, p + s, width, tokens);                                                  \
            for (int64_t k = 0; k < K; k++) {                                                                          \
                v most[W], sum[W], (*g)[W] = turned + p + k * n;                                                       \
                for (int64_t i = 0; i < n; i++) EACH_BLOCK(W) {                                                        \
                    g[i][b] *= inverse;                                                                                \
                    most[b] = i == 0 ? g[i][b] : pick(g[i][b] > most[b], g[i][b], most[b]);                            \
                }                                                                                                      \
                for (int64_t i = 0; i < n; i++) EACH_BLOCK(W) {                                                        \
                    g[i][b] = exponential(g[i][b] - most[b]);                                                          \
                    sum[b] = i == 0 ? g[i][b] : sum[b] + g[i][b];                                                      \
                }                                                                                                      \
                EACH_BLOCK(W) sum[b] = 1.0f / sum[b];                                                                  \
                for (int64_t i = 0; i < n; i++) EACH_BLOCK(W) g[i][b] = as_##X(g[i][b] * sum[b]);                      \
                for (int64_t j = 0; j < S; j++)                                                                        \
                    for (int64_t i = 0; i < n; i++)                                                                    \
                        EACH_BLOCK(W) mixed[U_ROW(i, j)][b] = as_##X(turned[H_ROW(i, j)][b] * g[i][b]);                \
            }                                                                                                          \
            turn_back_##N(turned + p, z + from * width + p, s, width, tokens);                                         \
            turn_back_##N(mixed, u + from * q, q, q, tokens);                                                          \
        }                                                                                                              \
    }

#define GRADIENTS(T, X, N, W)                                                                                          \
    void gradients_##N(const T *z, const T *du, T *u, T *dz, int64_t width, int64_t K, int64_t S, int64_t n,           \
                       int64_t own, int64_t t, float inverse, float scale, int64_t threads) {                          \
        const int64_t p = own ? n * S : K * S, s = K * n, q = own ? p : p * n;                                         \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t from = 0; from < t; from += (W * LANES)) {                                                        \
            const int64_t tokens = t - from < (W * LANES) ? t - from : (W * LANES);                                    \
            v turned[p + s][W], of_u[q][W], a[n][W], sum[W] = {0};                                                     \
            fetch(z + (from + (W * LANES)) * width, (p + s) * sizeof(T), width * sizeof(T), t - from - (W * LANES), 0);\
            fetch(u + from, tokens * sizeof(T), t * sizeof(T), q, 1);                                                  \
            fetch(dz + from, tokens * sizeof(T), t * sizeof(T), p + s, 1);                                             \
            turn_##N(z + from * width, turned, p + s, width, tokens);                                                  \
            turn_##N(du + from * q, of_u, q, q, tokens);                                                               \
            for (int64_t k = 0; k < K; k++) {                                                                          \
                v(*g)[W] = turned + p + k * n;                                                                         \
                for (int64_t j = 0; j < S; j++) {                                                                      \
                    for (int64_t i = 0; i < n; i++) {                                                                  \
                        T *to_u = u + U_ROW(i, j) * t + from, *to_dh = dz + H_ROW(i, j) * t + from;                    \
                        EACH_BLOCK(W) {                                                                                \
                            v one = turned[H_ROW(i, j)][b], part = of_u[U_ROW(i, j)][b] * scale * g[i][b];             \
                            a[i][b] = j == 0 ? part * one : a[i][b] + part * one;                                      \
                            sum[b] = own || i == 0 ? part : sum[b] + part;                                             \
                            store_##X(to_u + b * LANES, one * g[i][b], tokens - b * LANES);                            \
                            if (own || i == n - 1) store_##X(to_dh + b * LANES, sum[b], tokens - b * LANES);           \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t i = 0; i < n; i++) EACH_BLOCK(W) sum[b] = i == 0 ? a[i][b] : sum[b] + a[i][b];            \
                for (int64_t i = 0; i < n; i++) {                                                                      \
                    T *to = dz + (p + k * n + i) * t + from;                                                           \
                    EACH_BLOCK(W)                                                                                      \
                    store_##X(to + b * LANES, (a[i][b] - g[i][b] * sum[b]) * inverse, tokens - b * LANES);             \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

MIX(float, f32, f32, BLOCKS)
MIX(uint16_t, bf16, bf16, BLOCKS)
MIX(float, f32, few, 1)
GRADIENTS(float, f32, f32, BLOCKS)
GRADIENTS(uint16_t, bf16, bf16, BLOCKS)

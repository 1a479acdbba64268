// SPDX-License-Identifier: Apache-2.0
// How is the operator computed for a few rows at once, as while decoding?
//
// Two calls a layer in place of some fifteen operations: `coefficients` goes from x (rows d) to u (layers rows q) for all
// layers that see this x, and `add` adds u B to what the base layer gave (rows o). Sums are in fp32, and a row's do not
// depend on how many others there are. Rows come in eights: u has room for whole eights.
//
// [A; W]ᵀ and B lie in panels of 32 columns, zeros after the last: a panel is read from its first number to its last.

#include "gates.c"

#define ROWS 8
#define COLUMNS 32

// Eight rows of a (K numbers each) times a panel (K × 32).
static inline void times(const float *a, const float *panel, int64_t K, v to[ROWS][2]) {
    v s[ROWS][2];
    for (int r = 0; r < ROWS; r++) s[r][0] = s[r][1] = all(0.0f);
    for (int64_t k = 0; k < K; k++) {
        const v left = load_f32(panel + k * COLUMNS, LANES), right = load_f32(panel + k * COLUMNS + LANES, LANES);
        for (int r = 0; r < ROWS; r++) {
            s[r][0] += a[r * K + k] * left;
            s[r][1] += a[r * K + k] * right;
        }
    }
    for (int r = 0; r < ROWS; r++) to[r][0] = s[r][0], to[r][1] = s[r][1];
}

// `in` is room for whole eights of rows of x, and of z after them.
#define FEW(T, X)                                                                                                      \
    void coefficients_##X(const T *x, const float *down, float *in, float *u, int64_t rows, int64_t d, int64_t panels, \
                          int64_t layers, int64_t K, int64_t S, int64_t n, int64_t own, float inverse,                 \
                          int64_t threads) {                                                                           \
        const int64_t one = (own ? n * S : K * S) + K * n, q = own ? n * S : K * S * n, width = panels * COLUMNS;      \
        const int64_t room = (rows + ROWS - 1) / ROWS * ROWS;                                                          \
        float *z = in + room * d;                                                                                      \
        for (int64_t i = 0; i < rows * d; i += LANES) store_f32(in + i, load_##X(x + i, rows * d - i), rows * d - i);  \
        memset(in + rows * d, 0, (room - rows) * d * sizeof *in);                                                      \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t c = 0; c < panels; c++)                                                                           \
            for (int64_t r = 0; r < room; r += ROWS) {                                                                 \
                v sums[ROWS][2];                                                                                       \
                times(in + r * d, down + c * d * COLUMNS, d, sums);                                                    \
                for (int i = 0; i < ROWS; i++)                                                                         \
                    memcpy(z + (r + i) * width + c * COLUMNS, sums[i], COLUMNS * sizeof *z);                           \
            }                                                                                                          \
        for (int64_t l = 0; l < layers; l++) {                                                                         \
            mix_few(z + l * one, u + l * room * q, width, K, S, n, own, rows, inverse, 1);                             \
            memset(u + (l * room + rows) * q, 0, (room - rows) * q * sizeof *u);                                       \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void add_##X(const float *u, const float *up, T *y, int64_t rows, int64_t q, int64_t o, int64_t threads) {         \
        _Pragma("omp parallel for num_threads(threads)")                                                               \
        for (int64_t c = 0; c < o; c += COLUMNS)                                                                       \
            for (int64_t r = 0; r < rows; r += ROWS) {                                                                 \
                v sums[ROWS][2];                                                                                       \
                times(u + r * q, up + c * q, q, sums);                                                                 \
                for (int64_t i = 0; i < ROWS && r + i < rows; i++)                                                     \
                    for (int64_t h = 0; h < 2; h++) {                                                                  \
                        const int64_t at = c + h * LANES;                                                              \
                        T *to = y + (r + i) * o + at;                                                                  \
                        store_##X(to, load_##X(to, o - at) + sums[i][h], o - at);                                      \
                    }                                                                                                  \
            }                                                                                                          \
    }

FEW(float, f32)
FEW(uint16_t, bf16)

// SPDX-License-Identifier: Apache-2.0
// How does a processor with tiles of bf16 (Intel's AMX) multiply matrices in fp32?
//
// A number of fp32 is the sum of three of bf16, x = x₁ + x₂ + x₃, each rounded from what those before it left. Of the
// nine products of x's parts with y's the six that count in fp32 are added up,
//
//     x y ≈ x₃y₁ + x₂y₁ + x₂y₂ + x₁y₂ + x₁y₃ + x₁y₁        (what is left out is below 2⁻²⁴ of x y)
//
// in fp32, as tiles do: they multiply 16 times as many numbers of bf16 as vectors do of fp32. That is so for numbers and
// products above 1e-31; smaller ones lose their third part and then their second, as bf16 ends at 1.2e-38 too. What is
// not finite, or above 3.39e38, becomes NaN, and a sum that grows above that does or is infinite.
//
// A tile has 16 lines of 64 bytes. Of a left matrix (m k) it holds 16 rows and 32 columns; of a right one (k n) 32 rows
// and 16 columns, and a line has two rows, one number of each in turns. Matrices are brought into this order as they are
// needed: of the left one as much as stays near a core, for several right matrices at once; of these 32 columns, a
// panel, by the core that multiplies them. Both lie in steps of 32 along k, a step in three parts, a part in two tiles.
//
// DEEP steps are added up in the tiles, and then to what is there, so that a long sum is one of sums. Where it is cut
// depends on nothing but k: a result has the same bits however many rows, columns and threads there are.

#include <stdint.h>
#include <string.h>

#pragma GCC visibility push(default)

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef _OPENMP
int omp_get_thread_num(void);
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define TILE 512             // numbers
#define STEP (2 * 3 * TILE)  // of 32 rows, or columns, for 32 steps along k
#define SIDE 32
#define DEEP 12  // steps that are multiplied at once: 72 KB of a right matrix
#define HIGH 16  // times 32 rows: with so many steps 1.1 MB of the left one

typedef uint16_t bf16;

// Linux has to be asked for the tiles once in a process.
int64_t tiles_ready(void) {
    const int ask = 0x1023, data = 18;
    return syscall(SYS_arch_prctl, ask, data) == 0;
}

static void use_tiles(void) {
    const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } shape = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .lines = {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));  // GCC's own function reads a part of it only, as far as GCC knows
}

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }

static inline __m512 numbers(const float *p, __mmask16 there, float scale) {
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(there, p), _mm512_set1_ps(scale));
}

static inline __m512 as_fp32(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// The three parts of 16 numbers and 16 others. What is not finite leaves NaN behind, which is as it should be.
static inline void part(__m512 a, __m512 b, __m512i parts[3]) {
    for (int i = 0; i < 3; i++) {
        parts[i] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        if (i == 2) break;
        a = _mm512_sub_ps(a, as_fp32(_mm512_castsi512_si256(parts[i])));
        b = _mm512_sub_ps(b, as_fp32(_mm512_extracti64x4_epi64(parts[i], 1)));
    }
}

// A square of 16 × 16 pairs is turned.
static inline void turn(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            x[4 * i + 2 * j] = _mm512_unpacklo_epi64(y[4 * i + j], y[4 * i + j + 2]);
            x[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(y[4 * i + j], y[4 * i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            y[8 * j + i] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0x88);
            y[8 * j + i + 4] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// A tile of a left matrix (`left`) or a right one, in its three parts. Number (i, j), the j-th step of k of row or column
// i, lies at i · next + j · deeper, one of which is 1; there are n rows or columns and k steps, and zeros after those.
static inline __attribute__((always_inline)) void tile(const float *p, int64_t next, int64_t deeper, int left, int64_t n,
                                                       int64_t k, float scale, bf16 *to) {
    const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i lines[3][16], parts[3];
    for (int64_t i = 0; i < 16; i++)
        if (deeper == 1) {  // as a left one has them
            const __mmask16 low = i < n ? first(k) : 0, high = i < n ? first(k - 16) : 0;
            part(numbers(p + i * next, low, scale), numbers(p + i * next + 16, high, scale), parts);
            for (int j = 0; j < 3; j++) lines[j][i] = parts[j];
        } else {  // as a right one has them
            const __mmask16 even = 2 * i < k ? first(n) : 0, odd = 2 * i + 1 < k ? first(n) : 0;
            const float *from = p + 2 * i * deeper;
            part(numbers(from, even, scale), numbers(from + deeper, odd, scale), parts);
            for (int j = 0; j < 3; j++) lines[j][i] = _mm512_permutexvar_epi16(in_turns, parts[j]);
        }
    for (int j = 0; j < 3; j++) {
        if (left != (deeper == 1)) turn(lines[j]);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + j * 2 * TILE + i * 32, lines[j][i]);
    }
}

#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define STEPS(k) (((k) + SIDE - 1) / SIDE)

// 32 rows of a left matrix, or columns of a right one; see `tile`.
static void pack(const float *p, int64_t next, int64_t deeper, int left, int64_t n, int64_t k, float scale, bf16 *to) {
    for (int64_t step = 0; step < STEPS(k); step++)
        for (int64_t half = 0; half < 2; half++) {
            const float *from = p + half * 16 * next + step * SIDE * deeper;
            bf16 *place = to + step * STEP + half * TILE;
            const int64_t wide = n - half * 16, deep = k - step * SIDE;
            const int whole = wide >= 16 && deep >= SIDE;
            if (deeper == 1 && whole) tile(from, next, 1, left, 16, SIDE, scale, place);
            else if (deeper == 1) tile(from, next, 1, left, wide, deep, scale, place);
            else if (whole) tile(from, 1, deeper, left, 16, SIDE, scale, place);
            else tile(from, 1, deeper, left, wide, deep, scale, place);
        }
}

#define FETCH(p) for (int line = 0; line < 16; line++) _mm_prefetch((const char *)(p) + line * 64, _MM_HINT_T0)
#define LEFT(i) _tile_loadd(4, left + (i) * 2 * TILE, 64); _tile_loadd(5, left + (i) * 2 * TILE + TILE, 64)
#define RIGHT(i) _tile_loadd(6, right + (i) * 2 * TILE, 64); _tile_loadd(7, right + (i) * 2 * TILE + TILE, 64)
#define MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
// Compilers do not know what tiles read and write.
#define SETTLED __asm__ volatile("" ::: "memory")

// 32 × 32 results.
static inline void whole_square(const bf16 *left, const bf16 *right, int64_t steps, float *c, int64_t width) {
    SETTLED;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, left += STEP, right += STEP) {
        // Small products first, in an order in which every other one has to fetch half of its tiles only.
        LEFT(2); RIGHT(0); MULTIPLY;
        FETCH(left + STEP); FETCH(left + STEP + TILE);
        LEFT(1); MULTIPLY;
        FETCH(left + STEP + 2 * TILE); FETCH(left + STEP + 3 * TILE);
        RIGHT(1); MULTIPLY;
        FETCH(left + STEP + 4 * TILE); FETCH(left + STEP + 5 * TILE);
        LEFT(0); MULTIPLY;
        FETCH(right + STEP); FETCH(right + STEP + TILE);
        RIGHT(2); MULTIPLY;
        FETCH(right + STEP + 2 * TILE); FETCH(right + STEP + 3 * TILE);
        RIGHT(0); MULTIPLY;
        FETCH(right + STEP + 4 * TILE); FETCH(right + STEP + 5 * TILE);
    }
    _tile_stored(0, c, width * 4);
    _tile_stored(1, c + 16, width * 4);
    _tile_stored(2, c + 16 * width, width * 4);
    _tile_stored(3, c + 16 * width + 16, width * 4);
    SETTLED;
}

// m × n of them, or what is there and they.
static inline void square(const bf16 *left, const bf16 *right, int64_t steps, float *c, int64_t width, int add,
                          int64_t m, int64_t n) {
    if (!add && m >= SIDE && n >= SIDE) {
        whole_square(left, right, steps, c, width);
        return;
    }
    float found[SIDE][SIDE] __attribute__((aligned(64)));
    whole_square(left, right, steps, *found, SIDE);
    for (int64_t i = 0; i < LEAST(m, SIDE); i++, c += width)
        for (int64_t j = 0; j < LEAST(n, SIDE); j += 16) {
            const __mmask16 there = first(n - j);
            const __m512 before = _mm512_maskz_loadu_ps(add ? there : 0, c + j);
            _mm512_mask_storeu_ps(c + j, there, _mm512_add_ps(before, _mm512_load_ps(found[i] + j)));
        }
}

struct right {
    const float *numbers;  // (k n), number (i, j) at i · row + j · column, one of which is 1
    float *c;              // (m n), number (i, j) at i · width + j
    int64_t n, row, column, width, add;
    float scale;
};

// On its way from memory: one of `of` parts of k numbers of 32 columns.
static inline void fetch_part(const float *p, int64_t row, int64_t column, int64_t k, int64_t one, int64_t of) {
    if (row == 1) {
        for (int64_t j = SIDE * one / of; j < SIDE * (one + 1) / of; j++)
            for (int64_t i = 0; i < k; i += 16) _mm_prefetch((const char *)(p + i + j * column), _MM_HINT_T1);
    } else {
        for (int64_t i = k * one / of; i < k * (one + 1) / of; i++)
            for (int64_t j = 0; j < SIDE; j += 16) _mm_prefetch((const char *)(p + i * row + j), _MM_HINT_T1);
    }
}

#define HIGHEST(m) LEAST(STEPS(m), HIGH)
#define DEEPEST(k) LEAST(STEPS(k), DEEP)

// How many numbers of bf16 `tiles_products` needs room for.
int64_t tiles_room(int64_t m, int64_t k, int64_t threads) { return (HIGHEST(m) + threads) * DEEPEST(k) * STEP; }

// For every right matrix: c, + c with `add`, = scale · left (m k) · right. Number (i, j) of the left one lies at
// i · row + j · column, one of which is 1.
void tiles_products(const float *left, const struct right *rights, bf16 *room, int64_t m, int64_t k, int64_t row,
                    int64_t column, int64_t count, int64_t threads) {
    const int64_t blocks = STEPS(m), steps = STEPS(k);
    const int64_t rounds = (steps + DEEP - 1) / DEEP, deep = (steps + rounds - 1) / rounds;  // all alike, or nearly
    int64_t panels = 0;
    for (int64_t i = 0; i < count; i++) panels += STEPS(rights[i].n);
    // Where there are more threads than panels, several make the same one, each for a part of the rows.
    const int64_t shares = LEAST((threads + panels - 1) / panels, HIGHEST(m));
    _Pragma("omp parallel num_threads(threads)") {
        bf16 *panel = room + (HIGHEST(m) + THREAD) * DEEPEST(k) * STEP;
        use_tiles();
        for (int64_t top = 0; top < blocks; top += HIGH)
            for (int64_t at = 0; at < steps; at += deep) {
                const int64_t now = LEAST(deep, steps - at), from = at * SIDE, numbers = LEAST(k - from, now * SIDE);
                const int64_t high = LEAST(HIGH, blocks - top);
                _Pragma("omp for")
                for (int64_t b = 0; b < high; b++)
                    pack(left + (top + b) * SIDE * row + from * column, row, column, 1, m - (top + b) * SIDE, numbers, 1.0f,
                         room + b * now * STEP);
                _Pragma("omp for")
                for (int64_t share = 0; share < panels * shares; share++) {
                    const struct right *r = rights;
                    int64_t j = share / shares * SIDE;
                    for (; j >= r->n; r++) j -= STEPS(r->n) * SIDE;
                    const float *these = r->numbers + j * r->column + from * r->row;
                    pack(these, r->column, r->row, 0, r->n - j, numbers, r->scale, panel);
                    for (int64_t b = high * (share % shares) / shares; b < high * (share % shares + 1) / shares; b++) {
                        if (j + SIDE < r->n) fetch_part(these + SIDE * r->column, r->row, r->column, numbers, b, high);
                        const int64_t i = (top + b) * SIDE;
                        square(room + b * now * STEP, panel, now, r->c + i * r->width + j, r->width, r->add || at, m - i,
                               r->n - j);
                    }
                }
            }
        _tile_release();
    }
}

#else

int64_t tiles_ready(void) { return 0; }
int64_t tiles_room(void) { return 0; }
void tiles_products(void) {}

#endif

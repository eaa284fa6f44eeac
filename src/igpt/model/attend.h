/* What attend.c and attend_sparse.c share: one head's queries, keys and values as float32 rows, and matrix products. */
#ifdef __AVX512F__
#define W 16
#else
#define W 8
#endif
#include "vector.h"

enum {
    SHORT = 128, /* positions: up to these, Q is one vector */
    VECTORS = 2, /* beyond, Q is these */
    LEAST = -60, /* e^LEAST is nothing beside 1 */
};
typedef struct {
    const float *at;
    long row, column; /* steps */
} Matrix;
typedef struct {
    long t, n_head, depth, half; /* half: bfloat16 */
    long width, queries, rows, wide; /* C; Q; T and D rounded up */
    float scale;
} Shape;

static Shape shaped(long t, long n_head, long depth, long half) {
    long q = t <= SHORT ? W : VECTORS * W, rows = (t + q - 1) / q * q, wide = (depth + W - 1) / W * W;
    return (Shape){t, n_head, depth, half, n_head * depth, q, rows, wide, 1.0f / sqrtf((float)depth)};
}

/* `rows` rows and `vecs` vectors of C = or += A B, held in registers; both counts are constants where it is called. */
static inline __attribute__((always_inline)) void tile(
    int rows, int vecs, long inner, Matrix a, const float *b, long b_row, float *c, long c_row, int add) {
    vec sums[16][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) sums[i][j] = add ? load(c + i * c_row + j * W) : (vec){0};
    for (long k = 0; k < inner; k++) {
        vec from[4];
        for (int j = 0; j < vecs; j++) from[j] = load(b + k * b_row + j * W);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vecs; j++) sums[i][j] += a.at[i * a.row + k * a.column] * from[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) store(c + i * c_row + j * W, sums[i][j]);
}

/* C (m, n) = or += A (m, inner) B (inner, n): m and n multiples of W. */
static void product(long m, long n, long inner, Matrix a, const float *b, long b_row, float *c, long c_row, int add) {
    long j = 0;
#define COLUMNS(rows, vecs)                                                                            \
    for (; j + (vecs) * W <= n; j += (vecs) * W)                                                       \
        for (long i = 0; i < m; i += (rows))                                                           \
            tile(rows, vecs, inner, (Matrix){a.at + i * a.row, a.row, a.column}, b + j, b_row, c + i * c_row + j, c_row, add);
#if W == 16 /* 32 registers */
    COLUMNS(4, 4)
    COLUMNS(8, 2)
    COLUMNS(16, 1)
#else
    COLUMNS(4, 2)
    COLUMNS(8, 1)
#endif
}

static inline float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t narrowed(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One row of a head, its D numbers at `first`, -> float32 times `scale`. */
static inline void gather_row(const Shape *z, const void *from, long first, float scale, float *to) {
    if (z->half)
        for (long d = 0; d < z->depth; d++) to[d] = scale * widened(((const uint16_t *)from)[first + d]);
    else
        for (long d = 0; d < z->depth; d++) to[d] = scale * ((const float *)from)[first + d];
}

/* The other way. */
static inline void scatter_row(const Shape *z, const float *from, void *to, long first) {
    if (z->half)
        for (long d = 0; d < z->depth; d++) ((uint16_t *)to)[first + d] = narrowed(from[d]);
    else
        for (long d = 0; d < z->depth; d++) ((float *)to)[first + d] = from[d];
}

/* (T, D) of one head, its rows `step` numbers apart, -> float32 (T, wide) times `scale`. */
static inline void gather(const Shape *z, const void *from, long first, long step, float scale, float *to) {
    for (long i = 0; i < z->t; i++) gather_row(z, from, first + i * step, scale, to + i * z->wide);
}

/* The other way, of `count` rows. */
static inline void scatter(const Shape *z, const float *from, long count, void *to, long first, long step) {
    for (long i = 0; i < count; i++) scatter_row(z, from + i * z->wide, to, first + i * step);
}

/* Q rows of `wide` -> (D, Q), and back. */
static void turn(const Shape *z, const float *from, float *to) {
    for (long d = 0; d < z->depth; d++)
        for (long i = 0; i < z->queries; i++) to[d * z->queries + i] = from[i * z->wide + d];
}

static void turn_back(const Shape *z, const float *from, float *to) {
    for (long i = 0; i < z->queries; i++)
        for (long d = 0; d < z->depth; d++) to[i * z->wide + d] = from[d * z->queries + i];
}

/* e^x for x that is not above 0 but for rounding; not a number where x is none or infinite. */
static inline vec share(vec x) { return exponential(most(x, all(LEAST))) + (x - x); }

/* Natural logarithm, one lane after the other. */
static inline vec logarithm(vec x) {
    for (int i = 0; i < W; i++) x[i] = logf(x[i]);
    return x;
}

static inline long first_of(const Shape *z, long n, long numbers) { /* head n = image H + head, `numbers` a position */
    return n / z->n_head * z->t * numbers + n % z->n_head * z->depth;
}


/* Softmax attention of a whole sequence, forward and backward, for float32 or bfloat16 on a CPU: c_attn's output is read
 * and its gradient written where they lie, sums are float32, and of the scores nothing is kept but the logarithm of each
 * row's sum.
 *
 * B images, T positions, H heads, D their size, C = H D. qkv is (B, T, 3, H, D), out (B, T, H, D), lse (B, H, T). A
 * thread takes one head of one image at a time, as float32 in its own `room`, where T and D are rounded up to whole
 * vectors; it takes ROWS queries at a time against all keys that they see. `native_attention.py` calls this. The backward
 * pass follows Dao et al. 2022, "FlashAttention", appendix B.
 */
#ifdef __AVX512F__
#define W 16
#else
#define W 8
#endif
#include "vector.h"

enum { ROWS = 16, LEAST = -87 }; /* e^LEAST is nothing beside 1 */
typedef struct {
    const float *at;
    long row, column; /* steps */
} Matrix;
typedef struct {
    long batch, t, n_head, depth, causal, half; /* half: bfloat16 */
    long width, rows, wide, stride; /* C; T and D rounded up; between rows of scores, not a power of two */
    float scale;
} Shape;

static Shape shaped(long batch, long t, long n_head, long depth, long causal, long half) {
    long rows = (t + ROWS - 1) / ROWS * ROWS, wide = (depth + W - 1) / W * W;
    float scale = 1.0f / sqrtf((float)depth);
    return (Shape){batch, t, n_head, depth, causal, half, n_head * depth, rows, wide, rows + W, scale};
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

/* C (m, n) = or += A (m, inner) B (inner, n): m a multiple of ROWS, n of W. */
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

/* (T, D) of one head, its rows `step` numbers apart, -> float32 (T, wide) times `scale`. */
static void gather(const Shape *z, const void *from, long first, long step, float scale, float *to) {
    for (long i = 0; i < z->t; i++, to += z->wide, first += step)
        if (z->half)
            for (long d = 0; d < z->depth; d++) to[d] = scale * widened(((const uint16_t *)from)[first + d]);
        else
            for (long d = 0; d < z->depth; d++) to[d] = scale * ((const float *)from)[first + d];
}

/* The other way, of `count` rows. */
static void scatter(const Shape *z, const float *from, long count, void *to, long first, long step) {
    for (long i = 0; i < count; i++, from += z->wide, first += step)
        if (z->half)
            for (long d = 0; d < z->depth; d++) ((uint16_t *)to)[first + d] = narrowed(from[d]);
        else
            for (long d = 0; d < z->depth; d++) ((float *)to)[first + d] = from[d];
}

/* (rows, wide) -> (D, stride) */
static void transpose(const Shape *z, const float *from, float *to) {
    for (long i = 0; i < z->rows; i += ROWS)
        for (long d = 0; d < z->depth; d++)
            for (long j = i; j < i + ROWS; j++) to[d * z->stride + j] = from[j * z->wide + d];
}

static inline float largest(vec x) {
    float lanes[W];
    store(lanes, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i + n] > lanes[i] ? lanes[i + n] : lanes[i];
    return lanes[0];
}

static inline float sum(vec x) {
    float lanes[W];
    store(lanes, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

/* x where position j + lane is among the first `seen`, else `other`. */
static inline vec kept(vec x, long j, long seen, float other) {
    ivec lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    ivec in = lane < (int)(seen - j) - (ivec){0};
    return (vec)(((ivec)x & in) | ((ivec)all(other) & ~in));
}

/* e^x for x <= 0, not a number where x is not. */
static inline vec share(vec x) { return exponential(most(x, all(LEAST))) + (x - x); }

/* One row of `end` scores, of which the first `seen` count -> e^(s - its largest), and its sum; returns the largest. */
static inline float weighed(float *row, long seen, long end, float *total) {
    long whole = seen / W * W;
    vec top = all(-INFINITY), sums = {0};
    for (long j = 0; j < whole; j += W) top = most(top, load(row + j));
    if (whole < seen) top = most(top, kept(load(row + whole), whole, seen, -INFINITY));
    float best = largest(top);
    for (long j = 0; j < whole; j += W) {
        vec p = share(load(row + j) - best);
        store(row + j, p);
        sums += p;
    }
    for (long j = whole; j < end; j += W) {
        vec p = kept(share(load(row + j) - best), j, seen, 0);
        store(row + j, p);
        sums += p;
    }
    *total = sum(sums);
    return best;
}

/* Of one row: scores -> p = e^(s - lse), and dp -> p (dp - along). */
static inline void weighed_back(float *row, float *d_row, long seen, long end, float lse, float along) {
    long whole = seen / W * W;
    for (long j = 0; j < whole; j += W) {
        vec p = share(load(row + j) - lse);
        store(row + j, p);
        store(d_row + j, p * (load(d_row + j) - along));
    }
    for (long j = whole; j < end; j += W) {
        vec p = kept(share(load(row + j) - lse), j, seen, 0);
        store(row + j, p);
        store(d_row + j, kept(p * (load(d_row + j) - along), j, seen, 0));
    }
}

static inline long first_of(const Shape *z, long n, long numbers) { /* head n = image H + head, `numbers` a position */
    return n / z->n_head * z->t * numbers + n % z->n_head * z->depth;
}

/* Floats of room that each thread needs. */
long igpt_attend_room(long t, long depth, long backward) {
    Shape z = shaped(1, t, 1, depth, 0, 0);
    long forward = 3 * z.rows * z.wide + z.depth * z.stride + ROWS * (z.stride + z.wide);
    return forward + (backward ? 4 * z.rows * z.wide + z.depth * z.stride + ROWS * z.stride : 0);
}

void igpt_attend(long batch, long t, long n_head, long depth, long causal, long half, long threads, const void *qkv,
                 void *out, float *lse, float *room) {
    Shape z = shaped(batch, t, n_head, depth, causal, half);
    long size = z.rows * z.wide, each = igpt_attend_room(t, depth, 0);
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size, *o = v + size;
        float *keys = o + ROWS * z.wide, *s = keys + depth * z.stride;
        memset(q, 0, each * sizeof(float)); /* what is rounded up stays zero */
#pragma omp for schedule(static)
        for (long n = 0; n < batch * n_head; n++) {
            long first = first_of(&z, n, 3 * z.width);
            gather(&z, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            transpose(&z, k, keys);
            for (long i = 0; i < t; i += ROWS) {
                long end = causal ? i + ROWS : z.rows, count = t - i < ROWS ? t - i : ROWS;
                product(ROWS, end, depth, (Matrix){q + i * z.wide, z.wide, 1}, keys, z.stride, s, z.stride, 0);
                float total[ROWS];
                for (long r = 0; r < count; r++) {
                    float best = weighed(s + r * z.stride, causal ? i + r + 1 : t, end, total + r);
                    lse[n * t + i + r] = best + logf(total[r]);
                }
                product(ROWS, z.wide, end, (Matrix){s, z.stride, 1}, v, z.wide, o, z.wide, 0);
                for (long r = 0; r < count; r++)
                    for (long d = 0; d < z.wide; d++) o[r * z.wide + d] /= total[r];
                scatter(&z, o, count, out, first_of(&z, n, z.width) + i * z.width, z.width);
            }
        }
    }
}

/* d_qkv of d_out, given what `igpt_attend` found. */
void igpt_attend_backward(long batch, long t, long n_head, long depth, long causal, long half, long threads,
                          const void *qkv, const void *out, const float *lse, const void *d_out, void *d_qkv,
                          float *room) {
    Shape z = shaped(batch, t, n_head, depth, causal, half);
    long size = z.rows * z.wide, each = igpt_attend_room(t, depth, 1);
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size, *o = v + size, *g = o + size;
        float *dk = g + size, *dv = dk + size, *dq = dv + size;
        float *keys = dq + ROWS * z.wide, *values = keys + depth * z.stride;
        float *s = values + depth * z.stride, *ds = s + ROWS * z.stride;
        memset(q, 0, each * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < batch * n_head; n++) {
            long first = first_of(&z, n, 3 * z.width), own = first_of(&z, n, z.width);
            gather(&z, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            gather(&z, out, own, z.width, 1, o);
            gather(&z, d_out, own, z.width, 1, g);
            transpose(&z, k, keys);
            transpose(&z, v, values);
            memset(dk, 0, 2 * size * sizeof(float));
            for (long i = 0; i < t; i += ROWS) {
                long end = causal ? i + ROWS : z.rows, count = t - i < ROWS ? t - i : ROWS;
                Matrix queries = {q + i * z.wide, z.wide, 1}, along = {g + i * z.wide, z.wide, 1};
                product(ROWS, end, depth, queries, keys, z.stride, s, z.stride, 0);
                product(ROWS, end, depth, along, values, z.stride, ds, z.stride, 0);
                for (long r = 0; r < ROWS; r++) {
                    float *row = s + r * z.stride, *d_row = ds + r * z.stride;
                    vec dots = {0};
                    for (long d = 0; d < z.wide; d += W)
                        dots += load(along.at + r * z.wide + d) * load(o + (i + r) * z.wide + d);
                    long seen = r >= count ? 0 : causal ? i + r + 1 : t;
                    weighed_back(row, d_row, seen, end, r < count ? lse[n * t + i + r] : 0, sum(dots));
                }
                product(ROWS, z.wide, end, (Matrix){ds, z.stride, 1}, k, z.wide, dq, z.wide, 0);
                product(end, z.wide, ROWS, (Matrix){ds, 1, z.stride}, queries.at, z.wide, dk, z.wide, 1);
                product(end, z.wide, ROWS, (Matrix){s, 1, z.stride}, along.at, z.wide, dv, z.wide, 1);
                for (long d = 0; d < ROWS * z.wide; d++) dq[d] *= z.scale;
                scatter(&z, dq, count, d_qkv, first + i * 3 * z.width, 3 * z.width);
            }
            scatter(&z, dk, t, d_qkv, first + z.width, 3 * z.width);
            scatter(&z, dv, t, d_qkv, first + 2 * z.width, 3 * z.width);
        }
    }
}

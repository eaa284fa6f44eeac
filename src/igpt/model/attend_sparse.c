/* Attention as in attend.c through a sparse mask, which `SparseMask.lanes` describes: queries in an order in which
 * neighbours see much the same keys, Q at a time; of each Q the keys that any of them sees, and of each key a bit for
 * every query that sees it. Only these keys are read: they are copied to lie side by side, then all is as in attend.c.
 */
#include "attend.h"

enum { Q = 32 }; /* queries of a block, `BLOCK` in sparse_mask.py */
typedef struct {
    const int32_t *order, *starts, *keys; /* of each query its position, of each block its first entry in `keys` */
    const uint32_t *bits;
    long blocks, most; /* keys of a block, at most, rounded up */
} Mask;

static long rounded(long keys) { return (keys + W - 1) / W * W; }

static Shape shaped_sparse(long t, long n_head, long depth, long half) {
    Shape z = shaped(t, n_head, depth, half);
    z.queries = Q, z.rows = (t + Q - 1) / Q * Q;
    return z;
}

static Mask masked(long t, const int32_t *order, const int32_t *starts, const int32_t *keys, const int32_t *bits) {
    Mask m = {order, starts, keys, (const uint32_t *)bits, (t + Q - 1) / Q, 0};
    for (long b = 0; b < m.blocks; b++) {
        long count = rounded(starts[b + 1] - starts[b]);
        if (count > m.most) m.most = count;
    }
    return m;
}

static long room_for(const Shape *z, long most, long backward) {
    long size = z->rows * z->wide, block = Q * z->wide, side = most * z->wide, scores = Q * most;
    return backward ? 7 * size + 4 * block + 3 * side + 2 * scores : 3 * size + 3 * block + 2 * side + scores;
}

/* Floats of room that each thread needs. */
long igpt_attend_sparse_room(long t, long depth, long backward, const int32_t *starts) {
    Shape z = shaped_sparse(t, 1, depth, 0);
    return room_for(&z, masked(t, 0, starts, 0, 0).most, backward);
}

/* x in the lanes whose bit is set, else `other`. */
static inline vec chosen(vec x, uint32_t bits, float other) {
    ivec lane;
    for (int i = 0; i < W; i++) lane[i] = 1 << i;
    ivec in = ((lane & ((int32_t)bits - (ivec){0})) != 0);
    return (vec)(((ivec)x & in) | ((ivec)all(other) & ~in));
}

/* Rows of the keys side by side, and zeros up to `end`. */
static void pick(const Shape *z, const float *from, const int32_t *keys, long count, long end, float *to) {
    for (long j = 0; j < count; j++)
        for (long d = 0; d < z->wide; d += W) store(to + j * z->wide + d, load(from + keys[j] * z->wide + d));
    memset(to + count * z->wide, 0, (end - count) * z->wide * sizeof(float));
}

static void add_back(const Shape *z, const float *from, const int32_t *keys, long count, float *to) {
    for (long j = 0; j < count; j++) {
        float *row = to + keys[j] * z->wide;
        for (long d = 0; d < z->wide; d += W) store(row + d, load(row + d) + load(from + j * z->wide + d));
    }
}

static void gather_in_order(
    const Shape *z, const int32_t *order, const void *from, long first, long step, float scale, float *to) {
    for (long i = 0; i < z->t; i++) gather_row(z, from, first + order[i] * step, scale, to + i * z->wide);
}

void igpt_attend_sparse(long batch, long t, long n_head, long depth, long half, long threads, const int32_t *order,
                        const int32_t *starts, const int32_t *keys, const int32_t *bits, const void *qkv, void *out,
                        float *lse, float *room) {
    const Shape z = shaped_sparse(t, n_head, depth, half);
    const Mask m = masked(t, order, starts, keys, bits);
    const long size = z.rows * z.wide, block = Q * z.wide, side = m.most * z.wide, each = room_for(&z, m.most, 0);
    const long heads = batch * n_head, parts = heads && heads < threads ? threads / heads : 1; /* of a head's queries */
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size;
        float *queries = v + size, *found = queries + block, *o = found + block;
        float *ks = o + block, *vs = ks + side, *s = vs + side;
        memset(q, 0, each * sizeof(float)); /* what is rounded up stays zero */
#pragma omp for schedule(static)
        for (long task = 0; task < heads * parts; task++) {
            long n = task / parts, first = first_of(&z, n, 3 * z.width), own = first_of(&z, n, z.width);
            gather_in_order(&z, order, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            for (long b = task % parts; b < m.blocks; b += parts) {
                long i = b * Q, count = t - i < Q ? t - i : Q, last = starts[b + 1] - starts[b], end = rounded(last);
                const uint32_t *seen = m.bits + starts[b];
                pick(&z, k, keys + starts[b], last, end, ks);
                pick(&z, v, keys + starts[b], last, end, vs);
                turn(&z, q + i * z.wide, queries);
                product(end, Q, depth, (Matrix){ks, z.wide, 1}, queries, Q, s, Q, 0);
                vec totals[Q / W];
                for (long l = 0; l < Q; l += W) {
                    vec best = all(-INFINITY), total = {0};
                    float *column = s + l;
                    for (long j = 0; j < last; j++)
                        best = most(best, chosen(load(column + j * Q), seen[j] >> l, -INFINITY));
                    for (long j = 0; j < last; j++) {
                        vec p = chosen(share(load(column + j * Q) - best), seen[j] >> l, 0);
                        store(column + j * Q, p);
                        total += p;
                    }
                    for (long j = last; j < end; j++) store(column + j * Q, (vec){0});
                    vec sums = best + logarithm(total);
                    for (long r = 0; r < W && l + r < count; r++) lse[n * t + order[i + l + r]] = sums[r];
                    totals[l / W] = total;
                }
                product(z.wide, Q, end, (Matrix){vs, 1, z.wide}, s, Q, found, Q, 0);
                for (long d = 0; d < depth * Q; d += W) store(found + d, load(found + d) / totals[d % Q / W]);
                turn_back(&z, found, o);
                for (long r = 0; r < count; r++)
                    scatter_row(&z, o + r * z.wide, out, own + order[i + r] * z.width);
            }
        }
    }
}

/* d_qkv of d_out, given what `igpt_attend_sparse` found. */
void igpt_attend_sparse_backward(long batch, long t, long n_head, long depth, long half, long threads,
                                 const int32_t *order, const int32_t *starts, const int32_t *keys, const int32_t *bits,
                                 const void *qkv, const void *out, const float *lse, const void *d_out, void *d_qkv,
                                 float *room) {
    const Shape z = shaped_sparse(t, n_head, depth, half);
    const Mask m = masked(t, order, starts, keys, bits);
    const long size = z.rows * z.wide, block = Q * z.wide, side = m.most * z.wide, each = room_for(&z, m.most, 1);
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size, *o = v + size, *g = o + size;
        float *dk = g + size, *dv = dk + size, *queries = dv + size, *along = queries + block;
        float *found = along + block; /* what the queries found, then their gradient */
        float *dq = found + block, *ks = dq + block, *vs = ks + side, *sums_of_keys = vs + side;
        float *s = sums_of_keys + side, *ds = s + Q * m.most;
        memset(q, 0, each * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < batch * n_head; n++) {
            long first = first_of(&z, n, 3 * z.width), own = first_of(&z, n, z.width);
            gather_in_order(&z, order, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            gather_in_order(&z, order, out, own, z.width, 1, o);
            gather_in_order(&z, order, d_out, own, z.width, 1, g);
            memset(dk, 0, 2 * size * sizeof(float));
            for (long b = 0; b < m.blocks; b++) {
                long i = b * Q, count = t - i < Q ? t - i : Q, last = starts[b + 1] - starts[b], end = rounded(last);
                const int32_t *these = keys + starts[b];
                const uint32_t *seen = m.bits + starts[b];
                pick(&z, k, these, last, end, ks);
                pick(&z, v, these, last, end, vs);
                turn(&z, q + i * z.wide, queries);
                turn(&z, g + i * z.wide, along);
                turn(&z, o + i * z.wide, found);
                product(end, Q, depth, (Matrix){ks, z.wide, 1}, queries, Q, s, Q, 0);
                product(end, Q, depth, (Matrix){vs, z.wide, 1}, along, Q, ds, Q, 0);
                for (long l = 0; l < Q; l += W) {
                    vec sums = {0}, dots = {0};
                    for (long r = 0; r < W && l + r < count; r++) sums[r] = lse[n * t + order[i + l + r]];
                    for (long d = 0; d < depth; d++) dots += load(along + d * Q + l) * load(found + d * Q + l);
                    float *column = s + l, *d_column = ds + l;
                    for (long j = 0; j < last; j++) {
                        vec p = share(load(column + j * Q) - sums), dp = p * (load(d_column + j * Q) - dots);
                        store(column + j * Q, chosen(p, seen[j] >> l, 0));
                        store(d_column + j * Q, chosen(dp, seen[j] >> l, 0));
                    }
                    for (long j = last; j < end; j++) store(column + j * Q, (vec){0}), store(d_column + j * Q, (vec){0});
                }
                product(z.wide, Q, end, (Matrix){ks, 1, z.wide}, ds, Q, found, Q, 0);
                for (long d = 0; d < depth * Q; d++) found[d] *= z.scale;
                turn_back(&z, found, dq);
                for (long r = 0; r < count; r++)
                    scatter_row(&z, dq + r * z.wide, d_qkv, first + order[i + r] * 3 * z.width);
                product(end, z.wide, count, (Matrix){ds, Q, 1}, q + i * z.wide, z.wide, sums_of_keys, z.wide, 0);
                add_back(&z, sums_of_keys, these, last, dk);
                product(end, z.wide, count, (Matrix){s, Q, 1}, g + i * z.wide, z.wide, sums_of_keys, z.wide, 0);
                add_back(&z, sums_of_keys, these, last, dv);
            }
            scatter(&z, dk, t, d_qkv, first + z.width, 3 * z.width);
            scatter(&z, dv, t, d_qkv, first + 2 * z.width, 3 * z.width);
        }
    }
}

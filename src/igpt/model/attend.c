/* Softmax attention of a whole sequence, forward and backward, for float32 or bfloat16 on a CPU: c_attn's output is read
 * and its gradient written where they lie, sums are float32, and of the scores nothing is kept but the logarithm of each
 * query's sum.
 *
 * B images, T positions, H heads, D their size, C = H D. qkv is (B, T, 3, H, D), out (B, T, H, D), lse (B, H, T). A
 * thread takes one head of one image at a time, as float32 in its own `room`, where T and D are rounded up to whole
 * vectors. It takes Q queries at a time against all keys that they see, each query a lane, so that what concerns a query
 * (its largest score, its sum) is found lane by lane. `c_attention.py` calls this. The backward pass follows Dao et
 * al. 2022, "FlashAttention", appendix B.
 */
#include "attend.h"

/* x where the lane's query, the first of which is `first`, sees key j, else `other`. */
static inline vec seen(vec x, long first, long j, float other) {
    ivec lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    ivec in = lane >= (int32_t)(j - first) - (ivec){0};
    return (vec)(((ivec)x & in) | ((ivec)all(other) & ~in));
}

/* Floats of room that each thread needs. */
long igpt_attend_room(long t, long depth, long backward) {
    Shape z = shaped(t, 1, depth, 0);
    long size = z.rows * z.wide, block = z.queries * z.wide, scores = z.queries * z.rows;
    return backward ? 7 * size + 4 * block + 2 * scores : 3 * size + 3 * block + scores;
}

void igpt_attend(long batch, long t, long n_head, long depth, long causal, long half, long threads, const void *qkv,
                 void *out, float *lse, float *room) {
    Shape z = shaped(t, n_head, depth, half);
    const long Q = z.queries, size = z.rows * z.wide, block = Q * z.wide, each = igpt_attend_room(t, depth, 0);
    const long heads = batch * n_head, parts = heads && heads < threads ? threads / heads : 1; /* of a head's queries */
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size;
        float *queries = v + size, *found = queries + block, *o = found + block, *s = o + block;
        memset(q, 0, each * sizeof(float)); /* what is rounded up stays zero */
#pragma omp for schedule(static)
        for (long task = 0; task < heads * parts; task++) {
            long n = task / parts, first = first_of(&z, n, 3 * z.width);
            gather(&z, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            for (long i = task % parts * Q; i < t; i += parts * Q) {
                long end = causal ? i + Q : z.rows, last = causal ? i + Q : t, count = t - i < Q ? t - i : Q;
                turn(&z, q + i * z.wide, queries);
                product(end, Q, depth, (Matrix){k, z.wide, 1}, queries, Q, s, Q, 0);
                vec totals[VECTORS];
                for (long l = 0; l < Q; l += W) {
                    vec best = all(-INFINITY), total = {0};
                    long common = causal ? i + l : t; /* keys that all of these queries see */
                    float *column = s + l;
                    for (long j = 0; j < common; j++) best = most(best, load(column + j * Q));
                    for (long j = common; j < last; j++)
                        best = most(best, seen(load(column + j * Q), i + l, j, -INFINITY));
                    for (long j = 0; j < last; j++) {
                        vec p = share(load(column + j * Q) - best);
                        if (j >= common) p = seen(p, i + l, j, 0);
                        store(column + j * Q, p);
                        total += p;
                    }
                    for (long j = last; j < end; j++) store(column + j * Q, (vec){0});
                    vec sums = best + logarithm(total);
                    for (long r = 0; r < W && l + r < count; r++) lse[n * t + i + l + r] = sums[r];
                    totals[l / W] = total;
                }
                product(z.wide, Q, end, (Matrix){v, 1, z.wide}, s, Q, found, Q, 0);
                for (long d = 0; d < depth * Q; d += W) store(found + d, load(found + d) / totals[d % Q / W]);
                turn_back(&z, found, o);
                scatter(&z, o, count, out, first_of(&z, n, z.width) + i * z.width, z.width);
            }
        }
    }
}

/* d_qkv of d_out, given what `igpt_attend` found. */
void igpt_attend_backward(long batch, long t, long n_head, long depth, long causal, long half, long threads,
                          const void *qkv, const void *out, const float *lse, const void *d_out, void *d_qkv,
                          float *room) {
    Shape z = shaped(t, n_head, depth, half);
    const long Q = z.queries, size = z.rows * z.wide, block = Q * z.wide, each = igpt_attend_room(t, depth, 1);
#pragma omp parallel num_threads(threads)
    {
        float *q = room + omp_get_thread_num() * each, *k = q + size, *v = k + size, *o = v + size, *g = o + size;
        float *dk = g + size, *dv = dk + size, *queries = dv + size, *along = queries + block;
        float *found = along + block; /* what the queries found, then their gradient */
        float *dq = found + block, *s = dq + block, *ds = s + Q * z.rows;
        memset(q, 0, each * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < batch * n_head; n++) {
            long first = first_of(&z, n, 3 * z.width), own = first_of(&z, n, z.width);
            gather(&z, qkv, first, 3 * z.width, z.scale, q);
            gather(&z, qkv, first + z.width, 3 * z.width, 1, k);
            gather(&z, qkv, first + 2 * z.width, 3 * z.width, 1, v);
            gather(&z, out, own, z.width, 1, o);
            gather(&z, d_out, own, z.width, 1, g);
            memset(dk, 0, 2 * size * sizeof(float));
            for (long i = 0; i < t; i += Q) {
                long end = causal ? i + Q : z.rows, last = causal ? i + Q : t, count = t - i < Q ? t - i : Q;
                turn(&z, q + i * z.wide, queries);
                turn(&z, g + i * z.wide, along);
                turn(&z, o + i * z.wide, found);
                product(end, Q, depth, (Matrix){k, z.wide, 1}, queries, Q, s, Q, 0);
                product(end, Q, depth, (Matrix){v, z.wide, 1}, along, Q, ds, Q, 0);
                for (long l = 0; l < Q; l += W) {
                    long common = causal ? i + l : t;
                    vec sums = {0}, dots = {0};
                    for (long r = 0; r < W && l + r < count; r++) sums[r] = lse[n * t + i + l + r];
                    for (long d = 0; d < depth; d++) dots += load(along + d * Q + l) * load(found + d * Q + l);
                    float *column = s + l, *d_column = ds + l;
                    for (long j = 0; j < last; j++) {
                        vec p = share(load(column + j * Q) - sums), dp = p * (load(d_column + j * Q) - dots);
                        if (j >= common) p = seen(p, i + l, j, 0), dp = seen(dp, i + l, j, 0);
                        store(column + j * Q, p);
                        store(d_column + j * Q, dp);
                    }
                    for (long j = last; j < end; j++) store(column + j * Q, (vec){0}), store(d_column + j * Q, (vec){0});
                }
                product(z.wide, Q, end, (Matrix){k, 1, z.wide}, ds, Q, found, Q, 0);
                product(end, z.wide, count, (Matrix){ds, Q, 1}, q + i * z.wide, z.wide, dk, z.wide, 1);
                product(end, z.wide, count, (Matrix){s, Q, 1}, g + i * z.wide, z.wide, dv, z.wide, 1);
                for (long d = 0; d < depth * Q; d++) found[d] *= z.scale;
                turn_back(&z, found, dq);
                scatter(&z, dq, count, d_qkv, first + i * 3 * z.width, 3 * z.width);
            }
            scatter(&z, dk, t, d_qkv, first + z.width, 3 * z.width);
            scatter(&z, dv, t, d_qkv, first + 2 * z.width, 3 * z.width);
        }
    }
}

/* One more token for a batch of images: `GPT.step` for float32 weights on a CPU, written to read every weight and
 * every cached key and value once, as they lie in memory, and to do nothing else for long.
 *
 * B images, C width, H heads, D = C / H, V colours, L blocks; D is a multiple of 8. Weights are those of the network,
 * (out, in) row by row. Activations are (B, C). A layer's keys are (B, H, S / 8, D, 8), so that eight positions lie in
 * one vector; its values are (B, H, S, D). `c_library.py` compiles and loads this, `decode.py` calls it.
 */
#define W 8
#include "vector.h"

enum { ROWS = 4, IMAGES = 4, BLOCKS = 4, SPAN = 8, AHEAD = 512 };
typedef enum { SET, ADD } Then;

/* Asks for what will be read soon; rows are too short for the CPU to guess it. Past an end it does nothing. */
static inline void soon(const float *p) { __builtin_prefetch(p, 0, 2); }

#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Half as many lanes of each, side by side: of single ones, of pairs, of fours. */
static inline vec ones(vec a, vec b) {
    return MIX(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
static inline vec twos(vec a, vec b) {
    return MIX(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
static inline vec fours(vec a, vec b) {
    return MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

static inline float sum(vec x) {
    x = fours(twos(ones(x, x), x), x);
    return x[0];
}

/* A rows x images piece of y (B, n_out) = x (B, n_in) W', set or added. Both counts are constants where it is called.
 * `ahead`: asks for the next rows, once for all images. */
static inline __attribute__((always_inline)) void piece(
    int rows, int images, int ahead, const float *x, const float *weight, float *y, long n_in, long n_out, Then then) {
    vec sums[ROWS][IMAGES] = {{{0}}};
    for (long i = 0; i < n_in; i += W) {
        vec from[IMAGES];
        for (int b = 0; b < images; b++) from[b] = load(x + b * n_in + i);
        for (int o = 0; o < rows; o++) {
            vec w = load(weight + o * n_in + i);
            if (ahead) soon(weight + (o + rows) * n_in + i);
            for (int b = 0; b < images; b++) sums[o][b] += w * from[b];
        }
    }
    for (int b = 0; b < images; b += 2) { /* eight sums of eight lanes at once */
        vec two[2];
        for (int i = 0; i < 2; i++)
            two[i] = twos(ones(sums[0][b + i], sums[1][b + i]), ones(sums[2][b + i], sums[3][b + i]));
        vec found = fours(two[0], two[1]);
        for (int i = 0; i < 2 && b + i < images; i++)
            for (int o = 0; o < rows; o++) {
                float *to = y + (b + i) * n_out + o, s = found[4 * i + o];
                *to = then == ADD ? *to + s : s;
            }
    }
}

static inline __attribute__((always_inline)) void pieces(
    int rows, int batch, const float *x, const float *weight, float *y, long n_in, long n_out, Then then) {
    int b = 0;
    if (batch >= IMAGES) {
        piece(rows, IMAGES, 1, x, weight, y, n_in, n_out, then);
        b = IMAGES;
    }
    for (; b + IMAGES <= batch; b += IMAGES)
        piece(rows, IMAGES, 0, x + b * n_in, weight, y + b * n_out, n_in, n_out, then);
    x += b * n_in, y += b * n_out;
    if (batch - b == 3) piece(rows, 3, 1, x, weight, y, n_in, n_out, then);
    if (batch - b == 2) piece(rows, 2, 1, x, weight, y, n_in, n_out, then);
    if (batch - b == 1) piece(rows, 1, 1, x, weight, y, n_in, n_out, then);
}

/* y (B, n_out) = x (B, n_in) W' of all images, the rows of W shared out among the threads. */
static inline __attribute__((always_inline)) void product(
    int batch, const float *x, const float *weight, float *y, long n_in, long n_out, Then then) {
    long whole = n_out / ROWS * ROWS;
#pragma omp for schedule(static) nowait
    for (long o = 0; o < whole; o += ROWS)
        pieces(ROWS, batch, x, weight + o * n_in, y + o, n_in, n_out, then);
#pragma omp for schedule(static)
    for (long o = whole; o < n_out; o++) pieces(1, batch, x, weight + o * n_in, y + o, n_in, n_out, then);
}

/* y = x / sqrt(mean(x^2) + eps) * g, image by image. */
static inline void norm(int batch, const float *x, const float *g, float *y, long width, float eps) {
#pragma omp for schedule(static)
    for (int b = 0; b < batch; b++) {
        const float *from = x + b * width;
        vec squares = {0};
        for (long i = 0; i < width; i += W) squares += load(from + i) * load(from + i);
        float r = 1.0f / sqrtf(sum(squares) / width + eps);
        for (long i = 0; i < width; i += W) store(y + b * width + i, load(from + i) * r * load(g + i));
    }
}

/* x * sigmoid(1.702 x), in place. */
static inline void quick_gelu(float *x, long count) {
#pragma omp for schedule(static)
    for (long i = 0; i < count; i += W) {
        vec z = most(load(x + i) * -1.702f, all(-87.0f)); /* beyond, the sigmoid is 1 to the last bit */
        store(x + i, load(x + i) / (exponential(-most(-z, all(-87.0f))) + 1.0f));
    }
}

/* Scores of `now + 1` keys, blocks of eight: q . k / sqrt(D). Returns the largest. */
static inline float scored(const float *q, const float *keys, float *scores, long now, long depth) {
    float scale = 1.0f / sqrtf((float)depth);
    vec largest = all(-INFINITY);
    long n_block = now / W + 1;
    for (long first = 0; first < n_block; first += BLOCKS) {
        long many = n_block - first < BLOCKS ? n_block - first : BLOCKS;
        vec dots[BLOCKS] = {{0}};
        const float *block = keys + first * depth * W;
        if (many == BLOCKS) /* four sums that do not wait for one another */
            for (long d = 0; d < depth; d++)
                for (int j = 0; j < BLOCKS; j++) {
                    const float *key = block + (j * depth + d) * W;
                    dots[j] += q[d] * load(key);
                    soon(key + BLOCKS * depth * W);
                }
        else
            for (int j = 0; j < many; j++)
                for (long d = 0; d < depth; d++) dots[j] += q[d] * load(block + (j * depth + d) * W);
        for (int j = 0; j < many; j++) {
            float *to = scores + (first + j) * W;
            store(to, dots[j] * scale);
            for (long i = now + 1 - (first + j) * W; i < W; i++) to[i] = -INFINITY; /* not yet written */
            largest = most(largest, load(to));
        }
    }
    float best = -INFINITY;
    for (int i = 0; i < W; i++) best = largest[i] > best ? largest[i] : best;
    return best;
}

/* Softmax attention of one head of one image over the positions 0 ... now. */
static inline void attend(const float *q, const float *keys, const float *values, float *scores, float *out, long now,
                          long depth) {
    float best = scored(q, keys, scores, now, depth);
    vec total = {0};
    for (long s = 0; s <= now; s += W) {
        vec p = exponential(most(load(scores + s) - best, all(-87.0f)));
        for (long i = now + 1 - s; i < W; i++) p[i] = 0.0f;
        store(scores + s, p);
        total += p;
    }
    float share = 1.0f / sum(total);
    for (long d = 0; d < depth; d += SPAN * W) {
        long many = (depth - d) / W < SPAN ? (depth - d) / W : SPAN;
        vec sums[SPAN] = {{0}};
        const float *row = values + d;
#define OVER_POSITIONS(count)                                     \
    for (long s = 0; s <= now; s++, row += depth)                 \
        for (int j = 0; j < (count); j++) {                       \
            sums[j] += scores[s] * load(row + j * W);             \
            soon(row + j * W + AHEAD);                            \
        }
        if (many == 8) { /* constants, so that the sums stay in registers */
            OVER_POSITIONS(8)
        } else if (many == 4) {
            OVER_POSITIONS(4)
        } else if (many == 2) {
            OVER_POSITIONS(2)
        } else {
            OVER_POSITIONS(many)
        }
        for (int j = 0; j < many; j++) store(out + d + j * W, sums[j] * share);
    }
}

/* weights: ln_1, c_attn, c_proj, ln_2, c_fc, c_proj of each block, then ln_f and the head. caches: keys and values of
 * each. x (B, C): the embedding, overwritten. room: B * 6 C floats and threads * (S + 8). S, the positions a cache has
 * room for, is a multiple of 8. */
void igpt_step(long n_layer, long width, long n_head, long n_vocab, long n_ctx, long batch, long now, long threads,
               float eps, const float *const *weights, float *const *caches, float *x, float *room, float *logits) {
    long depth = width / n_head, per_head = n_ctx * depth;
    float *normed = room, *wide = normed + batch * width, *seen = wide + batch * 4 * width;
    float *scores = seen + batch * width;
#pragma omp parallel num_threads(threads)
    {
        float *own = scores + omp_get_thread_num() * (n_ctx + W);
        for (long layer = 0; layer < n_layer; layer++) {
            const float *const *w = weights + 6 * layer;
            norm(batch, x, w[0], normed, width, eps);
            product(batch, normed, w[1], wide, width, 3 * width, SET);
#pragma omp for schedule(static)
            for (long i = 0; i < batch * n_head; i++) {
                const float *q = wide + i / n_head * 3 * width + i % n_head * depth;
                float *keys = caches[2 * layer] + i * per_head, *values = caches[2 * layer + 1] + i * per_head;
                for (long d = 0; d < depth; d++) keys[(now / W * depth + d) * W + now % W] = q[width + d];
                memcpy(values + now * depth, q + 2 * width, depth * sizeof(float));
                attend(q, keys, values, own, seen + i * depth, now, depth);
            }
            product(batch, seen, w[2], x, width, width, ADD);
            norm(batch, x, w[3], normed, width, eps);
            product(batch, normed, w[4], wide, width, 4 * width, SET);
            quick_gelu(wide, batch * 4 * width);
            product(batch, wide, w[5], x, 4 * width, width, ADD);
        }
        norm(batch, x, weights[6 * n_layer], normed, width, eps);
        product(batch, normed, weights[6 * n_layer + 1], logits, width, n_vocab, SET);
    }
}

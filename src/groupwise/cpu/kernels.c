/* What surrounds the products, in float32, each as one pass over memory or two: see kernels.py.
 *
 * Vectors of eight are written out with the extensions that gcc and clang share; both make of them what the machine
 * has. No flag that lets a compiler assume finite numbers is used: a nan has to come out as one. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
enum { WIDTH = 8, BLOCK = 128 };

#define INLINE static inline __attribute__((always_inline))

INLINE v8 load(const float *from) {
    v8 x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, v8 x) { memcpy(to, &x, sizeof x); }

INLINE v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }

INLINE v8 choose(i8 mask, v8 yes, v8 no) { return (v8)((mask & (i8)yes) | (~mask & (i8)no)); }

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

/* Neighbours added, pairs added, halves added: three of these in a row give the sums of eight vectors as one. */
INLINE v8 ones(v8 a, v8 b) {
    return SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
INLINE v8 twos(v8 a, v8 b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE v8 fours(v8 a, v8 b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE float sum(v8 x) {
    x = ones(x, x);
    x = twos(x, x);
    return x[0] + x[4];
}

/* 2^x for x <= 126, 0 below -126: the power of the nearest integer by its bits, the rest by its series. */
INLINE v8 power_of_two(v8 x) {
    const i8 none = x < all(-126.0f);
    x = choose(none, all(0.0f), x);
    const v8 whole = (x + all(12582912.0f)) - all(12582912.0f);
    const v8 rest = x - whole;
    v8 series = all(1.5252734e-5f);
    series = series * rest + all(1.5403530e-4f);
    series = series * rest + all(1.3333558e-3f);
    series = series * rest + all(9.6181291e-3f);
    series = series * rest + all(5.5504109e-2f);
    series = series * rest + all(2.4022651e-1f);
    series = series * rest + all(6.9314718e-1f);
    series = series * rest + all(1.0f);
    const i8 bits = (__builtin_convertvector(whole, i8) + 127) << 23;
    return choose(none, all(0.0f), series * (v8)bits);
}

/* out = x * factor * weight where factor = 1 / root(mean(x^2) + epsilon), for `heads` times `width` numbers of each row,
 * which lie `stride` apart in `x`; `width` is a multiple of eight. Factors are kept where there is room for them. */
void groupwise_norm(
    const float *x, int64_t stride, int64_t rows, int64_t heads, int64_t width, const float *weight, float epsilon,
    float *out, float *factors
) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++, out += width) {
            const float *from = x + r * stride + h * width;
            v8 squares = all(0.0f);
            for (int64_t i = 0; i < width; i += WIDTH) squares += load(from + i) * load(from + i);
            const float factor = 1.0f / sqrtf(sum(squares) / (float)width + epsilon);
            for (int64_t i = 0; i < width; i += WIDTH) store(out + i, load(from + i) * all(factor) * load(weight + i));
            if (factors) *factors++ = factor;
        }
}

/* Gradients of the above, `[rows, width]`. Those of the weights are summed by blocks of rows, so that a sum of many
 * keeps its digits; `room` has `width` numbers. */
void groupwise_norm_back(
    const float *x, const float *weight, const float *factors, const float *grad, int64_t rows, int64_t width,
    float *of_x, float *of_weight, float *room
) {
    memset(of_weight, 0, width * sizeof(float));
    for (int64_t begin = 0; begin < rows; begin += 64) {
        memset(room, 0, width * sizeof(float));
        for (int64_t r = begin; r < rows && r < begin + 64; r++, x += width, grad += width, of_x += width) {
            const v8 factor = all(factors[r]);
            v8 along = all(0.0f);
            for (int64_t i = 0; i < width; i += WIDTH) {
                const v8 both = load(x + i) * load(grad + i);
                along += both * load(weight + i);
                store(room + i, load(room + i) + both * factor);
            }
            const v8 back = all(sum(along) / (float)width) * factor * factor * factor;
            for (int64_t i = 0; i < width; i += WIDTH)
                store(of_x + i, load(grad + i) * load(weight + i) * factor - load(x + i) * back);
        }
        for (int64_t i = 0; i < width; i += WIDTH) store(of_weight + i, load(of_weight + i) + load(room + i));
    }
}

INLINE v8 logistic(v8 x) {
    v8 power = x * all(-1.44269504f);
    power = choose(power > all(126.0f), all(126.0f), power);
    return all(1.0f) / (all(1.0f) + power_of_two(power));
}

/* out = gate / (1 + exp(-gate)) * up, for rows of `width` numbers, a multiple of eight; rows of gate and up are `stride`
 * apart. `out` may be `gate` where that has no gaps. */
void groupwise_swiglu(const float *gate, const float *up, int64_t stride, int64_t rows, int64_t width, float *out) {
    for (int64_t r = 0; r < rows; r++, gate += stride, up += stride, out += width)
        for (int64_t i = 0; i < width; i += WIDTH) {
            const v8 x = load(gate + i);
            store(out + i, x * logistic(x) * load(up + i));
        }
}

/* Gradients of the above; `count` is a multiple of eight. */
void groupwise_swiglu_back(
    const float *gate, const float *up, const float *grad, int64_t count, float *of_gate, float *of_up
) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const v8 x = load(gate + i), part = logistic(x), back = load(grad + i);
        store(of_up + i, back * x * part);
        store(of_gate + i, back * load(up + i) * part * (all(1.0f) + x * (all(1.0f) - part)));
    }
}

/* Turns the heads of each row, `width` numbers each, a multiple of sixteen; rows of `x` and of `out`, which may be the
 * same, are `stride` and `out_stride` apart, cos and the signed sin are `[rows, width]`. */
void groupwise_rotary(
    const float *x, int64_t stride, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t width,
    float *out, int64_t out_stride
) {
    const int64_t half = width / 2;
    for (int64_t r = 0; r < rows; r++, cos += width, sin += width)
        for (int64_t h = 0; h < heads; h++) {
            const float *from = x + r * stride + h * width;
            float *to = out + r * out_stride + h * width;
            for (int64_t i = 0; i < half; i += WIDTH) {
                const v8 a = load(from + i), b = load(from + half + i);
                store(to + i, a * load(cos + i) + b * load(sin + i));
                store(to + half + i, b * load(cos + half + i) + a * load(sin + half + i));
            }
        }
}

/* Up to eight numbers, the others `rest`. */
INLINE v8 load_some(const float *from, int64_t count, float rest) {
    v8 x = all(rest);
    memcpy(&x, from, count * sizeof(float));
    return x;
}

INLINE float highest_of(v8 x) {
    float highest = x[0];
    for (int64_t i = 1; i < WIDTH; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

/* Scores `[rows, heads, queries, keys]` of a tile, to which a bias is added that is the same for all heads, and whose
 * rows and queries are so many numbers apart (0: one for all). */
typedef struct {
    const float *bias;
    int64_t bias_row, bias_query, rows, heads, queries, keys;
} Tile;

/* scores = exp(scores + bias - top), where top is the largest of a query's, and total the sum of its weights. */
void groupwise_softmax_numerator(float *scores, const Tile *tile, float *top, float *total) {
    const int64_t keys = tile->keys, whole = keys / WIDTH * WIDTH, rest = keys - whole;
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t h = 0; h < tile->heads; h++)
            for (int64_t q = 0; q < tile->queries; q++, scores += keys) {
                const float *bias = tile->bias ? tile->bias + r * tile->bias_row + q * tile->bias_query : 0;
                v8 most = all(-1e30f);  /* where all is hidden weights are 0 */
                for (int64_t j = 0; j < whole; j += WIDTH) {
                    const v8 score = bias ? load(scores + j) + load(bias + j) : load(scores + j);
                    store(scores + j, score);
                    most = choose(score > most, score, most);
                }
                v8 last = load_some(scores + whole, rest, -INFINITY);
                if (bias) last += load_some(bias + whole, rest, 0.0f);
                most = choose(last > most, last, most);
                const float highest = highest_of(most);
                v8 sums = all(0.0f);
                for (int64_t j = 0; j < whole; j += WIDTH) {
                    const v8 weight = power_of_two((load(scores + j) - all(highest)) * all(1.44269504f));
                    store(scores + j, weight);
                    sums += weight;
                }
                last = power_of_two((last - all(highest)) * all(1.44269504f));
                memcpy(scores + whole, &last, rest * sizeof(float));
                *top++ = highest;
                *total++ = sum(sums + last);
            }
}

INLINE void soften_back_some(float *scores, float *change, const float *bias, v8 less, v8 mean, int64_t count) {
    v8 score = load_some(scores, count, -INFINITY);
    if (bias) score += load_some(bias, count, 0.0f);
    score = power_of_two((score - less) * all(1.44269504f));
    const v8 back = (load_some(change, count, 0.0f) - mean) * score;
    memcpy(scores, &score, count * sizeof(float));
    memcpy(change, &back, count * sizeof(float));
}

/* scores = exp(scores + bias - lse), and change = (change - delta) * scores; lse and delta are a query's. */
void groupwise_softmax_numerator_back(float *scores, float *change, const Tile *tile, const float *lse, const float *delta) {
    const int64_t keys = tile->keys, whole = keys / WIDTH * WIDTH;
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t h = 0; h < tile->heads; h++)
            for (int64_t q = 0; q < tile->queries; q++, scores += keys, change += keys) {
                const float *bias = tile->bias ? tile->bias + r * tile->bias_row + q * tile->bias_query : 0;
                const v8 less = all(*lse++), mean = all(*delta++);
                for (int64_t j = 0; j < whole; j += WIDTH)
                    soften_back_some(scores + j, change + j, bias ? bias + j : 0, less, mean, WIDTH);
                soften_back_some(scores + whole, change + whole, bias ? bias + whole : 0, less, mean, keys - whole);
            }
}

/* A store of keys and values, `[entries, kv_heads, length, width]`; row r looks at `first[r]` to `end[r]` of its entry
 * `slot[r]`. Without `slot` that is entry r, without `first` it begins at 0. */
typedef struct {
    const float *key, *value;
    const int64_t *slot, *first, *end;
    int64_t length;
} Part;

INLINE int64_t entry_of(const Part *part, int64_t row) { return part->slot ? part->slot[row] : row; }

/* Scores of eight keys, `step` numbers apart. */
INLINE v8 scores_of(const float *query, const float *key, int64_t step, int64_t width) {
    v8 a[WIDTH];
    for (int64_t t = 0; t < WIDTH; t++) a[t] = all(0.0f);
    for (int64_t i = 0; i < width; i += WIDTH) {
        const v8 q = load(query + i);
        for (int64_t t = 0; t < WIDTH; t++) a[t] += q * load(key + t * step + i);
    }
    return fours(twos(ones(a[0], a[1]), ones(a[2], a[3])), twos(ones(a[4], a[5]), ones(a[6], a[7])));
}

/* A query over at most BLOCK keys, added to what others gave: `out` weighted values, `top` the largest score and
 * `total` the sum of weights. Scores are in units of log 2. */
INLINE void attend_block(
    const float *query, const float *key, const float *value, int64_t keys, int64_t width, float *out, float *top,
    float *total
) {
    float score[BLOCK + WIDTH];  /* the last eight may reach beyond */
    const int64_t whole = keys / WIDTH * WIDTH, padded = (keys + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t j = 0; j < whole; j += WIDTH) store(score + j, scores_of(query, key + j * width, width, width));
    for (int64_t j = whole; j < keys; j++) store(score + j, scores_of(query, key + j * width, 0, width));
    for (int64_t j = keys; j < padded; j++) score[j] = -INFINITY;
    v8 most = all(*top);
    for (int64_t j = 0; j < padded; j += WIDTH) {
        const v8 next = load(score + j);
        most = choose(next > most, next, most);
    }
    const float highest = highest_of(most);
    const float less = highest > *top ? exp2f(*top - highest) : 1.0f;
    v8 weights = all(0.0f);
    for (int64_t j = 0; j < padded; j += WIDTH) {
        const v8 weight = power_of_two(load(score + j) - all(highest));
        store(score + j, weight);
        weights += weight;
    }
    *top = highest;
    *total = *total * less + sum(weights);
    for (int64_t i = 0; i < width; i += 8 * WIDTH) {
        v8 found[8];
        const int64_t many = (width - i) / WIDTH < 8 ? (width - i) / WIDTH : 8;
        for (int64_t k = 0; k < many; k++) found[k] = load(out + i + k * WIDTH) * all(less);
        for (int64_t j = 0; j < keys; j++)
            for (int64_t k = 0; k < many; k++) found[k] += all(score[j]) * load(value + j * width + i + k * WIDTH);
        for (int64_t k = 0; k < many; k++) store(out + i + k * WIDTH, found[k]);
    }
}

/* Rows one after the other that look at the same entry go over a block of its keys together: it is in the cache then. */
INLINE void attend_rows(
    const float *query, int64_t rows, int64_t kv_heads, int64_t shared, int64_t width, const Part *parts, int64_t count,
    float *out, float *state
) {
    const int64_t heads = kv_heads * shared;
    float *top = state, *total = state + rows * heads;
    for (const Part *part = parts; part < parts + count; part++)
        for (int64_t begin = 0, end; begin < rows; begin = end) {
            int64_t longest = 0;
            const int64_t entry = entry_of(part, begin);
            for (end = begin; end < rows && entry_of(part, end) == entry; end++)
                longest = part->end[end] > longest ? part->end[end] : longest;
            for (int64_t h = 0; h < kv_heads; h++)
                for (int64_t block = 0; block < longest; block += BLOCK) {
                    const int64_t start = (entry * kv_heads + h) * part->length;
                    for (int64_t r = begin; r < end; r++) {
                        const int64_t first = part->first && part->first[r] > block ? part->first[r] : block;
                        const int64_t last = part->end[r] < block + BLOCK ? part->end[r] : block + BLOCK;
                        if (first >= last) continue;
                        for (int64_t g = r * heads + h * shared; g < r * heads + (h + 1) * shared; g++)
                            attend_block(
                                query + g * width, part->key + (start + first) * width,
                                part->value + (start + first) * width, last - first, width, out + g * width, top + g,
                                total + g
                            );
                    }
                }
        }
    for (int64_t g = 0; g < rows * heads; g++, out += width)
        for (int64_t i = 0; i < width; i += WIDTH) store(out + i, load(out + i) * all(1.0f / total[g]));
}

/* One token per row. Its key and value, rows of `kv_heads * width` at a distance of `key_stride` and `value_stride`,
 * are put at the end of the last part first; then its queries meet all parts under one softmax. `out` is
 * `[rows, kv_heads * shared * width]`; `room` has as many numbers and two more per row and head. `width` is a multiple
 * of eight. */
void groupwise_attend(
    const float *query, int64_t query_stride, const float *key, int64_t key_stride, const float *value,
    int64_t value_stride, int64_t rows, int64_t kv_heads, int64_t shared, int64_t width, float scale,
    const Part *parts, int64_t count, float *out, float *room
) {
    const int64_t heads = kv_heads * shared;
    const Part *own = parts + count - 1;
    float *scaled = room + 2 * rows * heads;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t place = ((entry_of(own, r) * kv_heads + h) * own->length + own->end[r] - 1) * width;
            memcpy((float *)own->key + place, key + r * key_stride + h * width, width * sizeof(float));
            memcpy((float *)own->value + place, value + r * value_stride + h * width, width * sizeof(float));
        }
        for (int64_t i = 0; i < heads * width; i += WIDTH) {
            store(scaled + r * heads * width + i, load(query + r * query_stride + i) * all(scale * 1.44269504f));
            store(out + r * heads * width + i, all(0.0f));
        }
    }
    for (int64_t g = 0; g < rows * heads; g++) room[g] = -INFINITY, room[rows * heads + g] = 0.0f;
#define WITH(width) attend_rows(scaled, rows, kv_heads, shared, width, parts, count, out, room)
    switch (width) {
    case 32: WITH(32); break;
    case 64: WITH(64); break;
    case 128: WITH(128); break;
    default: WITH(width);
    }
}

"""C++ for a packed step on a CPU: products of few rows, cache writes, attention of few new tokens; with the vectors that the compiler's target has. Stands behind LIBRARY.

``TEMPLATES`` are for any dtype; ``EXPORTS`` are ``product_<dtype>``, ``flat_<dtype>``, ``put_<dtype>`` and ``attend_<dtype>`` for float32, float64, bfloat16 and float16; 16 bits are computed in float. deepseed.inference.native calls them.
"""

TEMPLATES = r"""
#include <algorithm>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int BYTES = 32, REGISTERS = 16;
#else
constexpr int BYTES = 16, REGISTERS = 32;
#endif
constexpr int ROWS = REGISTERS == 32 ? 8 : 4;  // of a tile
constexpr int AHEAD = 8192;                    // bytes that are asked for before they are read

template <class C> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(BYTES))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(BYTES))); };
template <class C> using V = typename Vector<C>::type;
template <class C> constexpr int LANES = BYTES / int(sizeof(C));

template <class C, class S> static inline V<C> load(const S *p) {
    if constexpr (sizeof(S) == sizeof(C)) {
        V<C> v;
        __builtin_memcpy(&v, p, BYTES);
        return v;
    } else {  // 16 bits
        V<C> v;
        if constexpr (std::is_same_v<S, bfloat>) {
            typedef uint16_t narrow __attribute__((vector_size(BYTES / 2)));
            typedef uint32_t wide __attribute__((vector_size(BYTES)));
            narrow n;
            __builtin_memcpy(&n, p, BYTES / 2);
            wide w = __builtin_convertvector(n, wide) << 16;
            __builtin_memcpy(&v, &w, BYTES);
        } else {
            for (int i = 0; i < LANES<C>; ++i) v[i] = up(p[i]);
        }
        return v;
    }
}

template <class C, int N>
static inline C halved(const void *v) {
    if constexpr (N == 1) {
        return *(const C *)v;
    } else {
        typedef C part __attribute__((vector_size(N / 2 * sizeof(C))));
        part low, high;
        __builtin_memcpy(&low, v, sizeof(part));
        __builtin_memcpy(&high, (const char *)v + sizeof(part), sizeof(part));
        low += high;
        return halved<C, N / 2>(&low);
    }
}
template <class C> static inline C sum(V<C> v) { return halved<C, LANES<C>>(&v); }

// y[R, N] = x[R, width] . w[N, width], all sums in registers
template <class C, class S, int R, int N>
static inline void tile(const S *x, const S *w, S *y, int64_t width, int64_t stride) {
    V<C> sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = V<C>{};
    int64_t k = 0;
    for (; k + LANES<C> <= width; k += LANES<C>) {
        V<C> a[N];
        for (int n = 0; n < N; ++n) {
            a[n] = load<C>(w + n * width + k);
            __builtin_prefetch(w + n * width + k + AHEAD / int(sizeof(S)), 0, 3);
        }
        for (int r = 0; r < R; ++r) {
            V<C> b = load<C>(x + r * width + k);
            for (int n = 0; n < N; ++n) sums[r][n] += a[n] * b;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            C total = sum<C>(sums[r][n]);
            for (int64_t i = k; i < width; ++i) total += up(x[r * width + i]) * up(w[n * width + i]);
            y[r * stride + n] = down<S>::of(total);
        }
}

constexpr int columns(int rows) { return std::max(1, std::min(8, (REGISTERS - 2) / (rows + 1))); }

template <class C, class S, int R, int N>
static inline void rows_of(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t stride) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) tile<C, S, R, N>(x + r * width, w, y + r * stride, width, stride);
    if constexpr (R > 1)
        if (r < rows) rows_of<C, S, R / 2, N>(x + r * width, w, y + r * stride, rows - r, width, stride);
}

// outputs begin .. end of one product; the weights of a few outputs stay near while all rows meet them
template <class C, class S, int R>
static void product_of(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int64_t begin, int64_t end) {
    constexpr int N = columns(R);
    int64_t o = begin;
    for (; o + N <= end; o += N) rows_of<C, S, R, N>(x, w + o * width, y + o, rows, width, outputs);
    for (; o < end; ++o) rows_of<C, S, R, 1>(x, w + o * width, y + o, rows, width, outputs);
}

template <class C, class S>
static void product(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1 && outputs * width > (1 << 15))
    for (int t = 0; t < threads; ++t) {
        int64_t begin = outputs * t / threads, end = outputs * (t + 1) / threads;
        if (ROWS == 8 && rows >= 5) product_of<C, S, ROWS>(x, w, y, rows, width, outputs, begin, end);
        else if (rows >= 3) product_of<C, S, 4>(x, w, y, rows, width, outputs, begin, end);
        else if (rows == 2) product_of<C, S, 2>(x, w, y, rows, width, outputs, begin, end);
        else product_of<C, S, 1>(x, w, y, rows, width, outputs, begin, end);
    }
}

// The same with w[width, N] as it lies; N outputs are `V` vectors
template <class C, class S, int R, int N>
static inline void tile_flat(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        V<C> sums[R][N];
        for (int i = 0; i < R; ++i)
            for (int n = 0; n < N; ++n) sums[i][n] = V<C>{};
        for (int64_t k = 0; k < width; ++k) {
            V<C> a[N];
            for (int n = 0; n < N; ++n) {
                a[n] = load<C>(w + k * outputs + n * LANES<C>);
                __builtin_prefetch(w + (k + 16) * outputs + n * LANES<C>, 0, 3);
            }
            for (int i = 0; i < R; ++i) {
                V<C> b = C(up(x[(r + i) * width + k])) - V<C>{};
                for (int n = 0; n < N; ++n) sums[i][n] += a[n] * b;
            }
        }
        for (int i = 0; i < R; ++i)
            for (int n = 0; n < N; ++n)
                for (int j = 0; j < LANES<C>; ++j) y[(r + i) * outputs + n * LANES<C> + j] = down<S>::of(C(sums[i][n][j]));
    }
    if constexpr (R > 1)
        if (r < rows) tile_flat<C, S, R / 2, N>(x + r * width, w, y + r * outputs, rows - r, width, outputs);
}

template <class C, class S>
static void product_flat(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) {
    constexpr int N = 3, WIDE = N * LANES<C>;
    int64_t blocks = outputs / WIDE;
    #pragma omp parallel for num_threads(threads) if (threads > 1 && outputs * width > (1 << 15))
    for (int64_t b = 0; b < blocks; ++b) {
        if (rows >= 5 && ROWS == 8) tile_flat<C, S, ROWS, N>(x, w + b * WIDE, y + b * WIDE, rows, width, outputs);
        else if (rows >= 3) tile_flat<C, S, 4, N>(x, w + b * WIDE, y + b * WIDE, rows, width, outputs);
        else tile_flat<C, S, 2, N>(x, w + b * WIDE, y + b * WIDE, rows, width, outputs);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = blocks * WIDE; o < outputs; ++o) {
            C total = 0;
            for (int64_t k = 0; k < width; ++k) total += C(up(x[r * width + k])) * C(up(w[k * outputs + o]));
            y[r * outputs + o] = down<S>::of(total);
        }
}

template <class S>
static void add_bias(S *y, const S *bias, int64_t rows, int64_t outputs) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outputs; ++o) y[r * outputs + o] = down<S>::of(up(y[r * outputs + o]) + up(bias[o]));
}

template <class S>
static void lay(const S *x, S *y, int64_t tokens, int64_t heads, int64_t width, int64_t by_token, int64_t by_head, int64_t by_element) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t d = 0; d < width; ++d) y[(t * heads + h) * width + d] = x[t * by_token + h * by_head + d * by_element];
}

template <class S>
static void gather(const S *table, const int64_t *ids, S *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(table + ids[r] * width, width, y + r * width);
}

// Sequences of few new tokens, each by itself. `rows`: where its tokens begin; `table`: its pages, `longest` of each sequence.
template <class C, class S>
static void attend(const S *q, const S *keys, const S *values, S *out, const S *sinks, const int64_t *table, const int64_t *lengths, const int64_t *news, const int64_t *rows,
                   int64_t sequences, int64_t longest, int64_t held, int64_t shares, int64_t pages, int64_t size, int64_t width, int64_t value_width,
                   double scale, int64_t window, double softcap, int threads) {
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t h = 0; h < held; ++h) {
            const int64_t *own = table + s * longest;
            const S *heads = keys + h * pages * size * width, *worths = values + h * pages * size * value_width;
            std::vector<C> weights(lengths[s]), sums(value_width), query(width);
            for (int64_t t = 0; t < news[s]; ++t)
                for (int64_t g = 0; g < shares; ++g) {
                    int64_t row = (rows[s] + t) * held * shares + h * shares + g, position = lengths[s] - news[s] + t;
                    int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0, count = position + 1 - first;
                    for (int64_t d = 0; d < width; ++d) query[d] = up(q[row * width + d]);
                    C highest = -std::numeric_limits<C>::infinity(), sink = sinks ? up(sinks[h * shares + g]) : highest;
                    for (int64_t j = 0; j < count; ++j) {
                        int64_t at = first + j;
                        const S *key = heads + (own[at / size] * size + at % size) * width;
                        V<C> parts = V<C>{};
                        int64_t d = 0;
                        for (; d + LANES<C> <= width; d += LANES<C>) parts += load<C>(key + d) * load<C>(query.data() + d);
                        C logit = sum<C>(parts);
                        for (; d < width; ++d) logit += up(key[d]) * query[d];
                        logit = logit * C(scale);
                        if (softcap) logit = std::tanh(logit / C(softcap)) * C(softcap);
                        weights[j] = logit;
                        highest = std::max(highest, logit);
                    }
                    highest = std::max(highest, sink);
                    C total = sinks ? exp_(sink - highest) : C(0), *w = weights.data();
                    #pragma omp simd reduction(+:total)
                    for (int64_t j = 0; j < count; ++j) {
                        w[j] = exp_(w[j] - highest);
                        total += w[j];
                    }
                    C *__restrict made = sums.data();
                    std::fill(sums.begin(), sums.end(), C(0));
                    for (int64_t j = 0; j < count; ++j) {
                        int64_t at = first + j;
                        const S *worth = worths + (own[at / size] * size + at % size) * value_width;
                        C weight = w[j];
                        for (int64_t d = 0; d < value_width; ++d) made[d] += weight * up(worth[d]);
                    }
                    for (int64_t d = 0; d < value_width; ++d) out[row * value_width + d] = down<S>::of(made[d] / total);
                }
        }
}

template <class S>
static void put(const S *x, S *cache, const int64_t *slots, int64_t tokens, int64_t held, int64_t room, int64_t width) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < held; ++h) std::copy_n(x + (t * held + h) * width, width, cache + (h * room + slots[t]) * width);
}
"""

EXPORTS = r"""
#define EACH(S, C, NAME) \
    extern "C" void product_##NAME(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) { product<C, S>(x, w, y, rows, width, outputs, threads); } \
    extern "C" void flat_##NAME(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) { product_flat<C, S>(x, w, y, rows, width, outputs, threads); } \
    extern "C" void put_##NAME(const S *x, S *cache, const int64_t *slots, int64_t tokens, int64_t held, int64_t room, int64_t width) { put<S>(x, cache, slots, tokens, held, room, width); } \
    extern "C" void attend_##NAME(const S *q, const S *keys, const S *values, S *out, const S *sinks, const int64_t *table, const int64_t *lengths, const int64_t *news, const int64_t *rows, \
                                  int64_t sequences, int64_t longest, int64_t held, int64_t shares, int64_t pages, int64_t size, int64_t width, int64_t value_width, \
                                  double scale, int64_t window, double softcap, int threads) { \
        attend<C, S>(q, keys, values, out, sinks, table, lengths, news, rows, sequences, longest, held, shares, pages, size, width, value_width, scale, window, softcap, threads); \
    }
EACH(float, float, float32)
EACH(double, double, float64)
EACH(bfloat, float, bfloat16)
EACH(half, float, float16)
"""

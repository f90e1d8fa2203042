"""C++ for a packed step on a CPU: products of few rows, cache writes, attention of few new tokens; with the vectors that the compiler's target has. Stands behind LIBRARY.

``TEMPLATES`` are for any dtype; ``EXPORTS`` are ``product_<dtype>``, ``flat_<dtype>``, ``put_<dtype>`` and ``attend_<dtype>`` for float32, float64, bfloat16 and float16, and ``int8_<dtype>`` and
``fp8_<dtype>``, products with weights in eight bits that have a scale for each GROUP of an output; 16 bits are computed in float. deepseed.inference.native calls them.

Compilers are told to round each op (EXACT in deepseed.codegen.cpp_files), for a step has others' ops beside; so what adds products up says ``fma_`` itself.
"""

TEMPLATES = r"""
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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

// a * b + c, rounded once where the processor does that
#if defined(__AVX512F__)
static inline V<float> fma_(V<float> a, V<float> b, V<float> c) { return (V<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline V<double> fma_(V<double> a, V<double> b, V<double> c) { return (V<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__AVX__) && defined(__FMA__)
static inline V<float> fma_(V<float> a, V<float> b, V<float> c) { return (V<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline V<double> fma_(V<double> a, V<double> b, V<double> c) { return (V<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
static inline V<float> fma_(V<float> a, V<float> b, V<float> c) { return (V<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline V<double> fma_(V<double> a, V<double> b, V<double> c) { return (V<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
static inline V<float> fma_(V<float> a, V<float> b, V<float> c) { return a * b + c; }
static inline V<double> fma_(V<double> a, V<double> b, V<double> c) { return a * b + c; }
#endif

struct e4m3 { int8_t bits; };
// Sign, exponent and mantissa of an e4m3 lie in a half as they are, whose exponents begin 8 lower: a scale of fp8 is 256 times as large
static inline float up(e4m3 x) { return float(__builtin_bit_cast(_Float16, int16_t((x.bits << 7) & -0x4001))); }

template <class C, class S> static inline V<C> load(const S *p) {
    V<C> v;
    if constexpr (sizeof(S) == 1 && sizeof(C) == 4 && BYTES > 16) {  // what a compiler makes of a conversion of vectors is five times as slow
#if defined(__AVX512F__)
        __m128i n = _mm_loadu_si128((const __m128i *)p);
        if constexpr (std::is_same_v<S, e4m3>) return (V<C>)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(n), 7), _mm256_set1_epi16(-0x4001)));
        else return (V<C>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(n));
#elif defined(__AVX2__) && defined(__F16C__)
        __m128i n = _mm_loadl_epi64((const __m128i *)p);
        if constexpr (std::is_same_v<S, e4m3>) return (V<C>)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(n), 7), _mm_set1_epi16(-0x4001)));
        else return (V<C>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(n));
#endif
    }
    if constexpr (sizeof(S) == 1) {
        for (int i = 0; i < LANES<C>; ++i) v[i] = C(up(p[i]));
        return v;
    } else if constexpr (sizeof(S) == sizeof(C)) {
        __builtin_memcpy(&v, p, BYTES);
        return v;
    } else {  // 16 bits
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

constexpr int GROUP = 32;  // weights in eight bits along the width that have a scale together
static inline int64_t groups_of(int64_t width) { return (width + GROUP - 1) / GROUP; }

// y[R, N] = x[R, width] . w[N, width], all sums in registers; scale[N, groups] of weights in eight bits
template <class C, class S, class W, int R, int N>
static inline void tile(const S *x, const W *w, const C *scale, S *y, int64_t width, int64_t stride) {
    V<C> sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = V<C>{};
    int64_t k = 0;
    for (; k + LANES<C> <= width; k += LANES<C>) {
        V<C> a[N];
        for (int n = 0; n < N; ++n) {
            a[n] = load<C>(w + n * width + k);
            if constexpr (sizeof(W) == 1) a[n] *= scale[n * groups_of(width) + k / GROUP] - V<C>{};
            __builtin_prefetch(w + n * width + k + AHEAD / int(sizeof(W)), 0, 3);
        }
        for (int r = 0; r < R; ++r) {
            V<C> b = load<C>(x + r * width + k);
            for (int n = 0; n < N; ++n) sums[r][n] = fma_(a[n], b, sums[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            C total = sum<C>(sums[r][n]);
            for (int64_t i = k; i < width; ++i) {
                C weight = up(w[n * width + i]);
                if constexpr (sizeof(W) == 1) weight *= scale[n * groups_of(width) + i / GROUP];
                total = fma_(C(up(x[r * width + i])), weight, total);
            }
            y[r * stride + n] = down<S>::of(total);
        }
}

constexpr int columns(int rows) { return std::max(1, std::min(8, (REGISTERS - 2) / (rows + 1))); }

template <class C, class S, class W, int R, int N>
static inline void rows_of(const S *x, const W *w, const C *scale, S *y, int64_t rows, int64_t width, int64_t stride) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) tile<C, S, W, R, N>(x + r * width, w, scale, y + r * stride, width, stride);
    if constexpr (R > 1)
        if (r < rows) rows_of<C, S, W, R / 2, N>(x + r * width, w, scale, y + r * stride, rows - r, width, stride);
}

// outputs begin .. end of one product; the weights of a few outputs stay near while all rows meet them
template <class C, class S, class W, int R>
static void product_of(const S *x, const W *w, const C *scale, S *y, int64_t rows, int64_t width, int64_t outputs, int64_t begin, int64_t end) {
    constexpr int N = columns(R);
    int64_t o = begin;
    for (; o + N <= end; o += N) rows_of<C, S, W, R, N>(x, w + o * width, scale + o * groups_of(width), y + o, rows, width, outputs);
    for (; o < end; ++o) rows_of<C, S, W, R, 1>(x, w + o * width, scale + o * groups_of(width), y + o, rows, width, outputs);
}

// Several products of the same rows; a thread has a part of all outputs together
template <class C, class S, class W>
static void products(const S *x, int count, const W *const *w, const C *const *scales, S *const *y, const int64_t *outputs, int64_t rows, int64_t width, int threads) {
    int64_t all = 0;
    for (int i = 0; i < count; ++i) all += outputs[i];
    #pragma omp parallel for num_threads(threads) if (threads > 1 && all * width > (1 << 15))
    for (int t = 0; t < threads; ++t) {
        int64_t begin = all * t / threads, end = all * (t + 1) / threads, first = 0;
        for (int i = 0; i < count; first += outputs[i++]) {
            int64_t a = std::max<int64_t>(0, begin - first), b = std::min(outputs[i], end - first);
            if (a >= b) continue;
            if (ROWS == 8 && rows >= 5) product_of<C, S, W, ROWS>(x, w[i], scales[i], y[i], rows, width, outputs[i], a, b);
            else if (rows >= 3) product_of<C, S, W, 4>(x, w[i], scales[i], y[i], rows, width, outputs[i], a, b);
            else if (rows == 2) product_of<C, S, W, 2>(x, w[i], scales[i], y[i], rows, width, outputs[i], a, b);
            else product_of<C, S, W, 1>(x, w[i], scales[i], y[i], rows, width, outputs[i], a, b);
        }
    }
}

template <class C, class S, class W>
static void product(const S *x, const W *w, const C *scale, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) {
    products<C, S, W>(x, 1, &w, &scale, &y, &outputs, rows, width, threads);
}

// What weights in eight bits say, made whole
template <class C, class S, class W>
static void widen(const W *w, const C *scale, S *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < width; ++k) y[r * width + k] = down<S>::of(C(up(w[r * width + k])) * scale[r * groups_of(width) + k / GROUP]);
}

// The rows of a table in eight bits that ids say; false where it has no such row
template <class C, class S, class W>
static bool gather_eight(const W *table, int64_t size, const C *scale, const int64_t *ids, S *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        if (ids[r] < 0 || ids[r] >= size) return false;
        widen<C, S, W>(table + ids[r] * width, scale + ids[r] * groups_of(width), y + r * width, 1, width);
    }
    return true;
}

// sums[rows, N vectors] += x[rows, depth] w[depth, N vectors], a row of sums and of x behind another; `soon`: what is asked for, as it lies in w
template <class C, class W, int R, int N, int DEEP>
static inline void strip(const C *x, const W *w, int64_t w_row, C *sums, int64_t row, int64_t rows, int64_t depth, const W *soon) {
    int64_t r = 0;
    for (; r + R <= rows; r += R, soon = nullptr) {
        V<C> total[R][N];
        for (int i = 0; i < R; ++i)
            for (int n = 0; n < N; ++n) total[i][n] = load<C>(sums + (r + i) * row + n * LANES<C>);
        for (int64_t k = 0; k < depth; ++k) {
            V<C> a[N];
            for (int n = 0; n < N; ++n) {
                a[n] = load<C>(w + k * w_row + n * LANES<C>);
                if (soon) __builtin_prefetch(soon + k * w_row + n * LANES<C>, 0, 3);
            }
            for (int i = 0; i < R; ++i) {
                V<C> b = x[(r + i) * DEEP + k] - V<C>{};
                for (int n = 0; n < N; ++n) total[i][n] = fma_(a[n], b, total[i][n]);
            }
        }
        for (int i = 0; i < R; ++i) __builtin_memcpy(sums + (r + i) * row, total[i], N * BYTES);
    }
    if constexpr (R > 1)
        if (r < rows) strip<C, W, R / 2, N, DEEP>(x + r * DEEP, w, w_row, sums + r * row, row, rows - r, depth, soon);
}

// The same with w[width, outputs] as it lies, outputs begin .. end: DEEP rows of the weights at a time, read as they lie; the last outputs through a copy that is filled up with zeros
template <class C, class S, int R>
static void flat_of(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int64_t begin, int64_t end) {
    constexpr int N = columns(R), DEEP = R > 2 ? 128 : 8;  // of few rows, so few of the weights' that they are read as streams
    constexpr int64_t WIDE = N * LANES<C>, SOON = 2;  // columns of a block; so many blocks before its turn one is asked for
    int64_t blocks = (end - begin + WIDE - 1) / WIDE, row = blocks * WIDE;
    std::vector<C> sums(rows * row), left(rows * DEEP), near(DEEP * WIDE);
    for (int64_t k = 0; k < width; k += DEEP) {
        int64_t depth = std::min<int64_t>(DEEP, width - k);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < depth; ++i) left[r * DEEP + i] = up(x[r * width + k + i]);
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t at = begin + b * WIDE, there = std::min(WIDE, end - at), next = b + SOON;
            const S *from = w + k * outputs + at, *soon = next < blocks ? from + SOON * WIDE : w + std::min<int64_t>(k + DEEP, width - depth) * outputs + begin + (next - blocks) * WIDE;
            C *to = sums.data() + b * WIDE;
            if (there == WIDE) {
                strip<C, S, R, N, DEEP>(left.data(), from, outputs, to, row, rows, depth, soon);
                continue;
            }
            for (int64_t i = 0; i < depth; ++i) {
                int64_t o = 0;
                for (; o + LANES<C> <= there; o += LANES<C>) {
                    V<C> v = load<C>(from + i * outputs + o);
                    __builtin_memcpy(&near[i * WIDE + o], &v, BYTES);
                }
                for (; o < there; ++o) near[i * WIDE + o] = up(from[i * outputs + o]);
            }
            strip<C, C, R, N, DEEP>(left.data(), near.data(), WIDE, to, row, rows, depth, nullptr);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = begin; o < end; ++o) y[r * outputs + o] = down<S>::of(sums[r * row + o - begin]);
}

template <class C, class S>
static void product_flat(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1 && outputs * width > (1 << 15))
    for (int t = 0; t < threads; ++t) {
        int64_t begin = outputs * t / threads / LANES<C> * LANES<C>, end = t + 1 < threads ? outputs * (t + 1) / threads / LANES<C> * LANES<C> : outputs;
        if (rows >= 5 && ROWS == 8) flat_of<C, S, ROWS>(x, w, y, rows, width, outputs, begin, end);
        else if (rows >= 3) flat_of<C, S, 4>(x, w, y, rows, width, outputs, begin, end);
        else if (rows == 2) flat_of<C, S, 2>(x, w, y, rows, width, outputs, begin, end);
        else flat_of<C, S, 1>(x, w, y, rows, width, outputs, begin, end);
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

// The rows of a table that ids say, below zero from its end where that is meant; false where it has no such row
template <class S>
static bool gather(const S *table, int64_t size, const int64_t *ids, S *y, int64_t rows, int64_t width, bool from_end) {
    for (int64_t r = 0; r < rows; ++r) {
        int64_t id = from_end && ids[r] < 0 ? ids[r] + size : ids[r];
        if (id < 0 || id >= size) return false;
        std::copy_n(table + id * width, width, y + r * width);
    }
    return true;
}

// Of LANES vectors their sums, in order: each stage folds blocks of two vectors into one
template <class C, int B, int... L>
static inline V<C> folded(V<C> a, V<C> b, std::integer_sequence<int, L...>) {
    constexpr int H = B / 2;
    return __builtin_shufflevector(a, b, (L / B * B + L % H + (L / H % 2) * LANES<C>)...) + __builtin_shufflevector(a, b, (L / B * B + L % H + (L / H % 2) * LANES<C> + H)...);
}
template <class C, int B = LANES<C>>
static inline V<C> sums_of(V<C> *parts) {
    if constexpr (B == 1) {
        return parts[0];
    } else {
        for (int i = 0; i < B / 2; ++i) parts[i] = folded<C, B>(parts[i], parts[i + B / 2], std::make_integer_sequence<int, LANES<C>>());
        return sums_of<C, B / 2>(parts);
    }
}

// made[width] += sum of weights[j] * values[place[j]], in registers where N vectors are all of it
template <class C, class S, int N>
static inline void gathered(const C *weights, const S *values, const int64_t *place, int64_t count, int64_t width, C *__restrict made) {
    if constexpr (N > 0) {
        V<C> sums[N];
        for (int n = 0; n < N; ++n) sums[n] = load<C>(made + n * LANES<C>);
        for (int64_t j = 0; j < count; ++j) {
            const S *value = values + place[j] * width;
            for (int n = 0; n < N; ++n) sums[n] = fma_(load<C>(value + n * LANES<C>), weights[j] - V<C>{}, sums[n]);
        }
        for (int n = 0; n < N; ++n) __builtin_memcpy(made + n * LANES<C>, &sums[n], BYTES);
    } else {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t d = 0; d < width; ++d) made[d] = fma_(weights[j], C(up(values[place[j] * width + d])), made[d]);
    }
}

// Sequences of few new tokens, each by itself: `rows`: where its tokens begin; `table`: its pages, `longest` of each sequence. Keys are taken in blocks that stay near while
// all new tokens and query heads of their kv head meet them.
template <class C, class S>
static void attend(const S *q, const S *keys, const S *values, S *out, const S *sinks, const int64_t *table, const int64_t *lengths, const int64_t *news, const int64_t *rows,
                   int64_t sequences, int64_t longest, int64_t held, int64_t shares, int64_t pages, int64_t size, int64_t width, int64_t value_width,
                   double scale, int64_t window, double softcap, int threads) {
    constexpr int64_t BLOCK = 64;
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t h = 0; h < held; ++h) {
            const S *heads = keys + h * pages * size * width, *worths = values + h * pages * size * value_width;
            int64_t length = lengths[s], queries = news[s] * shares;
            std::vector<int64_t> place(length);
            for (int64_t at = 0; at < length; at += size)
                for (int64_t i = 0; i < std::min(size, length - at); ++i) place[at + i] = table[s * longest + at / size] * size + i;
            std::vector<C> weights(queries * length), query(queries * width), made(queries * value_width);
            auto row_of = [&](int64_t r) { return (rows[s] + r / shares) * held * shares + h * shares + r % shares; };
            auto last_of = [&](int64_t r) { return length - news[s] + r / shares + 1; };
            auto first_of = [&](int64_t r) { return window ? std::max<int64_t>(0, last_of(r) - window) : 0; };
            for (int64_t r = 0; r < queries; ++r)
                for (int64_t d = 0; d < width; ++d) query[r * width + d] = up(q[row_of(r) * width + d]);
            for (int64_t base = 0; base < length; base += BLOCK)
                for (int64_t r = 0; r < queries; ++r)
                    for (int64_t j = std::max(first_of(r), base), end = std::min(last_of(r), base + BLOCK); j < end; j += LANES<C>) {
                        int n = int(std::min<int64_t>(LANES<C>, end - j));
                        V<C> parts[LANES<C>];
                        C rest[LANES<C>];
                        for (int i = 0; i < LANES<C>; ++i) {
                            const S *key = heads + place[j + std::min(i, n - 1)] * width;
                            parts[i] = V<C>{};
                            int64_t d = 0;
                            for (; d + LANES<C> <= width; d += LANES<C>) parts[i] = fma_(load<C>(key + d), load<C>(query.data() + r * width + d), parts[i]);
                            for (rest[i] = 0; d < width; ++d) rest[i] = fma_(C(up(key[d])), query[r * width + d], rest[i]);
                        }
                        V<C> logits = (sums_of<C>(parts) + load<C>(rest)) * (C(scale) - V<C>{});
                        __builtin_memcpy(weights.data() + r * length + j, &logits, n * sizeof(C));
                    }
            for (int64_t r = 0; r < queries; ++r) {
                C *w = weights.data() + r * length, sink = sinks ? up(sinks[h * shares + r % shares]) : -std::numeric_limits<C>::infinity(), highest = sink;
                int64_t first = first_of(r), last = last_of(r);
                if (softcap)
                    for (int64_t j = first; j < last; ++j) w[j] = std::tanh(w[j] / C(softcap)) * C(softcap);
                #pragma omp simd reduction(max:highest)
                for (int64_t j = first; j < last; ++j) highest = highest > w[j] ? highest : w[j];
                C total = sinks ? exp_(sink - highest) : C(0);
                #pragma omp simd reduction(+:total)
                for (int64_t j = first; j < last; ++j) {
                    w[j] = exp_(w[j] - highest);
                    total += w[j];
                }
                C share = C(1) / total;
                for (int64_t j = first; j < last; ++j) w[j] *= share;
            }
            int64_t vectors = value_width % LANES<C> ? 0 : value_width / LANES<C>;
            for (int64_t base = 0; base < length; base += BLOCK)
                for (int64_t r = 0; r < queries; ++r) {
                    int64_t j = std::max(first_of(r), base), count = std::min(last_of(r), base + BLOCK) - j;
                    if (count <= 0) continue;
                    const C *w = weights.data() + r * length + j;
                    C *sums = made.data() + r * value_width;
                    if (vectors == 4) gathered<C, S, 4>(w, worths, &place[j], count, value_width, sums);
                    else if (vectors == 8) gathered<C, S, 8>(w, worths, &place[j], count, value_width, sums);
                    else gathered<C, S, 0>(w, worths, &place[j], count, value_width, sums);
                }
            for (int64_t r = 0; r < queries; ++r)
                for (int64_t d = 0; d < value_width; ++d) out[row_of(r) * value_width + d] = down<S>::of(made[r * value_width + d]);
        }
}

template <class S>
static void put(const S *x, S *cache, const int64_t *slots, int64_t tokens, int64_t held, int64_t room, int64_t width) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < held; ++h) std::copy_n(x + (t * held + h) * width, width, cache + (h * room + slots[t]) * width);
}
"""

EXPORTS = r"""
#define EIGHT(S, C, W, NAME) \
    extern "C" void NAME(const S *x, const W *w, const C *scale, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) { product<C, S, W>(x, w, scale, y, rows, width, outputs, threads); } \
    extern "C" void widen_##NAME(const W *w, const C *scale, S *y, int64_t rows, int64_t width) { widen<C, S, W>(w, scale, y, rows, width); }
#define EACH(S, C, NAME) \
    extern "C" void product_##NAME(const S *x, const S *w, S *y, int64_t rows, int64_t width, int64_t outputs, int threads) { product<C, S, S>(x, w, nullptr, y, rows, width, outputs, threads); } \
    EIGHT(S, C, int8_t, int8_##NAME) \
    EIGHT(S, C, e4m3, fp8_##NAME) \
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

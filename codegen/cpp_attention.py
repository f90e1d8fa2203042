"""C++ for ``sdpa`` and its backward on a CPU, without a mask: a function for each distinct fragment that is one of these ops.

A thread has one kv head of one sequence, with all query heads that share it. Keys and values are made wide once; then QUERIES queries at a time meet the keys that they may see: the scores of a few
queries are whole rows, in the near caches, and what no query may see is not computed. 16 bits are computed in float. Operands are read, and results written, as the program says that they lie:
rows of a head lie far apart, so that no processor foresees them, and products ask for those of the next queries and heads.
"""

from __future__ import annotations

from deepseed.codegen.cpp_nests import Function
from deepseed.codegen.cpp_ops import TYPES, computed
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.ir.kernels import UNMASKED

LIBRARY = r"""
#include <algorithm>
#include <utility>
#if defined(__AVX512F__)
constexpr int WIDE = 64, TILE = 6, ACROSS = 4;
#elif defined(__AVX__)
constexpr int WIDE = 32, TILE = 6, ACROSS = 2;
#else
constexpr int WIDE = 16, TILE = 8, ACROSS = 2;
#endif
template <class C> struct Wide;
template <> struct Wide<float> { typedef float type __attribute__((vector_size(WIDE))); };
template <> struct Wide<double> { typedef double type __attribute__((vector_size(WIDE))); };
template <class C> using V = typename Wide<C>::type;
template <class C> constexpr int64_t IN = WIDE / int64_t(sizeof(C));  // elements of a vector
template <class C> constexpr int64_t PANEL = ACROSS * IN<C>;          // columns of a panel
template <class C> static inline int64_t filled(int64_t n, int64_t to = IN<C>) { return (n + to - 1) / to * to; }
constexpr int64_t QUERIES = 64, DEPTH = 128, FAR = int64_t(1) << 40;

struct Heads { int64_t batch, head, row, element; };  // strides
template <class S> static inline S *lies(S *x, const Heads &s, int64_t batch, int64_t head, int64_t row = 0) { return x + batch * s.batch + head * s.head + row * s.row; }
template <class C> struct Left { const C *at; int64_t row, deep; };    // a[i, k] is at[i * row + k * deep]
template <class C> struct Right { const C *at; int64_t row, panel; };  // b[k, j] is at[j / PANEL * panel + k * row + j % PANEL]
struct Stairs { int64_t columns = FAR, until = FAR, from = FAR; };     // of row i: no column from columns + i + 1 on is wanted; a is zero from depth until + i + 1 on, and before depth i - from

template <class C> static inline V<C> load(const C *x) {
    V<C> v;
    __builtin_memcpy(&v, x, WIDE);
    return v;
}
template <class C> static inline void store(C *y, V<C> v) { __builtin_memcpy(y, &v, WIDE); }

// Rows of memory that are needed next: products ask for them, a line now and then, and do not wait
struct Ahead {
    std::unique_ptr<const char *[]> rows;
    const char **next, **end;
    int64_t bytes, line = 0;
    Ahead(int64_t most_rows, int64_t row_bytes) : rows(new const char *[most_rows + 1]()), next(rows.get()), end(next), bytes(row_bytes) {}
    void clear() { next = end = rows.get(), line = 0; }
    template <class S> void add(const S *x, const Heads &s, int64_t count) {
        for (int64_t r = 0; r < count; ++r) *end++ = (const char *)(x + r * s.row);
    }
    void ask() {
        __builtin_prefetch(*next + line, 0, 2);
        line += 64;
        if (line >= bytes) line = 0, next += next < end;
    }
};

// Queries of a head, and which come next
struct Block {
    int64_t batch, head, first, count;
    Block after(int64_t batches, int64_t heads, int64_t news) const {
        int64_t begin = first + QUERIES < news ? first + QUERIES : 0, number = batch * heads + head + !begin;
        return {number / heads, number % heads, begin, number < batches * heads ? std::min(QUERIES, news - begin) : 0};
    }
};

// f(0), f(1), .. by constants: what they pick from an array stays in registers
template <int N, class F> static inline void unrolled(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, N>());
}

// c[R, N vectors] (+)= a[R, depth] b[depth, N vectors]
template <class C, int R, int N>
static inline void tile_of(const Left<C> &a, const Right<C> &b, C *c, int64_t c_row, int64_t from, int64_t until, bool more, Ahead &ahead) {
    V<C> sums[R][N]{}, right[N];
    const C *x = a.at + from * a.deep, *y = b.at + from * b.row;
    const int64_t row = a.row, deep = a.deep, next = b.row;
    for (int64_t k = from; k < until; ++k, x += deep, y += next) {
        if (k % 2) ahead.ask();
        unrolled<N>([&](auto n) { right[n] = load(y + n * IN<C>); });
        unrolled<R>([&](auto i) {
            V<C> left = x[i * row] - V<C>{};
            unrolled<N>([&](auto n) { sums[i][n] += left * right[n]; });
        });
    }
    unrolled<R>([&](auto i) {
        unrolled<N>([&](auto n) {
            C *to = c + i * c_row + n * IN<C>;
            store(to, more ? load(to) + sums[i][n] : sums[i][n]);
        });
    });
}

// As many vectors as hold the columns that are wanted, N at most
template <class C, int R, int N>
static inline void tile_of(int64_t columns, const Left<C> &a, const Right<C> &b, C *c, int64_t c_row, int64_t from, int64_t until, bool more, Ahead &ahead) {
    if constexpr (N > 1)
        if (columns <= (N - 1) * IN<C>) return tile_of<C, R, N - 1>(columns, a, b, c, c_row, from, until, more, ahead);
    tile_of<C, R, N>(a, b, c, c_row, from, until, more, ahead);
}

// Rows r and on of a panel
template <class C, int R>
static inline void tiles_of(const Left<C> &a, const Right<C> &b, C *c, int64_t c_row, int64_t r, int64_t rows, int64_t columns, int64_t k, int64_t depth, bool more, const Stairs &stairs, Ahead &ahead) {
    for (; r + R <= rows; r += R) {
        int64_t wanted = std::min(columns, stairs.columns + r + R), until = std::min(depth, stairs.until + r + R), from = std::max(k, r - stairs.from);
        if (wanted > 0 && (!more || from < until)) tile_of<C, R, ACROSS>(wanted, {a.at + r * a.row, a.row, a.deep}, b, c + r * c_row, c_row, from, until, more, ahead);
    }
    if constexpr (R > 1)
        if (r < rows) tiles_of<C, R == 6 ? 4 : R / 2>(a, b, c, c_row, r, rows, columns, k, depth, more, stairs, ahead);
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns are whole vectors
template <class C>
static void matrix_product(const Left<C> &a, const Right<C> &b, C *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool more, const Stairs &stairs, Ahead &ahead) {
    for (int64_t k = 0; k < depth; k += DEPTH)
        for (int64_t j = 0; j < columns; j += PANEL<C>)
            tiles_of<C, TILE>(a, {b.at + j / PANEL<C> * b.panel, b.row, b.panel}, c + j, c_row, 0, rows, columns - j, k, std::min(k + DEPTH, depth), more || k, {stairs.columns - j, stairs.until, stairs.from}, ahead);
}

// The first n elements, and zeros
template <class C, class S>
static inline V<C> some(const S *x, int64_t element, int64_t n) {
    C made[IN<C>];
    if (element == 1 && n >= IN<C>) {
        if constexpr (std::is_same_v<C, S>) return load(x);
        for (int j = 0; j < IN<C>; ++j) made[j] = up(x[j]);
    } else {
        for (int j = 0; j < IN<C>; ++j) made[j] = j < n ? C(up(x[j * element])) : C(0);
    }
    return load(made);
}

// Rows of a head made wide, each filled up with zeros
template <class C, class S>
static void wide_rows(const S *x, const Heads &s, C *y, int64_t y_row, int64_t y_panel, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < width; d += IN<C>) store(y + d / PANEL<C> * y_panel + r * y_row + d % PANEL<C>, some<C>(x + r * s.row + d * s.element, s.element, width - d));
}

template <class C, size_t... J>
static inline void turn(V<C> *x, std::index_sequence<J...>) {  // transposes: a step puts the last half of the rows between the first
    constexpr int L = IN<C>;
    for (int n = 1; n < L; n *= 2) {
        V<C> y[L];
        for (int i = 0; i < L / 2; ++i) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + L / 2], (J / 2 + J % 2 * L)...);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + L / 2], (L / 2 + J / 2 + J % 2 * L)...);
        }
        for (int i = 0; i < L; ++i) x[i] = y[i];
    }
}
template <class C> static inline void turn(V<C> *x) { turn<C>(x, std::make_index_sequence<size_t(IN<C>)>()); }

// Panels of the transposed rows of a head
template <class C, class S>
static void turned(const S *x, const Heads &s, C *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < filled<C>(rows, PANEL<C>); r += IN<C>)
        for (int64_t d = 0; d < width; d += IN<C>) {
            V<C> block[IN<C>];
            for (int i = 0; i < IN<C>; ++i) block[i] = r + i < rows ? some<C>(x + (r + i) * s.row + d * s.element, s.element, width - d) : V<C>{};
            turn<C>(block);
            C *to = y + r / PANEL<C> * width * PANEL<C> + d * PANEL<C> + r % PANEL<C>;
            for (int i = 0; i < IN<C> && d + i < width; ++i) store(to + i * PANEL<C>, block[i]);
        }
}

// Rows times a number each, as they are stored
template <class C, class S>
static void narrow_rows(const C *x, int64_t x_row, S *y, const Heads &s, int64_t rows, int64_t width, const C *by, int64_t by_step) {
    for (int64_t r = 0; r < rows; ++r) {
        C factor = by[r * by_step];
        #pragma omp simd
        for (int64_t d = 0; d < width; ++d) y[r * s.row + d] = down<S>::of(x[r * x_row + d] * factor);
    }
}

template <class C> static inline V<C> exp_of(V<C> v) {
    C x[IN<C>];
    store(x, v);
    #pragma omp simd
    for (int j = 0; j < int(IN<C>); ++j) x[j] = exp_(x[j]);
    return load(x);
}

template <class C> static inline V<C> below(int64_t n, V<C> x, C other) {  // the first n elements, and others
    if (n >= IN<C>) return x;
    C lanes[IN<C>];
    for (int j = 0; j < IN<C>; ++j) lanes[j] = C(j);
    return load(lanes) < C(n) - V<C>{} ? x : other - V<C>{};
}

// One number of each vector
template <class C, class F> static inline void across(V<C> *x, C *y, F both) {
    turn<C>(x);
    for (int i = 1; i < IN<C>; ++i) x[0] = both(x[0], x[i]);
    store(y, x[0]);
}

template <class C> struct Room {  // of one thread; each array begins with a line of the cache
    std::unique_ptr<C[]> own;
    C *next;
    explicit Room(int64_t n) : own(new C[n + 1024]), next((C *)((uintptr_t(own.get()) + 63) / 64 * 64)) {}
    C *array(int64_t n) {
        C *out = next;
        next += (n * int64_t(sizeof(C)) + 63) / 64 * 64 / int64_t(sizeof(C));
        return out;
    }
};

template <class C, class S>
static void attention(int threads, const S *q, const S *k, const S *v, S *out, C *lse, const Heads &sq, const Heads &sk, const Heads &sv, const Heads &so,
                      int64_t batch, int64_t held, int64_t shares, int64_t news, int64_t length, int64_t width, int64_t value_width, bool causal, C scale) {
    constexpr int64_t L = IN<C>;
    const int64_t keys = filled<C>(length, PANEL<C>), wide = filled<C>(width), value_wide = filled<C>(value_width), value_panels = filled<C>(value_width, PANEL<C>), row = keys + L;
    const int64_t blocks = (news + QUERIES - 1) / QUERIES * shares;
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < held; ++h) {
            Room<C> room(length * value_panels + width * keys + QUERIES * (wide + value_wide + row));
            C *values = room.array(length * value_panels), *columns = room.array(width * keys);
            C *query = room.array(QUERIES * wide), *made = room.array(QUERIES * value_wide), *scores = room.array(QUERIES * row);
            Ahead ahead(2 * (QUERIES + length), std::max(width, value_width) * int64_t(sizeof(S)));
            turned(lies(k, sk, b, h), sk, columns, length, width);
            wide_rows(lies(v, sv, b, h), sv, values, PANEL<C>, length * PANEL<C>, length, value_width);
            const int64_t b_next = b + (h + 1) / held, h_next = (h + 1) % held;
            Block now{b, h * shares, 0, std::min(QUERIES, news)};
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = now.first, count = now.count, seen = causal ? std::min(length, first + count) : length, stairs = causal ? first : FAR;
                const Block next = now.after(batch, held * shares, news);
                ahead.clear();
                ahead.add(lies(out, so, b, now.head, first), so, count);
                ahead.add(lies(q, sq, next.batch, next.head, next.first), sq, next.count);
                if (b_next < batch) {
                    int64_t some_of = block * length / blocks, more = (block + 1) * length / blocks - some_of;
                    ahead.add(lies(k, sk, b_next, h_next, some_of), sk, more);
                    ahead.add(lies(v, sv, b_next, h_next, some_of), sv, more);
                }
                C shares_of[QUERIES];
                wide_rows(lies(q, sq, b, now.head, first), sq, query, wide, PANEL<C>, count, width);
                matrix_product<C>({query, wide, 1}, {columns, PANEL<C>, width * PANEL<C>}, scores, row, count, filled<C>(seen), width, false, {.columns = stairs}, ahead);
                for (int64_t begin = 0; begin < count; begin += L) {
                    V<C> tops[L], sums[L];
                    C top[L], total[L];
                    const int64_t some_of = std::min(L, count - begin);
                    for (int64_t r = 0; r < L; ++r) tops[r] = -std::numeric_limits<C>::infinity() - V<C>{}, sums[r] = V<C>{};
                    for (int64_t r = 0; r < some_of; ++r) {
                        C *w = scores + (begin + r) * row;
                        int64_t own = causal ? std::min(length, first + begin + r + 1) : length;
                        for (int64_t at = 0; at < own; at += L) {
                            V<C> x = below<C>(own - at, load(w + at) * scale, -std::numeric_limits<C>::infinity());
                            tops[r] = tops[r] > x ? tops[r] : x;
                        }
                    }
                    across<C>(tops, top, [](V<C> x, V<C> y) { return x > y ? x : y; });
                    for (int64_t r = 0; r < some_of; ++r) {
                        C *w = scores + (begin + r) * row;
                        int64_t own = causal ? std::min(length, first + begin + r + 1) : length, at = 0;
                        for (; at < own; at += L) {
                            V<C> x = below<C>(own - at, exp_of<C>(load(w + at) * scale - top[r]), C(0));
                            sums[r] += x;
                            store(w + at, x);
                        }
                        for (; at < seen; at += L) store(w + at, V<C>{});
                    }
                    across<C>(sums, total, [](V<C> x, V<C> y) { return x + y; });
                    for (int64_t r = 0; r < some_of; ++r) {
                        shares_of[begin + r] = C(1) / total[r];
                        lse[(b * held * shares + now.head) * news + first + begin + r] = top[r] + std::log(total[r]);
                    }
                }
                matrix_product<C>({scores, row, 1}, {values, PANEL<C>, length * PANEL<C>}, made, value_wide, count, value_wide, seen, false, {.until = stairs}, ahead);
                narrow_rows(made, value_wide, lies(out, so, b, now.head, first), so, count, value_width, shares_of, 1);
                now = next;
            }
        }
}

template <class C, class S>
static void attention_backward(int threads, const S *g, const S *q, const S *k, const S *v, const S *out, const C *lse, S *dq, S *dk, S *dv,
                               const Heads &sg, const Heads &sq, const Heads &sk, const Heads &sv, const Heads &so, const Heads &sdq, const Heads &sdk, const Heads &sdv,
                               int64_t batch, int64_t held, int64_t shares, int64_t news, int64_t length, int64_t width, int64_t value_width, bool causal, C scale) {
    constexpr int64_t L = IN<C>;
    constexpr C one = 1;
    const int64_t keys = filled<C>(length, PANEL<C>), wide = filled<C>(width), value_wide = filled<C>(value_width), panels = filled<C>(width, PANEL<C>), row = keys + L;
    const int64_t blocks = (news + QUERIES - 1) / QUERIES * shares;
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < held; ++h) {
            Room<C> room(length * (panels + wide + value_wide) + (width + value_width) * keys + QUERIES * (2 * wide + value_wide + 2 * row));
            C *rows = room.array(length * panels), *columns = room.array(width * keys), *worths = room.array(value_width * keys);
            C *dk_of = room.array(length * wide), *dv_of = room.array(length * value_wide), *dq_of = room.array(QUERIES * wide);
            C *query = room.array(QUERIES * wide), *grad = room.array(QUERIES * value_wide), *weights = room.array(QUERIES * row), *slopes = room.array(QUERIES * row);
            Ahead ahead(4 * (QUERIES + length), std::max(width, value_width) * int64_t(sizeof(S)));
            turned(lies(v, sv, b, h), sv, worths, length, value_width);
            turned(lies(k, sk, b, h), sk, columns, length, width);
            wide_rows(lies(k, sk, b, h), sk, rows, PANEL<C>, length * PANEL<C>, length, width);
            std::fill(dk_of, dk_of + length * wide, C(0));
            std::fill(dv_of, dv_of + length * value_wide, C(0));
            const int64_t b_next = b + (h + 1) / held, h_next = (h + 1) % held;
            Block now{b, h * shares, 0, std::min(QUERIES, news)};
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = now.first, count = now.count, seen = causal ? std::min(length, first + count) : length, stairs = causal ? first : FAR;
                const int64_t kept = block * length / blocks, more = (block + 1) * length / blocks - kept;
                const Block next = now.after(batch, held * shares, news);
                const S *answer = lies(out, so, b, now.head, first);
                ahead.clear();
                ahead.add(lies(dq, sdq, b, now.head, first), sdq, count);
                ahead.add(lies(q, sq, next.batch, next.head, next.first), sq, next.count);
                ahead.add(lies(g, sg, next.batch, next.head, next.first), sg, next.count);
                ahead.add(lies(out, so, next.batch, next.head, next.first), so, next.count);
                if (b_next < batch) {
                    ahead.add(lies(k, sk, b_next, h_next, kept), sk, more);
                    ahead.add(lies(v, sv, b_next, h_next, kept), sv, more);
                }
                ahead.add(lies(dk, sdk, b, h, kept), sdk, more);
                ahead.add(lies(dv, sdv, b, h, kept), sdv, more);
                wide_rows(lies(q, sq, b, now.head, first), sq, query, wide, PANEL<C>, count, width);
                wide_rows(lies(g, sg, b, now.head, first), sg, grad, value_wide, PANEL<C>, count, value_width);
                matrix_product<C>({query, wide, 1}, {columns, PANEL<C>, width * PANEL<C>}, weights, row, count, filled<C>(seen), width, false, {.columns = stairs}, ahead);
                matrix_product<C>({grad, value_wide, 1}, {worths, PANEL<C>, value_width * PANEL<C>}, slopes, row, count, filled<C>(seen), value_width, false, {.columns = stairs}, ahead);
                for (int64_t begin = 0; begin < count; begin += L) {
                    V<C> inners[L];
                    C inner[L];
                    const int64_t some_of = std::min(L, count - begin);
                    for (int64_t r = 0; r < L; ++r) {
                        inners[r] = V<C>{};
                        for (int64_t d = 0; d < value_width && r < some_of; d += L)
                            inners[r] += load(grad + (begin + r) * value_wide + d) * some<C>(answer + (begin + r) * so.row + d * so.element, so.element, value_width - d);
                    }
                    across<C>(inners, inner, [](V<C> x, V<C> y) { return x + y; });
                    for (int64_t r = 0; r < some_of; ++r) {
                        C *w = weights + (begin + r) * row, *s = slopes + (begin + r) * row, least_of = lse[(b * held * shares + now.head) * news + first + begin + r];
                        int64_t own = causal ? std::min(length, first + begin + r + 1) : length, at = 0;
                        for (; at < own; at += L) {
                            V<C> p = exp_of<C>(load(w + at) * scale - least_of);
                            store(s + at, below<C>(own - at, p * (load(s + at) - inner[r]), C(0)));
                            store(w + at, below<C>(own - at, p, C(0)));
                        }
                        for (; at < seen; at += L) store(w + at, V<C>{}), store(s + at, V<C>{});
                    }
                }
                matrix_product<C>({weights, 1, row}, {grad, value_wide, PANEL<C>}, dv_of, value_wide, seen, value_wide, count, true, {.from = stairs}, ahead);
                matrix_product<C>({slopes, 1, row}, {query, wide, PANEL<C>}, dk_of, wide, seen, wide, count, true, {.from = stairs}, ahead);
                matrix_product<C>({slopes, row, 1}, {rows, PANEL<C>, length * PANEL<C>}, dq_of, wide, count, wide, seen, false, {.until = stairs}, ahead);
                narrow_rows(dq_of, wide, lies(dq, sdq, b, now.head, first), sdq, count, width, &scale, 0);
                now = next;
            }
            narrow_rows(dk_of, wide, lies(dk, sdk, b, h), sdk, length, width, &scale, 0);
            narrow_rows(dv_of, value_wide, lies(dv, sdv, b, h), sdv, length, value_width, &one, 0);
        }
}
"""


def source(k: Kernel) -> Function:
    """``extern "C" int kernel_..(int threads, const float *q, .., float *lse)``. Raises CodegenError."""
    (op,), p = k.fragment.ops, k.fragment
    if len(op.refs) != UNMASKED[op.target]:
        raise CodegenError(f"%{op.name}: attention with a mask")
    place = {i.name: n for n, i in enumerate(p.inputs)}
    q, key, value = ([p.types[r.name] for r in op.refs][n] for n in ((0, 1, 2) if op.target == "sdpa" else (1, 2, 3)))
    wide = computed(q.dtype)
    if wide not in ("f32", "f64") or any(p.types[r.name].dtype != q.dtype for r in op.refs[: 5 if op.target == "sdpa_backward" else 3]) or 0 in (*q.shape, *key.shape, *value.shape):
        raise CodegenError(f"%{op.name}: attention of {q} and {key}")
    (batch, heads, news, width), held, length, value_width = q.shape, key.shape[1], key.shape[2], value.shape[3]
    scale = op.kw("scale")
    assert isinstance(scale, int | float)
    lying, _ = k.lying[0]
    if any(s[-1] != 1 for s in lying[: 1 if op.target == "sdpa" else 3]):
        raise CodegenError(f"%{op.name}: rows of results that lie apart")
    given = [f"i{place[r.name]}" for r in op.refs]
    made = [f"o{n}" for n in range(len(op.results))]
    taken = [k.strides[place[r.name]] for r in op.refs if len(p.types[r.name].shape) == 4] + [s for s, t in zip(lying, op.types, strict=True) if len(t.shape) == 4]
    laid = ", ".join(f"Heads{{{', '.join(map(str, s))}}}" for s in taken)
    parameters = [f"const {TYPES[i.type.dtype]} *i{n}" for n, i in enumerate(p.inputs)] + [f"{TYPES[t.dtype]} *o{n}" for n, t in enumerate(op.types)]
    sizes = f"{batch}, {held}, {heads // held}, {news}, {length}, {width}, {value_width}, {str(bool(op.kw('causal', False))).lower()}, {TYPES[wide]}({float(scale)!r})"
    call = f"{'attention' if op.target == 'sdpa' else 'attention_backward'}<{TYPES[wide]}, {TYPES[q.dtype]}>(threads, {', '.join([*given, *made])}, {laid}, {sizes});"
    text = f'extern "C" int {k.name}(int threads, {", ".join(parameters)}) {{\n    {call}\n    return 0;\n}}\n'
    makes = tuple((t.shape, s, t.dtype) for t, s in zip(op.types, lying, strict=True))
    shown = [op.results.index(o.ref.name) for o in p.outputs]
    return Function(text, makes, tuple((False, n, lying[n], 0) for n in shown))

"""C++ for ``sdpa`` and its backward on a CPU, without a mask: a function for each distinct fragment that is one of these ops.

A thread has one kv head of one sequence, with all query heads that share it. Keys and values are made wide once; then ROWS queries at a time meet the keys that they may see: the scores of a few
queries are whole rows, in the nearest caches, and what no query may see is not computed. 16 bits are computed in float. Operands are read, and results written, as the program says that they lie.
"""

from __future__ import annotations

from deepseed.codegen.cpp_nests import Function
from deepseed.codegen.cpp_ops import TYPES, computed
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.ir.kernels import UNMASKED

LIBRARY = r"""
#include <algorithm>
#if defined(__AVX512F__)
constexpr int WIDE = 64, TILE = 8;
#elif defined(__AVX__)
constexpr int WIDE = 32, TILE = 4;
#else
constexpr int WIDE = 16, TILE = 8;
#endif
template <class C> struct Wide;
template <> struct Wide<float> { typedef float type __attribute__((vector_size(WIDE))); };
template <> struct Wide<double> { typedef double type __attribute__((vector_size(WIDE))); };
template <class C> constexpr int64_t IN = WIDE / int64_t(sizeof(C));  // elements of a vector
template <class C> static inline int64_t filled(int64_t n) { return (n + IN<C> - 1) / IN<C> * IN<C>; }
constexpr int64_t QUERIES = 32, DEPTH = 256;

struct Heads { int64_t batch, head, row, element; };  // strides

// c[R, N vectors] (+)= a[R, depth] b[depth, N vectors]
template <class C, int R, int N>
static inline void tile_of(const C *a, int64_t a_row, int64_t a_deep, const C *b, int64_t b_row, C *c, int64_t c_row, int64_t depth, bool more) {
    typedef typename Wide<C>::type V;
    V sums[R][N];
    for (int i = 0; i < R; ++i)
        for (int n = 0; n < N; ++n) {
            sums[i][n] = V{};
            if (more) __builtin_memcpy(&sums[i][n], c + i * c_row + n * IN<C>, WIDE);
        }
    for (int64_t k = 0; k < depth; ++k) {
        V right[N];
        for (int n = 0; n < N; ++n) __builtin_memcpy(&right[n], b + k * b_row + n * IN<C>, WIDE);
        for (int i = 0; i < R; ++i) {
            V left = a[i * a_row + k * a_deep] - V{};
            for (int n = 0; n < N; ++n) sums[i][n] += left * right[n];
        }
    }
    for (int i = 0; i < R; ++i)
        for (int n = 0; n < N; ++n) __builtin_memcpy(c + i * c_row + n * IN<C>, &sums[i][n], WIDE);
}

template <class C, int R, int N>
static inline void tiles_of(const C *a, int64_t a_row, int64_t a_deep, const C *b, int64_t b_row, C *c, int64_t c_row, int64_t rows, int64_t depth, bool more) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) tile_of<C, R, N>(a + r * a_row, a_row, a_deep, b, b_row, c + r * c_row, c_row, depth, more);
    if constexpr (R > 1)
        if (r < rows) tiles_of<C, R / 2, N>(a + r * a_row, a_row, a_deep, b, b_row, c + r * c_row, c_row, rows - r, depth, more);
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns are whole vectors
template <class C>
static void matrix_product(const C *a, int64_t a_row, int64_t a_deep, const C *b, int64_t b_row, C *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool more) {
    for (int64_t k = 0; k < depth; k += DEPTH) {
        int64_t some = std::min(DEPTH, depth - k), j = 0;
        for (; j + 2 * IN<C> <= columns; j += 2 * IN<C>) tiles_of<C, TILE, 2>(a + k * a_deep, a_row, a_deep, b + k * b_row + j, b_row, c + j, c_row, rows, some, more || k);
        for (; j < columns; j += IN<C>) tiles_of<C, TILE, 1>(a + k * a_deep, a_row, a_deep, b + k * b_row + j, b_row, c + j, c_row, rows, some, more || k);
    }
}

// Rows of a head made wide, each filled up with zeros
template <class C, class S>
static void wide_rows(const S *x, const Heads &s, C *__restrict y, int64_t y_row, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        const S *from = x + r * s.row;
        C *__restrict to = y + r * y_row;
        if (s.element == 1) {
            #pragma omp simd
            for (int64_t d = 0; d < width; ++d) to[d] = up(from[d]);
        } else {
            for (int64_t d = 0; d < width; ++d) to[d] = up(from[d * s.element]);
        }
        for (int64_t d = width; d < y_row; ++d) to[d] = 0;
    }
}

template <class C>
static void turned(const C *x, int64_t x_row, C *__restrict y, int64_t y_row, int64_t rows, int64_t width) {
    for (int64_t d = 0; d < width; ++d) {
        #pragma omp simd
        for (int64_t r = 0; r < rows; ++r) y[d * y_row + r] = x[r * x_row + d];
        for (int64_t r = rows; r < y_row; ++r) y[d * y_row + r] = 0;
    }
}

template <class C, class S>
static void narrow_rows(const C *x, int64_t x_row, S *y, const Heads &s, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        #pragma omp simd
        for (int64_t d = 0; d < width; ++d) y[r * s.row + d] = down<S>::of(x[r * x_row + d]);
    }
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
    const int64_t L = IN<C>, keys = filled<C>(length), wide = filled<C>(width), value_wide = filled<C>(value_width);
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < held; ++h) {
            Room<C> room(length * (wide + value_wide) + width * keys + QUERIES * (wide + value_wide + keys));
            C *rows = room.array(length * wide), *values = room.array(length * value_wide), *columns = room.array(width * keys);
            C *query = room.array(QUERIES * wide), *made = room.array(QUERIES * value_wide), *scores = room.array(QUERIES * keys);
            wide_rows(k + b * sk.batch + h * sk.head, sk, rows, wide, length, width);
            turned(rows, wide, columns, keys, length, width);
            wide_rows(v + b * sv.batch + h * sv.head, sv, values, value_wide, length, value_width);
            for (int64_t head = h * shares; head < (h + 1) * shares; ++head)
                for (int64_t first = 0; first < news; first += QUERIES) {
                    int64_t count = std::min(QUERIES, news - first), seen = causal ? std::min(length, first + count) : length;
                    C shares_of[QUERIES];
                    wide_rows(q + b * sq.batch + head * sq.head + first * sq.row, sq, query, wide, count, width);
                    matrix_product(query, wide, 1, columns, keys, scores, keys, count, filled<C>(seen), width, false);
                    for (int64_t r = 0; r < count; ++r) {
                        C *__restrict w = scores + r * keys, tops[WIDE], sums[WIDE], top, total = 0;
                        int64_t own = causal ? std::min(length, first + r + 1) : length;
                        for (int j = 0; j < L; ++j) tops[j] = -std::numeric_limits<C>::infinity(), sums[j] = 0;
                        for (int64_t at = 0; at < own; at += IN<C>) {
                            #pragma omp simd
                            for (int j = 0; j < int(IN<C>); ++j) {
                                C x = at + j < own ? w[at + j] * scale : -std::numeric_limits<C>::infinity();
                                w[at + j] = x;
                                tops[j] = most(tops[j], x);
                            }
                        }
                        top = tops[0];
                        for (int j = 1; j < L; ++j) top = most(top, tops[j]);
                        for (int64_t at = 0; at < own; at += IN<C>) {
                            #pragma omp simd
                            for (int j = 0; j < int(IN<C>); ++j) {
                                C x = at + j < own ? exp_(w[at + j] - top) : C(0);
                                w[at + j] = x;
                                sums[j] += x;
                            }
                        }
                        for (int j = 0; j < L; ++j) total += sums[j];
                        for (int64_t j = filled<C>(own); j < filled<C>(seen); ++j) w[j] = 0;
                        shares_of[r] = C(1) / total;
                        lse[((b * held * shares) + head) * news + first + r] = top + std::log(total);
                    }
                    matrix_product(scores, keys, 1, values, value_wide, made, value_wide, count, value_wide, seen, false);
                    for (int64_t r = 0; r < count; ++r)
                        for (int64_t d = 0; d < value_wide; ++d) made[r * value_wide + d] *= shares_of[r];
                    narrow_rows(made, value_wide, out + b * so.batch + head * so.head + first * so.row, so, count, value_width);
                }
        }
}

template <class C, class S>
static void attention_backward(int threads, const S *g, const S *q, const S *k, const S *v, const S *out, const C *lse, S *dq, S *dk, S *dv,
                               const Heads &sg, const Heads &sq, const Heads &sk, const Heads &sv, const Heads &so, const Heads &sdq, const Heads &sdk, const Heads &sdv,
                               int64_t batch, int64_t held, int64_t shares, int64_t news, int64_t length, int64_t width, int64_t value_width, bool causal, C scale) {
    const int64_t keys = filled<C>(length), wide = filled<C>(width), value_wide = filled<C>(value_width);
    #pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < held; ++h) {
            Room<C> room(length * (2 * wide + value_wide + std::max(wide, value_wide)) + (width + value_width) * keys + QUERIES * (2 * wide + 2 * value_wide + 2 * keys));
            C *rows = room.array(length * std::max(wide, value_wide)), *columns = room.array(width * keys), *worths = room.array(value_width * keys);
            C *dk_of = room.array(length * wide), *dv_of = room.array(length * value_wide), *own_rows = room.array(length * wide);
            C *query = room.array(QUERIES * wide), *grad = room.array(QUERIES * value_wide), *weights = room.array(QUERIES * keys), *slopes = room.array(QUERIES * keys);
            C *dq_of = room.array(QUERIES * wide), *answer = room.array(QUERIES * value_wide);
            wide_rows(v + b * sv.batch + h * sv.head, sv, rows, value_wide, length, value_width);
            turned(rows, value_wide, worths, keys, length, value_width);
            wide_rows(k + b * sk.batch + h * sk.head, sk, own_rows, wide, length, width);
            turned(own_rows, wide, columns, keys, length, width);
            std::fill(dk_of, dk_of + length * wide, C(0));
            std::fill(dv_of, dv_of + length * value_wide, C(0));
            for (int64_t head = h * shares; head < (h + 1) * shares; ++head)
                for (int64_t first = 0; first < news; first += QUERIES) {
                    int64_t count = std::min(QUERIES, news - first), seen = causal ? std::min(length, first + count) : length;
                    wide_rows(q + b * sq.batch + head * sq.head + first * sq.row, sq, query, wide, count, width);
                    wide_rows(g + b * sg.batch + head * sg.head + first * sg.row, sg, grad, value_wide, count, value_width);
                    wide_rows(out + b * so.batch + head * so.head + first * so.row, so, answer, value_wide, count, value_width);
                    matrix_product(query, wide, 1, columns, keys, weights, keys, count, filled<C>(seen), width, false);
                    matrix_product(grad, value_wide, 1, worths, keys, slopes, keys, count, filled<C>(seen), value_width, false);
                    for (int64_t r = 0; r < count; ++r) {
                        C *__restrict w = weights + r * keys, *__restrict s = slopes + r * keys, inner = 0, least_of = lse[((b * held * shares) + head) * news + first + r];
                        int64_t own = causal ? std::min(length, first + r + 1) : length;
                        #pragma omp simd reduction(+:inner)
                        for (int64_t d = 0; d < value_wide; ++d) inner += answer[r * value_wide + d] * grad[r * value_wide + d];
                        for (int64_t at = 0; at < own; at += IN<C>) {
                            #pragma omp simd
                            for (int j = 0; j < int(IN<C>); ++j) {
                                C p = at + j < own ? exp_(w[at + j] * scale - least_of) : C(0), slope = p * (s[at + j] - inner) * scale;
                                w[at + j] = p;
                                s[at + j] = at + j < own ? slope : C(0);
                            }
                        }
                        for (int64_t j = filled<C>(own); j < filled<C>(seen); ++j) w[j] = s[j] = 0;
                    }
                    matrix_product(weights, 1, keys, grad, value_wide, dv_of, value_wide, seen, value_wide, count, true);
                    matrix_product(slopes, 1, keys, query, wide, dk_of, wide, seen, wide, count, true);
                    matrix_product(slopes, keys, 1, own_rows, wide, dq_of, wide, count, wide, seen, false);
                    narrow_rows(dq_of, wide, dq + b * sdq.batch + head * sdq.head + first * sdq.row, sdq, count, width);
                }
            narrow_rows(dk_of, wide, dk + b * sdk.batch + h * sdk.head, sdk, length, width);
            narrow_rows(dv_of, value_wide, dv + b * sdv.batch + h * sdv.head, sdv, length, value_width);
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

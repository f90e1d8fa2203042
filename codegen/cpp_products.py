"""C++ for matrix products of float32 on one thread: ``x @ w.t()``, ``g @ w`` and ``g.t() @ x`` of a step, by vectors or a CPU's matrix unit (cpp_tiles).

A library's product copies its operands into panels before it multiplies, and waits for the memory meanwhile: with the few hundred rows of a microbatch, for which no copy of a weight pays for itself, that
is a sixth of its time. Here a panel of the right operand is copied, turned if it must be, while the last rows meet the panel before, number by number between the vectors' instructions, and so are rows
of the left one while the rows before meet the first panel. All has been asked for before that, as have the results that sums are added to. How: Goto and van de Geijn, Anatomy of High-Performance Matrix
Multiplication (2008); blocks of DEPTH, tiles of ROWS x 2 vectors in registers.
"""

from __future__ import annotations

from deepseed.codegen import cpp_tiles

_VECTORS = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int BYTES = 64, ROWS = 14;
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 6;
#elif defined(__aarch64__)
constexpr int BYTES = 16, ROWS = 14;
#else
constexpr int BYTES = 16, ROWS = 6;
#endif
typedef float V __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / 4, WIDTH = 2 * LANES, LINE = 16;  // elements of a vector, of a panel, of a line of the cache
constexpr int64_t DEPTH = 384, BLOCK = 18 * ROWS;                   // a panel of DEPTH, and BLOCK rows of the left operand, stay in the second cache
constexpr int64_t HALF = DEPTH / 2;                                 // so many products are added up at most before their sum is added to others: rounding grows with their number
constexpr int64_t LONG = DEPTH + LINE;                              // a row of the left block; no power of two, so that rows do not meet in a set of the cache
constexpr int LEAST = ROWS - 2;                                     // rows of a tile, where there are 85 of them and more
constexpr int64_t NEAR = 8;                                         // rows of a panel that are asked for before they are read
constexpr int64_t SHARES = 4, PIECES = WIDTH / SHARES;              // the last SHARES tiles of a panel lay the next one, each PIECES of its columns

static inline V load(const float *p) { V v; memcpy(&v, p, BYTES); return v; }
static inline void store(float *p, V v) { memcpy(p, &v, BYTES); }

struct Ahead {  // what is asked for during a tile: each LINE of its depth two lines of the next panel, and those of a row of the next tile's results
    const float *panel;
    int64_t step, second;
    const float *results;
};

enum How { NOTHING, TURNED, COPIED, LEFT, LEFT_TURNED };
struct Next {  // what is laid during a tile: a share of the next panel (PIECES of its columns, or every SHARES-th of its rows), or LINE rows of the left block
    const float *from;
    int64_t step;
    float *to;
};

struct Start {  // what sums begin with: rows of numbers, one row for all (row = 0), or nothing
    const float *x;
    int64_t row;
    const float *at(int64_t i) const { return x + i * row; }
};

// A LINE of a row as a column, number by number: vectors are busy, and what moves single numbers is not
template <int64_t row> static inline __attribute__((always_inline)) void piece(const float *from, float *to) {
    #pragma GCC unroll 16
    for (int i = 0; i < LINE; ++i) {
        uint32_t x;
        memcpy(&x, from + i, 4);
        asm("" : "+r"(x));
        memcpy(to + i * row, &x, 4);
    }
}

// c[R, WIDTH] = start + a[R, depth] panel[depth, WIDTH], and as many whole LINEs of what is laid meanwhile. Arguments in structs are given by their address: copies of them that vectors make wait until
// the results before have reached the cache. The first half's sums stand aside: rows of results that lie some KiB apart meet in a set of the cache
template <int R, How HOW>
static void tile(int64_t depth, const float *a, const float *panel, float *c, int64_t c_row, const Start &before, float *half, const Ahead &ahead, const Next &share) {
    Start start = before;
    Ahead next = ahead;
    Next laid = share;
    V sums[R][2];
    for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = V{};
    auto add = [&](V left, V right) __attribute__((always_inline)) {
        #pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            V x = a[i * LONG] - V{};
            sums[i][0] += x * left;
            sums[i][1] += x * right;
        }
        ++a;
        panel += WIDTH;
    };
    for (int64_t k = 0, until = depth > HALF ? (depth / 2 + LINE - 1) / LINE * LINE : depth;; until = depth, start = {half, WIDTH}) {
        for (; k + LINE <= until; k += LINE) {
            __builtin_prefetch(next.panel, 0, 2);
            __builtin_prefetch(next.panel + next.second, 0, 2);
            __builtin_prefetch(next.results, 1, 3);
            __builtin_prefetch(next.results + LINE, 1, 3);
            next.panel += next.step;
            next.results += c_row;
            const float *soon = a + LINE;
            #pragma GCC unroll 4
            for (int u = 0; u < LINE; ++u) {
                if (HOW == TURNED && u % (LINE / PIECES) == 0) {
                    const float *from = laid.from + u * PIECES / LINE * laid.step;
                    __builtin_prefetch(from + 2 * LINE, 0, 3);
                    piece<WIDTH>(from, laid.to + u * PIECES / LINE);
                }
                if (HOW == COPIED && u % SHARES == 0) {
                    const float *from = laid.from + u * laid.step;
                    __builtin_prefetch(from + 2 * LINE * laid.step, 0, 3);
                    __builtin_prefetch(from + 2 * LINE * laid.step + LANES, 0, 3);
                    memcpy(laid.to + u * WIDTH, from, 4 * WIDTH);
                }
                if (HOW == LEFT || HOW == LEFT_TURNED) {
                    const float *from = laid.from + u * laid.step;
                    __builtin_prefetch(laid.to + u * LONG + LINE, 1, 3);
                    __builtin_prefetch(HOW == LEFT ? from + 2 * LINE : from + LINE / 4 * laid.step, 0, 3);
                    if (HOW == LEFT_TURNED) __builtin_prefetch(from + 2 * LINE * laid.step, 0, 2);  // its rows may meet in a set of the first cache
                    HOW == LEFT ? (void)memcpy(laid.to + u * LONG, from, 4 * LINE) : piece<LONG>(from, laid.to + u);
                }
                __builtin_prefetch(panel + NEAR * WIDTH, 0, 3);
                __builtin_prefetch(panel + NEAR * WIDTH + LANES, 0, 3);
                __builtin_prefetch(soon + u * LONG, 0, 3);
                add(load(panel), load(panel + LANES));
            }
            laid.from += HOW == TURNED || HOW == LEFT ? LINE : LINE * laid.step;
            laid.to += HOW == LEFT || HOW == LEFT_TURNED ? LINE : LINE * WIDTH;
        }
        for (; k < until; ++k) add(load(panel), load(panel + LANES));
        #pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            float *to = until < depth ? half + i * WIDTH : c + i * c_row;
            if (start.x) sums[i][0] += load(start.at(i)), sums[i][1] += load(start.at(i) + LANES);
            store(to, sums[i][0]);
            store(to + LANES, sums[i][1]);
            sums[i][0] = sums[i][1] = V{};
        }
        if (until == depth) return;
    }
}
using Tile = void (*)(int64_t, const float *, const float *, float *, int64_t, const Start &, float *, const Ahead &, const Next &);
template <int... R> static Tile tile_of(int rows, How how, std::integer_sequence<int, R...>) {
    static constexpr Tile known[][sizeof...(R)] = {{tile<LEAST + R, NOTHING>...}, {tile<LEAST + R, TURNED>...}, {tile<LEAST + R, COPIED>...}, {tile<LEAST + R, LEFT>...}, {tile<LEAST + R, LEFT_TURNED>...}};
    return known[how][rows - LEAST];
}
static Tile tile_of(int rows, How how) { return tile_of(rows, how, std::make_integer_sequence<int, ROWS - LEAST + 1>()); }

// to[LINE, LINE of row] = the columns of LINE rows
template <int64_t row> static inline void turn(const float *b, int64_t b_column, float *to) {
#if defined(__AVX512F__)
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        __m512 r[4];
        #pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float *from = b + i * b_column + 4 * q;
            r[i] = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * b_column), 1);
            r[i] = _mm512_insertf32x4(_mm512_insertf32x4(r[i], _mm_loadu_ps(from + 8 * b_column), 2), _mm_loadu_ps(from + 12 * b_column), 3);
        }
        __m512d low = (__m512d)_mm512_unpacklo_ps(r[0], r[1]), high = (__m512d)_mm512_unpackhi_ps(r[0], r[1]);
        __m512d low_ = (__m512d)_mm512_unpacklo_ps(r[2], r[3]), high_ = (__m512d)_mm512_unpackhi_ps(r[2], r[3]);
        store(to + (4 * q + 0) * row, (V)_mm512_unpacklo_pd(low, low_));
        store(to + (4 * q + 1) * row, (V)_mm512_unpackhi_pd(low, low_));
        store(to + (4 * q + 2) * row, (V)_mm512_unpacklo_pd(high, high_));
        store(to + (4 * q + 3) * row, (V)_mm512_unpackhi_pd(high, high_));
    }
#else
    for (int k = 0; k < LINE; ++k)
        for (int j = 0; j < LANES; ++j) to[k * row + j] = b[j * b_column + k];
#endif
}
"""
_PRODUCT = r"""
// A panel of `width` columns, filled up with zeros
static void lay(float *panel, const float *b, int64_t b_row, int64_t b_column, int64_t depth, int64_t width) {
    int64_t k = 0;
    if (b_row == 1 && width == WIDTH)
        for (; k + LINE <= depth; k += LINE)
            for (int64_t j = 0; j < WIDTH; j += LANES) turn<WIDTH>(b + j * b_column + k, b_column, panel + k * WIDTH + j);
    for (; b_column == 1 && width == WIDTH && k < depth; ++k) memcpy(panel + k * WIDTH, b + k * b_row, 4 * WIDTH);
    for (; k < depth; ++k)
        for (int64_t j = 0; j < WIDTH; ++j) panel[k * WIDTH + j] = j < width ? b[k * b_row + j * b_column] : 0;
}

// c[rows, columns] = start + a[rows, depth] b[depth, columns] for 85 rows and more; a lies row by row or column by column, c row by row, and it may be what the sums begin with
extern "C" void product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, int64_t b_column, const float *start, int64_t start_row, float *c, int64_t rows, int64_t all, int64_t columns) {
#ifdef TILES
    if (all && tiles::usable()) return tiles::product(a, a_row, a_column, b, b_row, b_column, {start, start_row}, c, rows, all, columns);
#endif
    struct alignas(64) Lines { float x[LINE]; };
    constexpr int64_t PANEL = DEPTH * WIDTH, MOST = BLOCK * 3 / 2 + ROWS;
    thread_local std::unique_ptr<Lines[]> room(new Lines[(2 * PANEL + ROWS * WIDTH + MOST * LONG) / LINE + 1]);
    float *panel = room[0].x, *other = panel + PANEL, *edge = other + PANEL, *block = edge + ROWS * WIDTH;
    bool laid = false;
    int64_t blocks = std::max<int64_t>(1, (rows + BLOCK / 2) / BLOCK);
    for (int64_t i = 0; !all && i < rows * columns; ++i) c[i] = start ? start[i / columns * start_row + i % columns] : 0;
    for (int64_t k = 0; k < all; k += DEPTH)
        for (int64_t n = 0; n < blocks; ++n) {
            int64_t begin = rows * n / blocks / LINE * LINE, end = n + 1 < blocks ? rows * (n + 1) / blocks / LINE * LINE : rows, count = end - begin;
            int64_t tiles = (count + ROWS - 1) / ROWS, depth = std::min(DEPTH, all - k), lines = depth / LINE * LINE;
            const float *left = a + begin * a_row + k * a_column;  // [count, depth]: its first rows, and what is no whole LINE, are copied here, others during the first panel's tiles
            How rest = a_column == 1 ? LEFT : LEFT_TURNED;
            for (int64_t i = 0; i < LINE; i += rest == LEFT ? 1 : LINE)
                for (int64_t d = 0; d < lines; d += rest == LEFT ? LINE : LANES) {
                    const float *from = left + i * a_row + d * a_column;
                    float *to = block + i * LONG + d;
                    rest == LEFT ? (void)memcpy(to, from, sizeof(Lines)) : turn<LONG>(from, a_column, to);
                }
            for (int64_t i = 0; i < count; ++i)
                for (int64_t d = lines; d < depth; ++d) block[i * LONG + d] = left[i * a_row + d * a_column];
            bool idle = LINE * (tiles - SHARES + 1) >= count;  // whether the first panel's last tiles have no rows to lay
            for (int64_t j = 0; j < columns; j += WIDTH) {
                int64_t width = std::min(WIDTH, columns - j), follows = j + WIDTH < columns ? j + WIDTH : 0, deeper = follows ? k : k + (n + 1 == blocks) * DEPTH;
                const float *after = b + (deeper < all ? deeper : 0) * b_row + follows * b_column;
                if (!laid) lay(panel, b + k * b_row + j * b_column, b_row, b_column, depth, width);
                laid = (j || idle) && deeper + depth <= all && follows + WIDTH <= columns && (b_row == 1 || b_column == 1);  // all of it, and as deep as this one
                for (int64_t t = 0; t < tiles; ++t) {
                    int64_t first = count * t / tiles, held = count * (t + 1) / tiles - first, at = t * (DEPTH / LINE);
                    Ahead next{after, 0, 0, c + (begin + (t + 1 < tiles ? count * (t + 1) / tiles : 0)) * columns + (t + 1 < tiles ? j : follows)};
                    if (b_column == 1 && at < DEPTH) next = {after + at * b_row, b_row, LINE, next.results};
                    else if (b_column != 1 && 2 * t < WIDTH) next = {after + 2 * t * b_column, LINE, b_column, next.results};
                    float *to = c + (begin + first) * columns + j;
                    bool whole = width == WIDTH;
                    Start before = k ? Start{to, columns} : start ? Start{start + (begin + first) * start_row + j, start_row} : Start{};
                    int64_t share = t - (tiles - SHARES);
                    How how = !laid || share < 0 ? NOTHING : b_column == 1 ? COPIED : TURNED;
                    Next more = how == TURNED ? Next{after + share * PIECES * b_column, b_column, other + share * PIECES} : Next{after + share * b_row, b_row, other + share * WIDTH};
                    if (!j && LINE * (t + 1) < count) {
                        int64_t from = std::min(LINE * (t + 1), count - LINE);
                        how = rest;
                        more = {left + from * a_row, rest == LEFT ? a_row : a_column, block + from * LONG};
                    }
                    tile_of(held, how)(depth, block + first * LONG, panel, whole ? to : edge, whole ? columns : WIDTH, whole ? before : Start{}, edge, next, more);
                    if (!whole)
                        for (int64_t i = 0; i < held; ++i)
                            for (int64_t l = 0; l < width; ++l) to[i * columns + l] = edge[i * WIDTH + l] + (before.x ? before.at(i)[l] : 0);
                }
                if (!laid) continue;
                for (int64_t l = depth / LINE * LINE; l < depth; ++l)
                    for (int64_t i = 0; i < WIDTH; ++i) other[l * WIDTH + i] = after[l * b_row + i * b_column];
                std::swap(panel, other);
            }
        }
}
// Whether a matrix unit computes them here
extern "C" int in_tiles() {
#ifdef TILES
    return tiles::usable();
#else
    return 0;
#endif
}
"""
SOURCE = _VECTORS + cpp_tiles.SOURCE + _PRODUCT

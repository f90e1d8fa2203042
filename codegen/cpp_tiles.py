"""C++ for the same products by the matrix unit of a CPU that has one for bfloat16 (Intel's AMX): 16 times the multiplications of its vectors, of which a float32 needs six.

Each operand is the exact sum of three numbers of bfloat16, x = x1 + x2 + x3, each rounded to nearest; of their nine products the six that a float32 can show are added in float32, the small ones
first. What is left out is at most 2 half units of |a| |b|, where rounding every sum may lose ``depth`` of them: float32's own accuracy (Henry, Tang and Heinecke, Leveraging the bfloat16
Artificial Intelligence Datatype For Higher-Precision Computations, 2019). Where a sum is not finite, or below 2^-90, its tile is made again by vectors, so that infinities, overflow and small numbers
are float32's own: the unit takes what is below 2^-126 for zero, parts of products too. Two numbers whose own product is below that count as zero.

A tile of sums takes some 3,000 cycles of the unit and few of the rest of the core, which meanwhile writes the sums of the tile before, and cuts the next panel of the right operand into its parts.
"""

from __future__ import annotations

SOURCE = r"""
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <cstdint>
#include <memory>
#include <immintrin.h>
namespace tiles {
typedef uint16_t Word;
constexpr int64_t SIDE = 32, PARTS = 3, TILE = 16 * 32;       // a square of each operand is 2 tiles of 16 x 32 words for each part
constexpr int64_t SQUARE = PARTS * 2 * TILE, DEPTH = 256;      // words of a square; what is summed up before it is added to the results
constexpr int64_t GROUP = DEPTH / SIDE * SQUARE, MOST = 512;   // words of 32 rows or columns of DEPTH; rows of the left operand that stay in the second cache
constexpr int64_t LAYING = 4, UNITS = LAYING + 32;             // pieces of work of packing a square

static bool usable() {  // Linux gives a process the unit's registers when it asks for them
    static const bool given = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return given;
}

struct Parts { __m512i of[PARTS]; };
// The three parts of two vectors, as words: one vector after the other
static inline Parts in_rows(__m512 one, __m512 two) {
    Parts found;
    #pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) {
        __m512i both = found.of[p] = (__m512i)_mm512_cvtne2ps_pbh(two, one);
        one -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
        two -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
    }
    return found;
}
// in pairs: each word of one beside that of the other
static inline Parts in_pairs(__m512 one, __m512 two) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    Parts found;
    #pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) {
        __m512i both = found.of[p] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(two, one));
        one -= (__m512)_mm512_slli_epi32(both, 16);
        two -= (__m512)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
    }
    return found;
}
static inline void store(Word *to, const Parts &parts) {
    #pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) _mm512_store_si512(to + p * 2 * TILE, parts.of[p]);
}

// A square of a matrix, [down, right]; zeros beyond its end
struct Square {
    const float *x;
    int64_t row, column, down, right;
    bool lies() const { return column == 1 && down >= SIDE && right >= SIDE; }
    // a quarter of it, in room[SIDE, SIDE]
    void lay(int64_t quarter, float *room) const {
        int64_t u = quarter / 2 * 16, v = quarter % 2 * 16;
        if (row == 1 && down >= SIDE && right >= SIDE) return turn<SIDE>(x + u + v * column, column, room + u * SIDE + v);
        for (int64_t i = u; i < u + 16; ++i)
            for (int64_t j = v; j < v + 16; ++j) room[i * SIDE + j] = i < down && j < right ? x[i * row + j * column] : 0;
    }
};

// The right operand's next panel of SIDE columns, a piece at a time
struct Packing {
    Square first;
    Word *to;
    float *room;
    int64_t at = 0, last = 0;
    const float *from = nullptr;
    int64_t from_row = 0;
    void one() {
        int64_t s = at / UNITS, piece = at % UNITS;
        if (piece < LAYING) {
            Square now{first.x + s * SIDE * first.row, first.row, first.column, first.down - s * SIDE, first.right};
            bool lies = now.lies();
            from = lies ? now.x : room, from_row = lies ? now.row : SIDE;
            if (!lies) now.lay(piece, room);
            at += lies ? LAYING : 1;
        } else {
            int64_t u = (piece - LAYING) / 2, half = (piece - LAYING) % 2;
            const float *pair = from + 2 * u * from_row + 16 * half;
            store(to + s * SQUARE + half * TILE + u * 32, in_pairs(_mm512_loadu_ps(pair), _mm512_loadu_ps(pair + from_row)));
            ++at;
        }
    }
};

// Sums of a tile [rows of SIDE] and where they go: first each row is looked at, then each is written. Products of parts that are below 2^-126 are zero, of which DEPTH could be half a unit of a sum below LEAST
constexpr uint32_t LEAST = (127 - 90) << 23;  // 2^-90
struct Sums {
    float *sums, *room, *to;
    Start start;
    int64_t to_row, rows, columns, at;
    const float *a, *b;  // what they are sums of
    int64_t a_row, a_column, b_row, b_column, depth;
    __m512 seen;
    __m512i least;
    int64_t left() const { return 2 * rows - at; }
    void one() {
        int64_t i = at < rows ? at : at - rows;
        __m512 low = _mm512_load_ps(sums + i * SIDE), high = _mm512_load_ps(sums + i * SIDE + 16);
        if (at++ < rows) {
            __m512i one = _mm512_set1_epi32(1), u = _mm512_sub_epi32(_mm512_slli_epi32((__m512i)low, 1), one), v = _mm512_sub_epi32(_mm512_slli_epi32((__m512i)high, 1), one);  // magnitudes; zero is the largest
            seen = _mm512_fmadd_ps(low, _mm512_setzero_ps(), _mm512_fmadd_ps(high, _mm512_setzero_ps(), seen));  // zero, or no number
            least = _mm512_min_epu32(_mm512_min_epu32(u, v), least);
            if (at == rows && (_mm512_cmp_ps_mask(seen, seen, _CMP_UNORD_Q) | _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(2 * LEAST - 1)))) again();
            return;
        }
        __mmask32 held = (uint32_t)(((uint64_t)1 << columns) - 1);
        float *out = to + i * to_row;
        if (start.x) low += _mm512_maskz_loadu_ps((__mmask16)held, start.at(i)), high += _mm512_maskz_loadu_ps((__mmask16)(held >> 16), start.at(i) + 16);
        _mm512_mask_storeu_ps(out, (__mmask16)held, low), _mm512_mask_storeu_ps(out + 16, (__mmask16)(held >> 16), high);
    }
    void again() {
        std::fill(sums, sums + rows * SIDE, 0.f);
        for (int64_t k = 0; k < depth; k += SIDE) {
            Square now{b + k * b_row, b_row, b_column, depth - k, columns};
            for (int64_t q = 0; q < LAYING; ++q) now.lay(q, room);
            for (int64_t i = 0; i < rows; ++i) {
                __m512 low = _mm512_load_ps(sums + i * SIDE), high = _mm512_load_ps(sums + i * SIDE + 16);
                for (int64_t u = 0; u < std::min(SIDE, depth - k); ++u) {
                    __m512 x = _mm512_set1_ps(a[i * a_row + (k + u) * a_column]);
                    low = _mm512_fmadd_ps(x, _mm512_load_ps(room + u * SIDE), low), high = _mm512_fmadd_ps(x, _mm512_load_ps(room + u * SIDE + 16), high);
                }
                _mm512_store_ps(sums + i * SIDE, low), _mm512_store_ps(sums + i * SIDE + 16, high);
            }
        }
    }
};

// sums[SIDE, SIDE] = left right, of so many squares; `between` is called while the unit works
template <class Between> static inline __attribute__((always_inline)) void sum(const Word *left, const Word *right, int64_t squares, float *sums, Between between) {
#define LEFT(p) _tile_loadd(4, left + s * SQUARE + p * 2 * TILE, 64); _tile_loadd(5, left + s * SQUARE + (p * 2 + 1) * TILE, 64);
#define RIGHT(p) _tile_loadd(6, right + s * SQUARE + p * 2 * TILE, 64); _tile_loadd(7, right + s * SQUARE + (p * 2 + 1) * TILE, 64);
#define ADD _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); between();
    __asm__ volatile("" ::: "memory");  // what was packed is in memory: a compiler is not told that tiles are loaded from there
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t s = 0; s < squares; ++s) {
        LEFT(2) RIGHT(0) ADD
        LEFT(1) ADD
        RIGHT(1) ADD
        LEFT(0) ADD
        RIGHT(2) ADD
    }
    for (int64_t s = 0; s < squares; ++s) { LEFT(0) RIGHT(0) ADD }
#undef LEFT
#undef RIGHT
#undef ADD
    _tile_stored(0, sums, 4 * SIDE); _tile_stored(1, sums + 16, 4 * SIDE); _tile_stored(2, sums + 16 * SIDE, 4 * SIDE); _tile_stored(3, sums + 16 * SIDE + 16, 4 * SIDE);
}
constexpr int64_t CALLS = 6;  // of `between`, for each square

static int64_t share(int64_t work, int64_t among) { return (std::max<int64_t>(work, 0) + among - 1) / among; }

static void product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, int64_t b_column, Start start, float *c, int64_t rows, int64_t all, int64_t columns) {
    struct alignas(64) Lines { Word x[32]; };
    thread_local std::unique_ptr<Lines[]> room(new Lines[(MOST / SIDE + 2) * GROUP / 32 + 4 * SIDE * SIDE / 16]);
    Word *left = room[0].x, *right[2] = {left + MOST / SIDE * GROUP, left + (MOST / SIDE + 1) * GROUP};
    float *sums[2] = {(float *)(right[1] + GROUP), (float *)(right[1] + GROUP) + SIDE * SIDE}, *square = sums[1] + SIDE * SIDE, *spare = square + SIDE * SIDE;
    struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64}; uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16}; } shapes;
    _tile_loadconfig(&shapes);
    for (int64_t top = 0; top < rows; top += MOST) {
        int64_t count = std::min(MOST, rows - top), groups = share(count, SIDE);
        for (int64_t k = 0; k < all; k += DEPTH) {
            int64_t depth = std::min(DEPTH, all - k), squares = share(depth, SIDE), calls = CALLS * squares;
            for (int64_t g = 0; g < groups; ++g)
                for (int64_t s = 0; s < squares; ++s) {
                    Square now{a + (top + g * SIDE) * a_row + (k + s * SIDE) * a_column, a_row, a_column, count - g * SIDE, depth - s * SIDE};
                    if (!now.lies())
                        for (int64_t q = 0; q < LAYING; ++q) now.lay(q, square);
                    const float *x = now.lies() ? now.x : square;
                    for (int64_t i = 0, row = now.lies() ? a_row : SIDE; i < SIDE; ++i, x += row)
                        store(left + g * GROUP + s * SQUARE + i * 32, in_rows(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)));
                }
            auto panel = [&](int64_t j, int which) { return Packing{{b + k * b_row + j * b_column, b_row, b_column, depth, columns - j}, right[which], square, 0, squares * UNITS}; };
            Sums before{};
            Packing packing = panel(0, 0);
            while (packing.at < packing.last) packing.one();
            int which = 0, other = 0;
            for (int64_t j = 0; j < columns; j += SIDE, which ^= 1) {
                packing = j + SIDE < columns ? panel(j + SIDE, which ^ 1) : Packing{};
                const float *after = b + k * b_row + (j + 2 * SIDE) * b_column;  // is asked for now, and packed during the next panel
                int64_t lines = j + 3 * SIDE <= columns ? 2 * depth : 0, line = 0;
                for (int64_t g = 0; g < groups; ++g) {
                    int64_t held = std::min(SIDE, count - g * SIDE), row = 0, ask = lines * (g + 1) / groups, pack = packing.last * (g + 1) / groups;
                    int64_t asks = share(ask - line, calls), shows = share(held, calls), packs = share(pack - packing.at, calls), writes = share(before.left(), calls);
                    float *to = c + (top + g * SIDE) * columns + j;
                    sum(left + g * GROUP, right[which], squares, sums[other], [&]() __attribute__((always_inline)) {
                        for (int64_t n = 0; n < asks && line < ask; ++n, ++line)
                            __builtin_prefetch(b_column == 1 ? after + line / 2 * b_row + line % 2 * 16 : after + line % SIDE * b_column + line / SIDE * 16, 0, 2);
                        for (int64_t n = 0; n < shows && row < held; ++n, ++row) __builtin_prefetch(to + row * columns, 1, 3), __builtin_prefetch(to + row * columns + 16, 1, 3);
                        for (int64_t n = 0; n < writes && before.left(); ++n) before.one();
                        for (int64_t n = 0; n < packs && packing.at < pack; ++n) packing.one();
                    });
                    while (before.left()) before.one();
                    while (packing.at < pack) packing.one();
                    const float *x = a + (top + g * SIDE) * a_row + k * a_column, *y = b + k * b_row + j * b_column;
                    Start begin = k ? Start{to, columns} : start.x ? Start{start.at(top + g * SIDE) + j, start.row} : Start{};
                    before = Sums{sums[other], spare, to, begin, columns, held, std::min(SIDE, columns - j), 0, x, y, a_row, a_column, b_row, b_column, depth, _mm512_setzero_ps(), _mm512_set1_epi32(-1)};
                    other ^= 1;
                }
            }
            while (before.left()) before.one();
        }
    }
    _tile_release();
}
}  // namespace tiles
#endif
"""

// A CPU's matrix unit for bfloat16 (Intel's AMX) in software, before deepseed.codegen.cpp_tiles where the CPU has none: tiles of 16 rows of 64 bytes; numbers below 2^-126 are zero, in operands and in sums.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#undef __AMX_BF16__
namespace unit {
static thread_local uint32_t tiles[8][16][16];
static inline float kept(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
static inline float number(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static void load(int t, const void *from, int64_t step) { for (int i = 0; i < 16; ++i) memcpy(tiles[t][i], (const char *)from + i * step, 64); }
static void put(int t, void *to, int64_t step) { for (int i = 0; i < 16; ++i) memcpy((char *)to + i * step, tiles[t][i], 64); }
static void dot(int d, int a, int b) {  // of each sum two products at a time, the lower words first
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) {
                float sum = number(tiles[d][m][n]);
                sum = kept(std::fma(kept(number(tiles[a][m][k] << 16)), kept(number(tiles[b][k][n] << 16)), sum));
                sum = kept(std::fma(kept(number(tiles[a][m][k] & 0xffff0000u)), kept(number(tiles[b][k][n] & 0xffff0000u)), sum));
                memcpy(&tiles[d][m][n], &sum, 4);
            }
}
}  // namespace unit
#define _tile_loadd(t, from, step) unit::load(t, from, step)
#define _tile_stored(t, to, step) unit::put(t, to, step)
#define _tile_zero(t) memset(unit::tiles[t], 0, sizeof unit::tiles[t])
#define _tile_dpbf16ps(d, a, b) unit::dot(d, a, b)
#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define __AMX_BF16__ 1

/* The words of Philox4x32-10 for the blocks of one draw, as the radii and angles of the Box-Muller method.

   The loop is that of diffaccel/noise/philox.py. host.py calls it with ctypes; where the package was built without
   it, host.py computes the same numbers, to the bit, with PyTorch. */
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

/* The widest instructions of the machine that runs it, not of the one that compiled it. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__linux__)
#define EVERY_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_MACHINE
#endif

static const uint32_t ROUNDS = 10, MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;

/* index: (streams,); keys: (10, 2), of each round; radius, angle: (2, streams, blocks), of words 0, 2 and words 1, 3. */
EVERY_MACHINE EXPORT void radii_and_angles(const uint64_t *index, size_t streams, size_t blocks, uint32_t draw,
                                           const uint32_t *keys, float unit, float *radius, float *angle)
{
    for (size_t stream = 0; stream < streams; stream++) {
        const uint32_t high = (uint32_t)(index[stream] >> 32), low = (uint32_t)index[stream];
        float *r = radius + stream * blocks, *a = angle + stream * blocks;
        float *r_2 = r + streams * blocks, *a_2 = a + streams * blocks;
        for (uint32_t block = 0; block < (uint32_t)blocks; block++) {
            uint32_t c_0 = high, c_1 = block, c_2 = draw, c_3 = low;
            for (uint32_t round = 0; round < ROUNDS; round++) {
                const uint64_t p_0 = (uint64_t)c_0 * MULTIPLIER_0, p_1 = (uint64_t)c_2 * MULTIPLIER_1;
                c_0 = (uint32_t)(p_1 >> 32) ^ c_1 ^ keys[2 * round];
                c_2 = (uint32_t)(p_0 >> 32) ^ c_3 ^ keys[2 * round + 1];
                c_1 = (uint32_t)p_1;
                c_3 = (uint32_t)p_0;
            }
            r[block] = (float)c_0 * 0x1p-32f + 0x1p-33f;
            a[block] = (float)c_1 * unit;
            r_2[block] = (float)c_2 * 0x1p-32f + 0x1p-33f;
            a_2[block] = (float)c_3 * unit;
        }
    }
}

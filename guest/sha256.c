/* SHA-256 (FIPS 180-4, sections 4.1.2, 5.1.1 and 6.2), unrolled; compiled with -O2. */
#include "sha256.h"

#include <string.h>

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

#define ROR(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define SUM0(x) (ROR(x, 2) ^ ROR(x, 13) ^ ROR(x, 22))
#define SUM1(x) (ROR(x, 6) ^ ROR(x, 11) ^ ROR(x, 25))
#define SIGMA0(x) (ROR(x, 7) ^ ROR(x, 18) ^ (x) >> 3)
#define SIGMA1(x) (ROR(x, 17) ^ ROR(x, 19) ^ (x) >> 10)
#define CHOOSE(e, f, g) ((g) ^ ((e) & ((f) ^ (g))))
#define MAJORITY(a, b, c) (((a) & (b)) | ((c) & ((a) | (b))))

/* One round; the caller rotates the names instead of the values. */
#define ROUND(a, b, c, d, e, f, g, h, i, word)                          \
    do {                                                                \
        uint32_t t = (h) + SUM1(e) + CHOOSE(e, f, g) + K[i] + (word);   \
        (d) += t;                                                       \
        (h) = t + SUM0(a) + MAJORITY(a, b, c);                          \
    } while (0)

#define EIGHT(i, W)                             \
    ROUND(a, b, c, d, e, f, g, h, (i) + 0, W(0)); \
    ROUND(h, a, b, c, d, e, f, g, (i) + 1, W(1)); \
    ROUND(g, h, a, b, c, d, e, f, (i) + 2, W(2)); \
    ROUND(f, g, h, a, b, c, d, e, (i) + 3, W(3)); \
    ROUND(e, f, g, h, a, b, c, d, (i) + 4, W(4)); \
    ROUND(d, e, f, g, h, a, b, c, (i) + 5, W(5)); \
    ROUND(c, d, e, f, g, h, a, b, (i) + 6, W(6)); \
    ROUND(b, c, d, e, f, g, h, a, (i) + 7, W(7))

/* The message schedule in a ring of 16 words. */
#define NEXT(j) \
    (w[j] += SIGMA1(w[((j) + 14) & 15]) + w[((j) + 9) & 15] + SIGMA0(w[((j) + 1) & 15]))
#define NEXT_LOW(j) NEXT(j)
#define NEXT_HIGH(j) NEXT((j) + 8)
#define FIRST_LOW(j) w[j]
#define FIRST_HIGH(j) w[(j) + 8]

static uint32_t big_endian(const uint8_t *p)
{
    uint32_t word;

    memcpy(&word, p, sizeof word);
    return __builtin_bswap32(word);
}

static void compress(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    uint32_t w[16];

    for (; blocks; blocks--, data += 64) {
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

        for (int i = 0; i < 16; i++)
            w[i] = big_endian(data + 4 * i);
        EIGHT(0, FIRST_LOW);
        EIGHT(8, FIRST_HIGH);
        for (int i = 16; i < 64; i += 16) {
            EIGHT(i, NEXT_LOW);
            EIGHT(i + 8, NEXT_HIGH);
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

void sha256_init(struct sha256 *hash)
{
    static const uint32_t start[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };

    memcpy(hash->state, start, sizeof start);
    hash->length = 0;
}

void sha256_update(struct sha256 *hash, const void *data, size_t size)
{
    const uint8_t *bytes = data;
    size_t used = hash->length % 64;

    hash->length += size;
    if (used) {
        size_t take = 64 - used < size ? 64 - used : size;

        memcpy(hash->block + used, bytes, take);
        bytes += take;
        size -= take;
        if (used + take < 64)
            return;
        compress(hash->state, hash->block, 1);
    }
    compress(hash->state, bytes, size / 64);
    if (size % 64)
        memcpy(hash->block, bytes + size / 64 * 64, size % 64);
}

void sha256_final(struct sha256 *hash, uint8_t digest[32])
{
    static const uint8_t padding[64] = {0x80};
    uint64_t bits = __builtin_bswap64(hash->length * 8);

    sha256_update(hash, padding, 1 + (119 - hash->length % 64) % 64);
    sha256_update(hash, &bits, sizeof bits);
    for (int i = 0; i < 8; i++) {
        uint32_t word = __builtin_bswap32(hash->state[i]);

        memcpy(digest + 4 * i, &word, sizeof word);
    }
}

void sha256_of(const void *data, size_t size, uint8_t digest[32])
{
    struct sha256 hash;

    sha256_init(&hash);
    sha256_update(&hash, data, size);
    sha256_final(&hash, digest);
}

/* Lines with a checksum, and base64: see port.h. */
#include "port.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* CRC-32 of ISO 3309, as zlib has it. */
static uint32_t crc32(const char *text, size_t size)
{
    static uint32_t table[256];
    uint32_t crc = 0xffffffffu;

    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;

            for (int bit = 0; bit < 8; bit++)
                value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
            table[i] = value;
        }
    for (size_t i = 0; i < size; i++)
        crc = table[(crc ^ (uint8_t)text[i]) & 255] ^ crc >> 8;
    return ~crc;
}

bool line_pending(const struct line *line)
{
    return line->at < line->size;
}

/* The text stands behind its first newline; a blank and the CRC follow. */
static void finish(struct line *line, size_t size)
{
    char *text = line->text + 1;

    line->text[0] = '\n';
    text[size++] = ' ';
    snprintf(text + size, 10, "%08x\n", (unsigned)crc32(text, size));
    line->size = 1 + size + 9;
    line->at = 0;
}

void line_make(struct line *line, const char *format, ...)
{
    va_list arguments;
    int size;

    va_start(arguments, format);
    size = vsnprintf(line->text + 1, 1024, format, arguments);
    va_end(arguments);
    if (size > 0 && size < 1024)
        finish(line, (size_t)size);
}

void line_make_data(struct line *line, const char *head, const uint8_t *data, size_t size)
{
    size_t at = strlen(head);
    char *text = line->text + 1;

    memcpy(text, head, at);
    for (size_t i = 0; i < size; i += 3) {
        size_t left = size - i;
        uint32_t three = (uint32_t)data[i] << 16 | (left > 1 ? (uint32_t)data[i + 1] << 8 : 0) |
                         (left > 2 ? data[i + 2] : 0);

        text[at++] = digits[three >> 18];
        text[at++] = digits[three >> 12 & 63];
        text[at++] = left > 1 ? digits[three >> 6 & 63] : '=';
        text[at++] = left > 2 ? digits[three & 63] : '=';
    }
    finish(line, at);
}

/* Whether a line ends with its CRC, which is cut off. */
static bool is_whole(char *text)
{
    char *last = strrchr(text, ' ');
    char wanted[9];

    if (!last || strlen(last + 1) != 8)
        return false;
    snprintf(wanted, sizeof(wanted), "%08x", (unsigned)crc32(text, (size_t)(last + 1 - text)));
    if (strcmp(wanted, last + 1))
        return false;
    *last = '\0';
    return true;
}

char *reader_next(struct reader *reader, size_t *taken)
{
    *taken = 0;
    for (;;) {
        char *start = reader->text + *taken;
        char *end = memchr(start, '\n', reader->size - *taken);

        if (!end) {
            if (!*taken && reader->size == sizeof(reader->text)) {
                reader->skip = true;
                *taken = reader->size;
            }
            return NULL;
        }
        *taken = (size_t)(end + 1 - reader->text);
        *end = '\0';
        if (reader->skip)
            reader->skip = false;
        else if (!memchr(start, '\0', (size_t)(end - start)) && is_whole(start))
            return start;
    }
}

void reader_drop(struct reader *reader, size_t taken)
{
    reader->size -= taken;
    memmove(reader->text, reader->text + taken, reader->size);
}

static int value_of(char digit)
{
    const char *found = digit ? strchr(digits, digit) : NULL;

    return found ? (int)(found - digits) : -1;
}

long decode(const char *text, uint8_t *room, size_t size)
{
    size_t length = strlen(text), made = 0;

    if (length % 4)
        return -1;
    for (size_t i = 0; i < length; i += 4) {
        bool last = i + 4 == length;
        int one = value_of(text[i]), two = value_of(text[i + 1]);
        int missing = !last || text[i + 3] != '=' ? 0 : text[i + 2] != '=' ? 1 : 2;
        int three = missing > 1 ? 0 : value_of(text[i + 2]);
        int four = missing > 0 ? 0 : value_of(text[i + 3]);

        if (one < 0 || two < 0 || three < 0 || four < 0)
            return -1;
        for (int byte = 0; byte < 3 - missing; byte++) {
            uint32_t bits = (uint32_t)one << 18 | (uint32_t)two << 12 | (uint32_t)three << 6 |
                            (uint32_t)four;

            if (made == size)
                return -1;
            room[made++] = (uint8_t)(bits >> (16 - 8 * byte));
        }
    }
    return (long)made;
}

bool is_id(const char *text)
{
    return strlen(text) == ID_SIZE - 1 && strspn(text, "0123456789abcdef") == ID_SIZE - 1;
}

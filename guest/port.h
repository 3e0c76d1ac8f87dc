/* Lines of the helper on a virtio port. The other side is provider/port.py.
 *
 *     WORD ID ARGUMENT... CRC
 *
 * Words are parted by one blank. A line begins with a newline, too, so that whatever a suspension
 * or a restart has cut off ends before it. CRC is the CRC-32 of all that stands before it, the
 * blank included, in eight hexadecimal digits; a line without it is none.
 */
#ifndef PORT_H
#define PORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PROTOCOL "1"
/* By this the host knows, while the guest sleeps, what a helper on its disk speaks. */
#define PROTOCOL_NAME "ouassister-port protocol " PROTOCOL
#define ID_SIZE 17u        /* 16 hexadecimal digits */
#define PART (48u << 10)   /* bytes that one line carries */
#define LINE_SIZE (96u << 10)
#define REQUEST_SIZE (8u << 20)

/* What is sent: one line at a time; the next is made once it is gone. */
struct line {
    char text[LINE_SIZE];
    size_t size, at;
};

/* What comes in, up to the next newline. */
struct reader {
    char text[LINE_SIZE];
    size_t size;
    bool skip; /* what is too long, up to its newline */
};

bool line_pending(const struct line *line);
void line_make(struct line *line, const char *format, ...) __attribute__((format(printf, 2, 3)));
void line_make_data(struct line *line, const char *head, const uint8_t *data, size_t size);

/* The next whole line of what was read, without its CRC; NULL when there is none. */
char *reader_next(struct reader *reader, size_t *taken);
void reader_drop(struct reader *reader, size_t taken);

/* How many bytes; -1: it is no base64, or has more than there is room for. */
long decode(const char *text, uint8_t *room, size_t size);
bool is_id(const char *text);

#endif

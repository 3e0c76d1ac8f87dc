#include "medium.h"
#include "disk.h"

#include "report.h"
#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BAD_MEDIUM "medium"
#define READ_AHEAD (32 << 20)

int medium_read(const struct medium *medium, void *buffer, uint64_t size, uint64_t offset)
{
    uint8_t *bytes = buffer;

    while (size) {
        ssize_t n = pread(medium->device, bytes, size, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail_errno("", "reading the medium");
        if (!n)
            return fail(BAD_MEDIUM, "", "the medium ends at byte %llu", (unsigned long long)offset);
        bytes += n;
        offset += (uint64_t)n;
        size -= (uint64_t)n;
    }
    return 0;
}

static bool hash_is(const void *data, size_t size, const uint8_t wanted[32])
{
    uint8_t digest[32];

    sha256_of(data, size, digest);
    return !memcmp(digest, wanted, sizeof digest);
}

static bool ends_with_nul(const char *field, size_t size)
{
    return memchr(field, 0, size);
}

/* Whether [offset, offset + size) lies in the medium, without overflow. */
static bool inside(uint64_t offset, uint64_t size, uint64_t limit)
{
    return offset <= limit && size <= limit - offset;
}

static int header_check(const struct medium *medium, const uint8_t header_sha256[32])
{
    const struct medium_header *header = &medium->header;
    uint64_t table_end;
    off_t end;

    if (memcmp(header->magic, MEDIUM_MAGIC, sizeof header->magic))
        return fail(BAD_MEDIUM, "", "there is no change set on this device");
    if (!hash_is(header, sizeof *header, header_sha256))
        return fail(BAD_MEDIUM, "", "the header is not the one that was announced");
    if (header->version != MEDIUM_VERSION || header->header_size != BLOCK)
        return fail(BAD_MEDIUM, "", "version %u of the medium is unknown", header->version);
    if (header->applier_offset != BLOCK || header->applier_size > MAX_APPLIER ||
        header->table_offset % BLOCK || header->table_size > MAX_TABLE ||
        header->table_size < sizeof(struct table_header) ||
        header->table_offset < BLOCK + header->applier_size ||
        header->layer_offset < BLOCK || header->medium_size > INT64_MAX ||
        !inside(header->table_offset, header->table_size, header->medium_size) ||
        !inside(header->layer_offset, header->layer_size, header->medium_size))
        return fail(BAD_MEDIUM, "", "the header's sizes contradict each other");
    table_end = header->table_offset + header->table_size;
    if (header->table_offset > BLOCK + MAX_APPLIER || header->layer_offset < table_end)
        return fail(BAD_MEDIUM, "", "the header's areas overlap");
    if (!ends_with_nul(header->boot_id, sizeof header->boot_id) ||
        !ends_with_nul(header->machine_id, sizeof header->machine_id))
        return fail(BAD_MEDIUM, "", "the guest's identity does not end");
    for (size_t i = 0; i < sizeof header->zero; i++)
        if (header->zero[i])
            return fail(BAD_MEDIUM, "", "the header has unknown fields");
    end = lseek(medium->device, 0, SEEK_END); /* of a block device too: its size */
    if (end < 0)
        return fail_errno("", "asking for the size of the medium");
    if ((uint64_t)end < header->medium_size)
        return fail(BAD_MEDIUM, "", "the medium has %lld bytes where %llu belong", (long long)end,
                    (unsigned long long)header->medium_size);
    return 0;
}

/* Applier area and table lie one after the other: one read for both. */
static int read_table(struct medium *medium)
{
    const struct medium_header *header = &medium->header;
    uint64_t size = header->table_offset + header->table_size - BLOCK;
    uint8_t *area = malloc(size);

    if (!area)
        return fail_errno("", "reserving memory for the table");
    medium->table = area;
    if (medium_read(medium, area, size, BLOCK) < 0)
        return -1;
    if (!hash_is(area, header->applier_size, header->applier_sha256))
        return fail(BAD_MEDIUM, "", "the applier on the medium is damaged");
    area += header->table_offset - BLOCK;
    if (!hash_is(area, header->table_size, header->table_sha256))
        return fail(BAD_MEDIUM, "", "the table of the change set is damaged");
    medium->counts = (const struct table_header *)(const void *)area;
    return table_check(medium);
}

int medium_open(struct medium *medium, const char *device, const uint8_t header_sha256[32])
{
    medium->device = disk_open(device);
    if (medium->device < 0)
        return fail_errno(device, "opening the medium");
    if (medium_read(medium, &medium->header, sizeof medium->header, 0) < 0 ||
        header_check(medium, header_sha256) < 0 || read_table(medium) < 0)
        return -1;
    /* Only a hint: the device reads while the guest's tree is checked. */
    posix_fadvise(medium->device, (off_t)medium->header.layer_offset,
                  medium->header.layer_size < READ_AHEAD ? (off_t)medium->header.layer_size
                                                         : READ_AHEAD,
                  POSIX_FADV_WILLNEED);
    return 0;
}

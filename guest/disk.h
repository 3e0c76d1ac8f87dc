/* Finds the medium among the guest's disks. */
#ifndef OUA_DISK_H
#define OUA_DISK_H

/* Opens a device: a path, or "serial:TEXT" for the disk whose driver shows that serial, which may
 * still be on its way. Returns a descriptor; -1 with errno set, ETIME when no such disk came. */
int disk_open(const char *device);

#endif

/* Operations on what files contain. */
#ifndef WORKLOAD_DATA_H
#define WORKLOAD_DATA_H

#include <stddef.h>

int append(int fd, size_t size);
int create_file(void);
int append_file(void);
int overwrite_file(void);
int write_far(void);
int write_direct(void);
int truncate_file(void);
int allocate(void);
int zero_range(void);
int punch_hole(void);
int collapse(void);
int insert_range(void);
int write_mapped(void);
int copy_range(void);

#endif

/* syscall_probe NUMBER:ARGUMENT,ARGUMENT... ...
 *
 * Makes each system call, straight from the command line, and prints what it returned. Built without a C library, for x86-64 and for i386: what it does
 * is what stands there. An argument is a number (0x, negative), "s" and a string, "b" and a size (zeroes), "x" and bytes in hex, "$" (what the last call
 * returned), or "&" and words of a long each, separated by dots, which may be arguments themselves. After the result come the buffers of "b", in hex.
 */
typedef unsigned long word;

#ifdef __x86_64__
static long call(long n, const word *a)
{
    long r;
    register word r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return r;
}
enum { WRITE = 1, EXIT = 60 };
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#else
static long call(long n, const word *a)
{
    long r;
    const word all[] = {(word)n, a[0], a[1], a[2], a[3], a[4], a[5]};
    __asm__ volatile("push %%ebx\n push %%ebp\n mov 4(%1), %%ebx\n mov 8(%1), %%ecx\n mov 12(%1), %%edx\n mov 16(%1), %%esi\n mov 20(%1), %%edi\n"
                     " mov 24(%1), %%ebp\n mov (%1), %%eax\n int $0x80\n pop %%ebp\n pop %%ebx"
                     : "=a"(r) : "0"(all) : "ecx", "edx", "esi", "edi", "memory");
    return r;
}
enum { WRITE = 4, EXIT = 1 };
__asm__(".globl _start\n_start: mov %esp, %eax\n and $-16, %esp\n sub $12, %esp\n push %eax\n call begin\n");
#endif

static char arena[1 << 16], out[1 << 16];
static word used, filled;
static long last;

static void put(char c)
{
    if (filled < sizeof out)
        out[filled++] = c;
}

static void put_number(long value)
{
    char digits[24];
    int n = 0;
    word left = value < 0 ? -(word)value : (word)value;
    if (value < 0)
        put('-');
    do
        digits[n++] = '0' + left % 10;
    while (left /= 10);
    while (n)
        put(digits[--n]);
}

static int nibble(char c)
{
    return c <= '9' ? c - '0' : c - 'a' + 10;
}

static char *take(word size)
{
    char *area = arena + used;
    used += (size + 15) & ~15UL;
    return area;
}

static word number(const char **at)
{
    int minus = **at == '-';
    word value = 0;
    *at += minus;
    if ((*at)[0] == '0' && (*at)[1] == 'x')
        for (*at += 2; (**at >= '0' && **at <= '9') || (**at >= 'a' && **at <= 'f'); ++*at)
            value = value * 16 + nibble(**at);
    else
        for (; **at >= '0' && **at <= '9'; ++*at)
            value = value * 10 + (**at - '0');
    return minus ? -value : value;
}

static word argument(const char **at, word *buffer, word *size)
{
    char *area;
    word n = 0;
    switch (**at) {
    case 's':
        area = take(4096);
        for (++*at; **at && **at != ','; ++*at)
            area[n++] = **at;
        return (word)area;
    case 'b':
        ++*at;
        *size = number(at);
        return *buffer = (word)take(*size);
    case 'x':
        area = take(4096);
        for (++*at; **at && **at != ',' && **at != '.'; *at += 2)
            area[n++] = nibble((*at)[0]) * 16 + nibble((*at)[1]);
        return (word)area;
    case '&':
        area = take(16 * sizeof(word));
        do {
            ++*at;
            ((word *)area)[n++] = argument(at, buffer, size);
        } while (**at == '.');
        return (word)area;
    case '$':
        ++*at;
        return last;
    }
    return number(at);
}

__attribute__((used)) void begin(word *stack)
{
    char **argv = (char **)(stack + 1);
    for (word i = 1; i < stack[0]; i++) {
        const char *at = argv[i];
        word a[6] = {0}, buffers[6] = {0}, sizes[6] = {0};
        long n = number(&at);
        for (int k = 0; k < 6 && *at; k++) {
            at++;
            a[k] = argument(&at, &buffers[k], &sizes[k]);
        }
        last = call(n, a);
        put_number(last);
        for (int k = 0; k < 6; k++)
            if (buffers[k]) {
                put(' ');
                for (word j = 0; j < sizes[k]; j++) {
                    unsigned char c = ((unsigned char *)buffers[k])[j];
                    put("0123456789abcdef"[c >> 4]);
                    put("0123456789abcdef"[c & 15]);
                }
            }
        put('\n');
        call(WRITE, (word[6]){1, (word)out, filled});
        filled = 0;
    }
    call(EXIT, (word[6]){0});
}

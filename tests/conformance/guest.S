/*
 * A guest without an operating system, for saved-state formats: it goes to 64-bit mode, writes
 * pages of every kind all over its memory, says so, and halts.
 *
 * Two pages in each MiB: one that does not compress (a linear congruential generator, seeded by
 * the address), one that repeats a word; pages of 0xff now and then. Memory above 4 GiB is found
 * by writing to it. QEMU loads it with -kernel (Multiboot specification 0.6.96, 3.1).
 */
        .set    MAGIC, 0x1BADB002
        .set    FLAGS, 0x00010002       /* memory information, addresses follow */
        .set    BASE, 0x100000
        .set    TABLES, 0x200000        /* PML4, PDPT, then 8 page directories: 8 GiB */
        .set    FIRST, 0x400000

        .text
        .code32
        .globl  _start
_start: jmp     start32
        .balign 4
header: .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long   header, _start, 0, 0, start32

start32:
        cli
        mov     8(%ebx), %ebp           /* mem_upper: KiB from 1 MiB to the hole */
        mov     $TABLES, %edi
        xor     %eax, %eax
        mov     $(10 * 1024), %ecx
        cld
        rep stosl
        movl    $(TABLES + 0x1003), TABLES
        mov     $(TABLES + 0x2003), %eax
        mov     $(TABLES + 0x1000), %edi
        mov     $8, %ecx
1:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    1b
        mov     $(TABLES + 0x2000), %edi
        xor     %edx, %edx
        mov     $0x83, %eax             /* present, writable, 2 MiB */
        mov     $4096, %ecx
2:      mov     %eax, (%edi)
        mov     %edx, 4(%edi)
        add     $0x200000, %eax
        adc     $0, %edx
        add     $8, %edi
        loop    2b
        mov     $TABLES, %eax
        mov     %eax, %cr3
        mov     %cr4, %eax
        or      $0x20, %eax             /* PAE */
        mov     %eax, %cr4
        mov     $0xC0000080, %ecx
        rdmsr
        or      $0x100, %eax            /* EFER.LME */
        wrmsr
        mov     %cr0, %eax
        or      $0x80000000, %eax
        mov     %eax, %cr0
        lgdt    pointer
        ljmp    $8, $start64

        .code64
start64:
        mov     $FIRST, %rbx
        mov     %ebp, %ebp
        shl     $10, %rbp
        add     $0x100000, %rbp         /* end of low memory */
        call    fill
        mov     $0x100000000, %rbx
        mov     $0x200000000, %rbp      /* what the page tables reach */
        call    fill
        mov     $'R', %al
        outb    %al, $0xe9
        mov     $0x3f8, %dx
        outb    %al, %dx
3:      hlt
        jmp     3b

/* Fill from rbx, at most to rbp, or to where there is no memory. */
fill:   lea     0x2000(%rbx), %rax
        cmp     %rbp, %rax
        ja      9f
        mov     %rbx, (%rbx)
        cmp     %rbx, (%rbx)
        jne     9f
        mov     %rbx, %rdi
        mov     %rbx, %rax
        mov     $6364136223846793005, %r8
        mov     $1442695040888963407, %r9
        mov     $512, %ecx
4:      imul    %r8, %rax
        add     %r9, %rax
        mov     %rax, %rdx
        rol     $29, %rdx
        xor     %rax, %rdx
        mov     %rdx, (%rdi)
        add     $8, %rdi
        loop    4b
        mov     %rbx, %rax
        test    $0x700000, %rbx
        jnz     5f
        mov     $-1, %rax
5:      mov     $512, %ecx
        rep stosq
        add     $0x100000, %rbx
        jmp     fill
9:      ret

        .balign 8
gdt:    .quad   0
        .quad   0x00af9a000000ffff
pointer:
        .word   pointer - gdt - 1
        .long   gdt

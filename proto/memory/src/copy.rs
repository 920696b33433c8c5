//! `memcpy` and `memmove` for the static binaries.
//!
//! musl copies with `rep movsq`, whose rate drops from 10 GB/s to less than 2 if source and destination are not aligned
//! to each other. A byte of a stream is copied a dozen times on its way, nearly always after the 9 bytes of an HTTP/2
//! frame header and the 5 of a TLS record header, so most of the time of a stream was spent in these copies. No library
//! offers these two functions alone. They use the unaligned 16-byte moves that every x86-64 CPU has. Buffers of up to
//! 64 bytes are loaded completely before anything is stored; for larger ones that is done with the part that the loop
//! leaves over. See ADR 0007.
//!
//! They replace the C library's functions only if that is musl; with other C libraries they are only tested.

#[cfg(all(target_arch = "x86_64", target_env = "musl"))]
macro_rules! names {
    ($body:literal) => {
        concat!(
            ".globl memcpy, memmove\n.type memcpy, @function\n.type memmove, @function\n",
            ".set memcpy, knoc_copy\n.set memmove, knoc_move\n",
            $body
        )
    };
}

#[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
macro_rules! names {
    ($body:literal) => {
        $body
    };
}

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "the one place that copies by hand; its tests compare it byte by byte with the standard library"
)]
mod functions {
    // In: rdi destination, rsi source, rdx bytes. Out: rax destination. Clobbers rcx, r8 to r10, xmm0 to xmm7.
    std::arch::global_asm!(names!(
        r#"
        .section .text.knoc_copy, "ax", @progbits
        .globl knoc_copy, knoc_move
        .type knoc_copy, @function
        .type knoc_move, @function
        .p2align 5
knoc_move:
        mov rcx, rdi
        sub rcx, rsi
        cmp rcx, rdx
        jae knoc_copy
        cmp rdx, 64
        ja 7f
knoc_copy:
        mov rax, rdi
        cmp rdx, 16
        jb 3f
        cmp rdx, 64
        ja 5f
        movdqu xmm0, [rsi]
        movdqu xmm1, [rsi + rdx - 16]
        cmp rdx, 32
        ja 2f
        movdqu [rdi], xmm0
        movdqu [rdi + rdx - 16], xmm1
        ret
2:      movdqu xmm2, [rsi + 16]
        movdqu xmm3, [rsi + rdx - 32]
        movdqu [rdi], xmm0
        movdqu [rdi + 16], xmm2
        movdqu [rdi + rdx - 32], xmm3
        movdqu [rdi + rdx - 16], xmm1
        ret

        # Fewer than 16: two words that may overlap, or up to three bytes.
3:      cmp edx, 8
        jb 4f
        mov r8, [rsi]
        mov r9, [rsi + rdx - 8]
        mov [rdi], r8
        mov [rdi + rdx - 8], r9
        ret
4:      cmp edx, 4
        jb 8f
        mov r8d, [rsi]
        mov r9d, [rsi + rdx - 4]
        mov [rdi], r8d
        mov [rdi + rdx - 4], r9d
        ret
8:      test edx, edx
        jz 9f
        mov r10, rdx
        shr r10, 1
        movzx r8d, byte ptr [rsi]
        movzx r9d, byte ptr [rsi + r10]
        movzx ecx, byte ptr [rsi + rdx - 1]
        mov [rdi], r8b
        mov [rdi + r10], r9b
        mov [rdi + rdx - 1], cl
9:      ret

        # More than 64, upwards; the last 64 are held from the beginning.
5:      movdqu xmm4, [rsi + rdx - 64]
        movdqu xmm5, [rsi + rdx - 48]
        movdqu xmm6, [rsi + rdx - 32]
        movdqu xmm7, [rsi + rdx - 16]
        lea r8, [rdi + rdx - 64]
        .p2align 4
6:      movdqu xmm0, [rsi]
        movdqu xmm1, [rsi + 16]
        movdqu xmm2, [rsi + 32]
        movdqu xmm3, [rsi + 48]
        movdqu [rdi], xmm0
        movdqu [rdi + 16], xmm1
        movdqu [rdi + 32], xmm2
        movdqu [rdi + 48], xmm3
        add rsi, 64
        add rdi, 64
        cmp rdi, r8
        jb 6b
        movdqu [r8], xmm4
        movdqu [r8 + 16], xmm5
        movdqu [r8 + 32], xmm6
        movdqu [r8 + 48], xmm7
        ret

        # More than 64, the destination within the source: downwards; the first 64 are held from the beginning.
7:      mov rax, rdi
        movdqu xmm4, [rsi]
        movdqu xmm5, [rsi + 16]
        movdqu xmm6, [rsi + 32]
        movdqu xmm7, [rsi + 48]
        .p2align 4
6:      movdqu xmm0, [rsi + rdx - 64]
        movdqu xmm1, [rsi + rdx - 48]
        movdqu xmm2, [rsi + rdx - 32]
        movdqu xmm3, [rsi + rdx - 16]
        movdqu [rdi + rdx - 64], xmm0
        movdqu [rdi + rdx - 48], xmm1
        movdqu [rdi + rdx - 32], xmm2
        movdqu [rdi + rdx - 16], xmm3
        sub rdx, 64
        cmp rdx, 64
        ja 6b
        movdqu [rdi], xmm4
        movdqu [rdi + 16], xmm5
        movdqu [rdi + 32], xmm6
        movdqu [rdi + 48], xmm7
        ret
        .size knoc_move, . - knoc_move
        .size knoc_copy, . - knoc_copy
        .text
"#
    ));
}

#[cfg(all(test, target_arch = "x86_64"))]
#[expect(unsafe_code, reason = "the functions are called as C has them")]
mod tests {
    use proptest::prelude::*;

    unsafe extern "C" {
        fn knoc_copy(to: *mut u8, from: *const u8, count: usize) -> *mut u8;
        fn knoc_move(to: *mut u8, from: *const u8, count: usize) -> *mut u8;
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..=250).cycle().step_by(7).take(count).collect()
    }

    fn copied(count: usize, from: usize, to: usize) {
        let source = bytes(from + count + 64);
        let mut found = vec![0xee; to + count + 64];
        let mut expected = found.clone();
        expected[to..to + count].copy_from_slice(&source[from..from + count]);
        // SAFETY: each range lies within its own vector.
        let answer =
            unsafe { knoc_copy(found.as_mut_ptr().add(to), source.as_ptr().add(from), count) };
        assert_eq!(answer, found[to..].as_mut_ptr());
        assert_eq!(found, expected, "{count} bytes from {from} to {to}");
    }

    fn moved(count: usize, from: usize, to: usize) {
        let mut found = bytes(from.max(to) + count + 64);
        let mut expected = found.clone();
        expected.copy_within(from..from + count, to);
        let start = found.as_mut_ptr();
        // SAFETY: both ranges lie within the same vector; knoc_move accepts ranges that overlap.
        let answer = unsafe { knoc_move(start.add(to), start.add(from), count) };
        assert_eq!(answer, found[to..].as_mut_ptr());
        assert_eq!(found, expected, "{count} bytes from {from} to {to}");
    }

    #[test]
    fn every_small_size_at_every_alignment() {
        for count in 0..300 {
            for offset in 0..16 {
                copied(count, offset, 0);
                copied(count, 3, offset);
            }
        }
    }

    #[test]
    fn every_small_overlap() {
        for count in 0..200 {
            for offset in 0..130 {
                moved(count, offset, 0);
                moved(count, 0, offset);
                moved(count, offset, 64);
            }
        }
    }

    proptest! {
        #[test]
        fn any_size_and_overlap(count in 0_usize..100_000, from in 0_usize..70_000, to in 0_usize..70_000) {
            copied(count, from % 64, to % 64);
            moved(count, from, to);
        }
    }
}

//! The smallest guest that is of use: one boot sector. It prints a line on the serial port, then answers each byte with
//! the next one, and does what it is told: `p` powers off, `c` panics, `r` resets. It also obeys the power button.

/// What it prints once booted.
pub const BANNER: &str = "OSTLER-UP\n";

/// A disk of 1 MiB that boots on q35 and i440fx with a BIOS.
pub fn boot_disk() -> Vec<u8> {
    let mut disk = vec![0u8; 1 << 20];
    disk[..CODE.len()].copy_from_slice(CODE);
    disk[CODE.len()..CODE.len() + BANNER.len()].copy_from_slice(BANNER.as_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// The smallest kernel: a Linux boot header and code that prints the banner and halts. Starts on every machine type.
pub fn kernel() -> Vec<u8> {
    let mut image = vec![0u8; 4096];
    image[0x1f1] = 1; // one sector of set-up code
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]); // jmp over the header
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x02, 0x02]); // boot protocol 2.2
    image[0x211] = 1; // loaded high
    image[0x268..0x268 + KERNEL_CODE.len()].copy_from_slice(KERNEL_CODE);
    let banner = 0x268 + KERNEL_CODE.len();
    image[banner..banner + BANNER.len()].copy_from_slice(BANNER.as_bytes());
    image
}

#[rustfmt::skip]
const KERNEL_CODE: &[u8] = &[
    0x0e, 0x1f,                         // push cs; pop ds
    0xe8, 0x00, 0x00, 0x5e,             // call next; next: pop si
    0x81, 0xc6, 0x15, 0x00, 0xfc,       // add si, banner - next; cld
    0xac, 0x84, 0xc0, 0x74, 0x06,       // say: lodsb; test al, al; jz done
    0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // mov dx, 0x3f8; out dx, al; jmp say
    0xfa, 0xf4, 0xeb, 0xfd,             // done: cli; halt: hlt; jmp halt
    // The banner follows.
];

#[rustfmt::skip]
const CODE: &[u8] = &[
    // Segments and stack; a timer handler that only acknowledges, since the BIOS's own eats serial input.
    0x31, 0xc0,                         // xor ax, ax
    0x8e, 0xd8,                         // mov ds, ax
    0x8e, 0xd0,                         // mov ss, ax
    0xbc, 0x00, 0x7c,                   // mov sp, 0x7c00
    0xfc, 0xfa,                         // cld; cli
    0xc7, 0x06, 0x20, 0x00, 0x6a, 0x7c, // mov word [0x20], tick
    0xa3, 0x22, 0x00,                   // mov [0x22], ax
    0xfb,                               // sti
    // Print the banner.
    0xbe, 0x71, 0x7c,                   // mov si, banner
    0xac, 0x84, 0xc0, 0x74, 0x06,       // say: lodsb; test al, al; jz ready
    0xba, 0xf8, 0x03, 0xee,             // mov dx, 0x3f8; out dx, al
    0xeb, 0xf5,                         // jmp say
    // ready: enable the power button (ACPI PM1 enable register).
    0xba, 0x02, 0x06,                   // mov dx, 0x602
    0xb8, 0x00, 0x01, 0xef,             // mov ax, 0x100; out dx, ax
    // main: a byte on the serial port?
    0xba, 0xfd, 0x03, 0xec,             // mov dx, 0x3fd; in al, dx
    0xa8, 0x01, 0x74, 0x13,             // test al, 1; jz nokey
    0xba, 0xf8, 0x03, 0xec,             // mov dx, 0x3f8; in al, dx
    0x3c, b'p', 0x74, 0x17,             // cmp al, 'p'; je off
    0x3c, b'c', 0x74, 0x1c,             // cmp al, 'c'; je panic
    0x3c, b'r', 0x74, 0x20,             // cmp al, 'r'; je reset
    0xfe, 0xc0, 0xee,                   // inc al; out dx, al
    // nokey: the power button?
    0xba, 0x00, 0x06, 0xed,             // mov dx, 0x600; in ax, dx
    0xf6, 0xc4, 0x01, 0x75, 0x03,       // test ah, 1; jnz off
    0xf4, 0xeb, 0xd9,                   // hlt; jmp main
    // off: ACPI S5.
    0xba, 0x04, 0x06,                   // mov dx, 0x604
    0xb8, 0x00, 0x20, 0xef,             // mov ax, 0x2000; out dx, ax
    0xeb, 0xd0,                         // jmp main
    // panic: the pvpanic port.
    0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, // mov dx, 0x505; mov al, 1; out dx, al
    0xeb, 0xc8,                         // jmp main
    // reset: the reset control register.
    0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, // mov dx, 0xcf9; mov al, 6; out dx, al
    0xeb, 0xc0,                         // jmp main
    // tick: acknowledge the timer.
    0x50, 0xb0, 0x20, 0xe6, 0x20,       // push ax; mov al, 0x20; out 0x20, al
    0x58, 0xcf,                         // pop ax; iret
    // The banner follows here, at 0x7c71.
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_banner_lies_where_the_code_looks_for_it() {
        assert_eq!(CODE.len(), 0x71);
        let disk = boot_disk();
        assert_eq!(&disk[0x71..0x71 + BANNER.len()], BANNER.as_bytes());
    }
}

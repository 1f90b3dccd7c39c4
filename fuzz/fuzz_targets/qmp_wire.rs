//! QMP's framing on arbitrary bytes in arbitrary pieces: the messages do not depend on where the pieces end, and nothing
//! panics or hangs.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ostler_qemu::qmp::wire::{Decoder, Message, WireError};

/// All messages up to the first error, after which a stream is of no use.
fn messages<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Result<Message, WireError>> {
    let mut decoder = Decoder::default();
    let mut all = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        while let Some(message) = decoder.next_message() {
            let message = message.map(|(message, _)| message);
            let broken = message.is_err();
            all.push(message);
            if broken {
                return all;
            }
        }
    }
    all
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let whole = messages(std::iter::once(bytes));
    let cut = messages(bytes.chunks(usize::from(size).max(1)));
    assert_eq!(whole, cut);
});

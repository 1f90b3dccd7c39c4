//! Text that a guest or QEMU wrote, made safe to show: bounded, without control characters.

/// The most that is kept of QEMU's last words.
pub(crate) const LAST_WORDS_MAX: usize = 2048;

/// Replaces control characters (terminal escapes above all) by spaces and cuts to `max` bytes at a character.
pub(crate) fn clean(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let c = if is_unsafe(c) { ' ' } else { c };
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

fn is_unsafe(c: char) -> bool {
    // Directional overrides and line separators can forge what a person reads as much as escapes can.
    (c.is_control() && c != '\n')
        || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The last lines of a log, as one line with ` | ` between them.
pub(crate) fn last_words(log: &[u8]) -> String {
    let tail = &log[log.len().saturating_sub(LAST_WORDS_MAX)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(8);
    let words = clean(&lines[from..].join(" | "), LAST_WORDS_MAX);
    if words.is_empty() { "QEMU said nothing".to_owned() } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_and_bidi_marks_are_taken_out() {
        assert_eq!(clean("a\u{1b}[31mb\u{202e}c\0", 100), "a [31mb c ");
    }

    #[test]
    fn cutting_keeps_whole_characters() {
        assert_eq!(clean("ää", 3), "ä");
    }

    #[test]
    fn last_words_are_the_end_of_the_log() {
        assert_eq!(last_words(b"one\n\ntwo\r\nthree"), "one | two | three");
        assert_eq!(last_words(b""), "QEMU said nothing");
        let long = vec![0xffu8; 100_000];
        assert!(last_words(&long).len() <= LAST_WORDS_MAX);
    }
}

//! Text from elsewhere on a person's terminal: made harmless.

use std::borrow::Cow;

/// Replaces what moves the cursor, rings, hides or reverses text. What is left is one line.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if text.chars().any(is_harmful) {
        Cow::Owned(text.chars().map(|c| if is_harmful(c) { '\u{fffd}' } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Lets text, ends of lines, tabs and colours of a guest's console through; all else stays away from the terminal.
/// Takes bytes in whatever pieces they come.
#[derive(Debug, Default)]
pub(crate) struct LogFilter {
    state: State,
    /// The sequence or character that is not complete.
    held: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    /// After a carriage return.
    Return,
    Escape,
    /// `ESC [ …`
    Control,
    /// `ESC ] …` and its like, up to BEL or `ESC \`.
    Command,
    CommandEscape,
    /// One more byte belongs to the escape.
    Skip,
}

/// Longest colour sequence that is let through.
const CONTROL_MAX: usize = 32;

impl LogFilter {
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            self.byte(byte, &mut out);
        }
        out
    }

    fn byte(&mut self, byte: u8, out: &mut Vec<u8>) {
        match self.state {
            State::Text => self.text(byte, out),
            State::Return => {
                self.state = State::Text;
                // A lone carriage return would let the next text cover the line.
                if byte == b'\r' {
                    self.state = State::Return;
                    return;
                }
                if byte != b'\n' {
                    out.push(b'\n');
                }
                self.text(byte, out);
            }
            State::Escape => {
                self.held.clear();
                self.state = match byte {
                    b'[' => State::Control,
                    b']' | b'P' | b'X' | b'^' | b'_' => State::Command,
                    b'(' | b')' | b'*' | b'+' | b'#' | b'%' | b' ' => State::Skip,
                    0x1b => State::Escape,
                    _ => State::Text,
                };
            }
            State::Control => self.control(byte, out),
            State::Command => match byte {
                0x07 | 0x18 | 0x1a => self.state = State::Text,
                0x1b => self.state = State::CommandEscape,
                _ => {}
            },
            State::CommandEscape => {
                self.state = if byte == b'\\' { State::Text } else { State::Command };
            }
            State::Skip => self.state = State::Text,
        }
    }

    fn control(&mut self, byte: u8, out: &mut Vec<u8>) {
        match byte {
            0x20..=0x3f => {
                if self.held.len() < CONTROL_MAX {
                    self.held.push(byte);
                }
            }
            b'm' if self.held.len() < CONTROL_MAX
                && self.held.iter().all(|b| b.is_ascii_digit() || *b == b';' || *b == b':') =>
            {
                out.extend_from_slice(b"\x1b[");
                out.append(&mut self.held);
                out.push(b'm');
                self.state = State::Text;
            }
            _ => {
                self.held.clear();
                self.state = if byte == 0x1b { State::Escape } else { State::Text };
            }
        }
    }

    fn text(&mut self, byte: u8, out: &mut Vec<u8>) {
        if !self.held.is_empty() || byte >= 0x80 {
            return self.unicode(byte, out);
        }
        match byte {
            0x1b => self.state = State::Escape,
            b'\r' => self.state = State::Return,
            b'\n' | b'\t' | 0x20..=0x7e => out.push(byte),
            _ => {}
        }
    }

    fn unicode(&mut self, byte: u8, out: &mut Vec<u8>) {
        let continues = (0x80..0xc0).contains(&byte);
        if !self.held.is_empty() && !continues {
            self.held.clear();
            out.extend_from_slice("\u{fffd}".as_bytes());
            return self.text(byte, out);
        }
        self.held.push(byte);
        match std::str::from_utf8(&self.held) {
            Ok(text) => {
                if !text.chars().any(is_harmful) {
                    out.extend_from_slice(text.as_bytes());
                }
                self.held.clear();
            }
            Err(error) if error.error_len().is_some() || self.held.len() >= 4 => {
                self.held.clear();
                out.extend_from_slice("\u{fffd}".as_bytes());
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(text: &[u8]) -> String {
        let whole = LogFilter::default().feed(text);
        // However it is cut, the result is the same.
        let mut filter = LogFilter::default();
        let bytes: Vec<u8> = text.iter().flat_map(|byte| filter.feed(&[*byte])).collect();
        assert_eq!(whole, bytes);
        String::from_utf8(whole).unwrap()
    }

    #[test]
    fn text_lines_and_colours_pass() {
        assert_eq!(filtered(b"[ 0.1] Linux\r\n\tok\n"), "[ 0.1] Linux\n\tok\n");
        assert_eq!(filtered(b"\x1b[1;32mOK\x1b[0m"), "\x1b[1;32mOK\x1b[0m");
        assert_eq!(filtered("grüße 世界".as_bytes()), "grüße 世界");
    }

    #[test]
    fn what_moves_or_commands_the_terminal_does_not() {
        assert_eq!(filtered(b"a\x1b[2J\x1b[H\x1b[?1049hb"), "ab");
        assert_eq!(filtered(b"a\x1b]0;title\x07b\x1b]52;c;eA==\x1b\\c"), "abc");
        assert_eq!(filtered(b"a\x1bPq..\x1b\\b\x1b(Bc\x1b7d"), "abcd");
        assert_eq!(filtered(b"a\x08\x07\x7f\x00b"), "ab");
        assert_eq!(filtered("a\u{9b}2Jb\u{202e}c".as_bytes()), "a2Jbc");
        assert_eq!(filtered(b"10%\r20%\r\r\ndone"), "10%\n20%\ndone");
        assert_eq!(filtered(b"\x1b[\x1b[31mx"), "\x1b[31mx");
    }

    #[test]
    fn broken_unicode_is_marked() {
        assert_eq!(filtered(b"a\xffb\xe2\x82c"), "a\u{fffd}b\u{fffd}c");
    }

    #[test]
    fn clean_text_is_one_line_without_tricks() {
        assert_eq!(clean("web-1"), "web-1");
        assert_eq!(clean("a\nb\u{1b}[2J\u{202e}"), "a\u{fffd}b\u{fffd}[2J\u{fffd}");
    }
}

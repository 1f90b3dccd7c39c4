//! QMP's framing: one JSON object per line. Pure, and safe on anything a broken or hostile peer sends: sizes are capped,
//! nesting is limited by the JSON reader, and what is not understood is an error rather than a guess.

use serde::Deserialize;
use serde_json::Value;

/// The longest message taken. QEMU's longest (`query-qmp-schema`) is below 1 MiB.
pub const MAX_MESSAGE: usize = 8 << 20;

#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Greeting {
        version: String,
    },
    Event {
        name: String,
        data: Value,
    },
    Return {
        id: u64,
        value: Value,
    },
    /// `id` is missing when QEMU could not even read the command.
    Error {
        id: Option<u64>,
        class: String,
        desc: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("not JSON: {0}")]
    NotJson(String),
    #[error("a message of no known kind")]
    UnknownMessage,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "QMP")]
    greeting: Option<RawGreeting>,
    event: Option<String>,
    data: Option<Value>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<RawError>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct RawGreeting {
    version: RawVersion,
}

#[derive(Deserialize)]
struct RawVersion {
    qemu: RawTriple,
}

#[derive(Deserialize)]
struct RawTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
struct RawError {
    class: String,
    desc: String,
}

/// Reads one message from one line.
pub fn parse(line: &[u8]) -> Result<Message, WireError> {
    let raw: Raw = serde_json::from_slice(line).map_err(|error| WireError::NotJson(error.to_string()))?;
    match raw {
        Raw { greeting: Some(RawGreeting { version: RawVersion { qemu } }), .. } => {
            Ok(Message::Greeting { version: format!("{}.{}.{}", qemu.major, qemu.minor, qemu.micro) })
        }
        Raw { event: Some(name), data, .. } => Ok(Message::Event { name, data: data.unwrap_or(Value::Null) }),
        Raw { error: Some(RawError { class, desc }), id, .. } => Ok(Message::Error { id, class, desc }),
        Raw { value: Some(value), id: Some(id), .. } => Ok(Message::Return { id, value }),
        _ => Err(WireError::UnknownMessage),
    }
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where the unread part begins.
    start: usize,
    /// Up to where no line end was found.
    searched: usize,
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, its line, and `None` when more bytes are needed. After an error the stream is of no use.
    pub fn next_message(&mut self) -> Option<Result<(Message, &[u8]), WireError>> {
        loop {
            let Some(length) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                let waiting = self.buffer.len() - self.start;
                return (waiting > MAX_MESSAGE).then_some(Err(WireError::TooLong));
            };
            let (from, to) = (self.start, self.searched + length);
            (self.start, self.searched) = (to + 1, to + 1);
            if to - from > MAX_MESSAGE {
                return Some(Err(WireError::TooLong));
            }
            if self.buffer[from..to].iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let line = &self.buffer[from..to];
            return Some(parse(line).map(|message| (message, line)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GREETING: &[u8] =
        br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#;

    #[test]
    fn every_kind_is_read() {
        assert_eq!(parse(GREETING), Ok(Message::Greeting { version: "7.2.22".into() }));
        assert_eq!(
            parse(br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#),
            Ok(Message::Event { name: "STOP".into(), data: Value::Null })
        );
        assert_eq!(
            parse(br#"{"return": {}, "id": 7}"#),
            Ok(Message::Return { id: 7, value: serde_json::json!({}) })
        );
        assert_eq!(
            parse(br#"{"id": 7, "error": {"class": "GenericError", "desc": "no"}}"#),
            Ok(Message::Error { id: Some(7), class: "GenericError".into(), desc: "no".into() })
        );
    }

    #[test]
    fn what_is_not_qmp_is_an_error() {
        for bad in
            [&b"{}"[..], b"[]", b"null", br#"{"return": {}}"#, br#"{"return": 1, "id": "x"}"#, b"\xff", b"{"]
        {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(parse(&deep).is_err());
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&vec![b' '; MAX_MESSAGE + 1]);
        assert_eq!(decoder.next_message().map(|result| result.map(|_| ())), Some(Err(WireError::TooLong)));
    }

    fn drain(decoder: &mut Decoder) -> Vec<Result<Message, WireError>> {
        let mut out = Vec::new();
        while let Some(message) = decoder.next_message() {
            let failed = message.is_err();
            out.push(message.map(|(message, _)| message));
            if failed {
                break;
            }
        }
        out
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            let _ = drain(&mut decoder);
        }

        #[test]
        fn mangled_messages_never_panic(at in 0..GREETING.len(), byte in any::<u8>(), cut in 0..GREETING.len()) {
            let mut line = GREETING.to_vec();
            line[at] = byte;
            line.truncate(cut);
            let _ = parse(&line);
        }

        #[test]
        fn how_the_stream_is_cut_does_not_matter(
            ids in proptest::collection::vec(any::<u64>(), 1..20),
            cuts in proptest::collection::vec(1usize..40, 1..60),
        ) {
            let stream: Vec<u8> =
                ids.iter().flat_map(|id| format!("{{\"return\": {{\"a\": \"b\\n\"}}, \"id\": {id}}}\r\n").into_bytes()).collect();
            let (mut decoder, mut seen, mut rest) = (Decoder::default(), Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.feed(now);
                seen.extend(drain(&mut decoder));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let seen: Vec<u64> = seen
                .into_iter()
                .map(|message| match message {
                    Ok(Message::Return { id, .. }) => id,
                    other => panic!("{other:?}"),
                })
                .collect();
            prop_assert_eq!(seen, ids);
        }
    }
}
